"""What a model is made of, in the words of a published `config.json`.

`ModelConfig` is frozen: change one with `config.replace(hidden_size=128)`, read a published file with
`ModelConfig.from_hf("path/to/config.json")`, write one with `config.to_hf()`. `PRESETS` holds the models that the
course talks about; nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .config_checks import check_config, check_rope_scaling


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context.

    rope_type "yarn" (DeepSeek): frequencies are blended by index between `beta_fast` and `beta_slow` rotations over
    `original_max_position_embeddings`; `mscale_all_dim` sharpens the softmax. rope_type "llama3" (Llama 3.1): blended
    by wavelength between `low_freq_factor` and `high_freq_factor`.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        check_rope_scaling(self)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer: DeepSeek-V3, DeepSeek-V2 or the dense Llama and Qwen 2 baseline.

    A model has latent attention when `kv_lora_rank` is set, and experts when `n_routed_experts` is set; otherwise it
    has grouped heads (`num_key_value_heads`) and one dense feed-forward network per layer.

    | here (= `config.json`)    | papers        | official demo          | DeepSeek-V3 |
    |---------------------------|---------------|------------------------|-------------|
    | hidden_size               | d             | dim                    | 7168        |
    | num_hidden_layers         | l             | n_layers               | 61          |
    | num_attention_heads       | n_h           | n_heads                | 128         |
    | q_lora_rank               | d'_c          | q_lora_rank            | 1536        |
    | kv_lora_rank              | d_c           | kv_lora_rank           | 512         |
    | qk_nope_head_dim          | d_h           | qk_nope_head_dim       | 128         |
    | qk_rope_head_dim          | d_h^R         | qk_rope_head_dim       | 64          |
    | v_head_dim                | d_h           | v_head_dim             | 128         |
    | intermediate_size         | -             | inter_dim              | 18432       |
    | moe_intermediate_size     | -             | moe_inter_dim          | 2048        |
    | n_routed_experts          | N_r           | n_routed_experts       | 256         |
    | n_shared_experts          | N_s           | n_shared_experts       | 1           |
    | num_experts_per_tok       | K_r           | n_activated_experts    | 8           |
    | n_group, topk_group       | D, M (nodes)  | n_expert_groups, n_limited_groups | 8, 4 |
    | routed_scaling_factor     | -             | route_scale            | 2.5         |
    | first_k_dense_replace     | -             | n_dense_layers         | 3           |
    | num_nextn_predict_layers  | D (MTP depth) | -                      | 1           |

    Sources: DeepSeek-V3 report (arXiv 2412.19437), sections 2 and 4.2; the published config.json files.
    Raises ValueError for a combination that cannot exist, naming the field, its value and what would work.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    head_dim: int | None = None
    attention_bias: bool = False
    # latent attention
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = True
    # experts
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # the rest
    num_nextn_predict_layers: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        check_config(self)

    # Derived sizes -------------------------------------------------------------------------------------------------

    @property
    def uses_latent_attention(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head, in values."""
        if self.uses_latent_attention:
            return self.qk_nope_head_dim + self.qk_rope_head_dim  # 192 in V3
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        """Width of one value head, in values."""
        return self.v_head_dim if self.uses_latent_attention else self.qk_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many values of a query or key carry the position."""
        return self.qk_rope_head_dim if self.uses_latent_attention else self.qk_head_dim

    @property
    def latent_width(self) -> int:
        """Values per token and layer in a latent cache: the latent and the rope key."""
        if not self.uses_latent_attention:
            raise ValueError("latent_width needs kv_lora_rank; this model has grouped heads, use a grouped cache")
        return self.kv_lora_rank + self.qk_rope_head_dim  # 576 in V3

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def num_dense_layers(self) -> int:
        return self.first_k_dense_replace if self.n_routed_experts else self.num_hidden_layers

    # Reading and writing -------------------------------------------------------------------------------------------

    def replace(self, **changes) -> ModelConfig:
        """Return a copy with some fields changed; the copy is checked like any other."""
        _refuse_unknown(changes, "ModelConfig.replace")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, source: Mapping | str | Path) -> ModelConfig:
        """Read a published config: a dict, a `config.json`, or the directory that holds one.

        Keys that describe something else (dropout, token ids, dtype) are passed over. `rope_parameters`, which newer
        files write, is read like `rope_theta` and `rope_scaling`. Raises ValueError for an unknown `model_type`.
        """
        from .hf_config import read_config

        return cls(**read_config(source))

    def to_hf(self) -> dict:
        """Return the config as a published `config.json` has it: `from_hf(config.to_hf()) == config`."""
        from .hf_config import write_config

        return write_config(self)


_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}


def _refuse_unknown(names, where: str) -> None:
    unknown = sorted(set(names) - set(_FIELDS))
    if unknown:
        raise ValueError(f"{where} got {', '.join(unknown)}; the fields are {', '.join(_FIELDS)}")
