"""The same model with five kinds of cache, filled token by token until the memory beside the weights is used up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from deepseek_lab.config import ModelConfig
from deepseek_lab.presets import PRESETS

from .ledger import Ledger
from .memory import kv_cache
from .memory_state import MemoryState

#: Key and value heads of each kind; None: as many as there are query heads. Latent kinds by their layout.
KINDS: dict[str, int | str | None] = {"MHA": None, "GQA-8": 8, "MQA": 1, "MLA": "latent", "MLA-FP8": "latent_fp8"}


@dataclass(frozen=True)
class CacheRace:
    """Caches of `batch` sequences on a set of GPUs, each for a model of these dimensions, bytes by `kv_cache`.

    model: a name in PRESETS with latent attention. gpu: a name in `memory_state.GPU_SETS`. prompt: tokens that are read
    at once. MHA, GQA-8 and MQA have heads as wide as the model's value heads. The weights are the model's own, in FP8,
    for every kind. Raises ValueError for unknown names, a model without a latent and a prompt longer than it reads.
    """

    model: str = "deepseek-v3"
    gpu: str = "8 x H200"
    batch: int = 1
    prompt: int = 4_096

    def __post_init__(self):
        limit = self.state.config.max_position_embeddings
        if not self.config.uses_latent_attention or self.config.num_attention_heads % 8:
            raise ValueError(f"model={self.model!r} has no latent attention, or no heads for GQA-8; choose "
                             "deepseek-v3, deepseek-v2 or deepseek-v2-lite")  # fmt: skip
        if isinstance(self.prompt, bool) or not isinstance(self.prompt, int) or not 1 <= self.prompt < limit:
            raise ValueError(f"prompt={self.prompt!r}; choose a whole number from 1 to {limit - 1:,}")

    @cached_property
    def state(self) -> MemoryState:
        return MemoryState(self.model, "fp8", "latent", 1, self.batch, self.gpu)

    @property
    def config(self) -> ModelConfig:
        return PRESETS[self.model]

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return self.state.ledger.lines[0].total

    @property
    def room(self) -> int:
        """Bytes that the GPUs hold beside the weights; 0 where the weights alone are too large."""
        return max(self.state.capacity - self.weights, 0)

    @property
    def steps(self) -> tuple[int, ...]:
        """Tokens per sequence to look at: none, the prompt, three single tokens, then twentieths of what it reads."""
        limit = self.config.max_position_embeddings
        first = (0, *range(self.prompt, min(self.prompt + 4, limit)))
        return (*first, *(n for n in (limit * i // 20 for i in range(1, 21)) if n > first[-1]))

    def ledger(self, kind: str, tokens: int) -> Ledger:
        """The cache of one kind at `tokens` tokens per sequence, in bytes."""
        heads = KINDS[kind]
        if isinstance(heads, str):
            return kv_cache(self.config, tokens, self.batch, heads)
        return kv_cache(self._grouped(heads or self.config.num_attention_heads), tokens, self.batch, "grouped")

    def runs_out(self, kind: str) -> int:
        """Return the tokens per sequence that fit; one more does not."""
        return self.room // self.ledger(kind, 1).total

    def _grouped(self, heads: int) -> ModelConfig:
        return self.config.replace(
            num_key_value_heads=heads, head_dim=self.config.v_head_dim, kv_lora_rank=None, q_lora_rank=None,
            qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0, rope_scaling=None,
        )  # fmt: skip
