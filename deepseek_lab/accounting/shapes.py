"""Every weight of a model from its config alone: one list, which counting and bytes both read.

A `Weight` stands for all tensors of one role: "attention/q_b_proj" is that matrix in all 61 layers. Names are those of
the published checkpoints. Sources: DeepSeek-V3 report, sections 2.1, 2.2 and 4.2; config.json files; README_WEIGHTS.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from deepseek_lab.config import ModelConfig
from deepseek_lab.presets import PRESETS

_V3, _V2 = "DeepSeek-V3 report (arXiv 2412.19437)", "DeepSeek-V2 report (arXiv 2405.04434)"
_REPORTS = {"deepseek_v3": _V3, "deepseek_v2": _V2, "llama": "Llama 3.1 config.json", "qwen2": "Qwen2.5 config.json"}
_SINGULAR = {"layers": "layer", "experts": "expert", "matrices": "matrix", "norms": "norm"}


@dataclass(frozen=True)
class Weight:
    """The tensors of one role: `layers x experts x copies` tensors of `shape` [out, in] or [width].

    used: how many of `experts` a token passes through. kind: "linear" (stored in FP8 by the published checkpoint),
    "embedding", "head", "tied", "norm", "gate", "projection", "bias" or "correction bias". text: the shape in factors.
    """

    part: str
    kind: str
    shape: tuple[int, ...]
    text: str
    keys: tuple[str, ...]
    source: str
    layers: int | None = None
    experts: int | None = None
    used: int | None = None
    copies: int | None = None
    copies_word: str = "matrices"

    @property
    def name(self) -> str:
        return self.part.rpartition("/")[2]

    def factors(self, active: bool = False) -> list[tuple[int, str]]:
        """Return what multiplies the shape, as (number, word); with `active` the experts that one token meets."""
        experts = self.used if active and self.used is not None else self.experts
        counts = [(self.layers, "layers"), (experts, "experts"), (self.copies, self.copies_word)]
        return [(n, _SINGULAR[word] if n == 1 else word) for n, word in counts if n is not None]

    def tensors(self, active: bool = False) -> int:
        return math.prod(n for n, _ in self.factors(active))

    def elements(self, active: bool = False) -> int:
        return self.tensors(active) * math.prod(self.shape)

    def blocks(self, size: int = 128) -> int:
        """How many size x size blocks, ragged ones counted whole, the tensors are cut into."""
        return self.tensors() * math.prod(-(-width // size) for width in self.shape)

    def formula(self, shape_text: str | None = None, active: bool = False) -> str:
        """Return the element count as text: "58 layers × 256 experts × 3 matrices × 2,048 × 7,168"."""
        return " × ".join([*(f"{n:,} {word}" for n, word in self.factors(active)), shape_text or self.text])


@dataclass(frozen=True)
class Side:
    """One side of a matrix: its width, the width in factors, and the config keys that it comes from."""

    width: int
    text: str
    keys: tuple[str, ...]


def model_weights(config: ModelConfig, with_mtp: bool = False, copies: bool = False) -> tuple[Weight, ...]:
    """Return every weight of the model, in the order in which a token meets them.

    with_mtp: include the multi-token prediction modules. copies: count the embedding and the output head that a
    published checkpoint stores a second time inside each module. Raises ValueError where the model has no such module.
    """
    refuse_other_than_config(config)
    c, layers = config, ("num_hidden_layers",)
    tied = c.tie_word_embeddings
    weights = [_table(c, "embedding and output head", "tied") if tied else _table(c, "embedding", "embedding")]
    weights += _with_keys(layers, attention_weights(c, c.num_hidden_layers))
    dense_keys = ("num_hidden_layers", "first_k_dense_replace") if c.n_routed_experts else layers
    if c.num_dense_layers:
        weights += _with_keys(dense_keys[-1:], [_dense_feed_forward(c, c.num_dense_layers)])
    if c.num_moe_layers:
        weights += _with_keys(dense_keys, expert_weights(c, c.num_moe_layers))
    weights += _with_keys(layers, [_norm(c, "norms/before attention and feed-forward", c.num_hidden_layers, 2)])
    weights.append(_norm(c, "norms/final", None, None))
    if not tied:
        weights.append(_table(c, "output head", "head"))
    return (*weights, *(_mtp_weights(c, copies) if with_mtp else ()))


def refuse_other_than_config(config) -> None:
    if not isinstance(config, ModelConfig):
        name = config if config in list(PRESETS) else "deepseek-v3"
        raise TypeError(f"got {type(config).__name__} instead of a ModelConfig; pass lab.PRESETS[{name!r}] or the like")


def attention_weights(c: ModelConfig, layers: int) -> list[Weight]:
    """Return the weights of `layers` attention layers: latent where `kv_lora_rank` is set, grouped otherwise."""
    matrices = _latent_matrices(c) if c.uses_latent_attention else _grouped_matrices(c)
    source = f"{_REPORTS[c.model_type]}, section 2.1.1" if c.uses_latent_attention else _REPORTS[c.model_type]
    out = []
    for name, rows, columns, has_bias in matrices:
        sides = [rows] if columns is None else [rows, columns]
        keys = tuple(dict.fromkeys(key for side in sides for key in side.keys))
        shape, text = tuple(side.width for side in sides), " × ".join(side.text for side in sides)
        kind = "norm" if columns is None else "linear"
        out.append(Weight(f"attention/{name}", kind, shape, text, keys, source, layers))
        if has_bias:
            keys = (*rows.keys, "attention_bias")
            out.append(Weight(f"attention/{name} bias", "bias", (rows.width,), rows.text, keys, source, layers))
    return out


def expert_weights(c: ModelConfig, layers: int) -> list[Weight]:
    """Return the weights of `layers` expert layers: gate, correction bias, shared and routed experts."""
    source, n, width = f"{_REPORTS[c.model_type]}, section 2.1.2", c.n_routed_experts, c.moe_intermediate_size
    text, keys = f"{n:,} × {c.hidden_size:,}", ("n_routed_experts", "hidden_size")
    out = [Weight("experts/gate", "gate", (n, c.hidden_size), text, keys, source, layers)]
    if c.topk_method == "noaux_tc":
        keys = ("n_routed_experts", "topk_method")
        out.append(Weight("experts/correction bias", "correction bias", (n,), f"{n:,}", keys, source, layers))
    if c.n_shared_experts:
        # One wide network in the checkpoint: its blocks are cut from the joined width.
        side = Side(
            c.n_shared_experts * width,
            f"({c.n_shared_experts} × {width:,})",
            ("n_shared_experts", "moe_intermediate_size"),
        )
        out.append(_feed_forward(c, "experts/shared experts", side, layers, source))
    side = Side(width, f"{width:,}", ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
    routed = _feed_forward(c, "experts/routed experts", side, layers, source)
    return [*out, replace(routed, experts=n, used=c.num_experts_per_tok)]


def _latent_matrices(c: ModelConfig) -> list[tuple[str, Side, Side | None, bool]]:
    """(name, rows, columns, has a bias) of latent attention; a norm has no columns."""
    heads, nope, rope, value = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    hidden = _hidden(c)
    queries = Side(
        heads * (nope + rope),
        f"{heads} heads × ({nope} + {rope})",
        ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"),
    )
    latent = Side(c.kv_lora_rank, f"{c.kv_lora_rank:,}", ("kv_lora_rank",))
    joint = Side(c.latent_width, f"({c.kv_lora_rank} + {rope})", ("kv_lora_rank", "qk_rope_head_dim"))
    expanded = Side(
        heads * (nope + value),
        f"{heads} heads × ({nope} + {value})",
        ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"),
    )
    values = Side(heads * value, f"{heads} heads × {value}", ("num_attention_heads", "v_head_dim"))
    if not c.q_lora_rank:
        first = [("q_proj", queries, hidden, False)]
    else:
        rank = Side(c.q_lora_rank, f"{c.q_lora_rank:,}", ("q_lora_rank",))
        first = [
            ("q_a_proj", rank, hidden, False),
            ("q_a_layernorm", rank, None, False),
            ("q_b_proj", queries, rank, False),
        ]
    return [
        *first,
        ("kv_a_proj_with_mqa", joint, hidden, False),
        ("kv_a_layernorm", latent, None, False),
        ("kv_b_proj", expanded, latent, False),
        ("o_proj", hidden, values, False),
    ]


def _grouped_matrices(c: ModelConfig) -> list[tuple[str, Side, Side | None, bool]]:
    """(name, rows, columns, has a bias) of grouped attention; Qwen 2 has none on its output, Llama would."""
    size, bias = c.qk_head_dim, c.attention_bias
    size_keys = ("head_dim",) if c.head_dim else ("hidden_size", "num_attention_heads")
    heads, groups = c.num_attention_heads, c.num_key_value_heads
    queries = Side(heads * size, f"{heads} heads × {size}", ("num_attention_heads", *size_keys))
    keys = Side(groups * size, f"{groups} heads × {size}", ("num_key_value_heads", *size_keys))
    return [
        ("q_proj", queries, _hidden(c), bias),
        ("k_proj", keys, _hidden(c), bias),
        ("v_proj", keys, _hidden(c), bias),
        ("o_proj", _hidden(c), queries, bias and c.model_type != "qwen2"),
    ]


def _mtp_weights(c: ModelConfig, copies: bool) -> list[Weight]:
    """A projection, a block and its norms per module; the embedding and the head are the main model's."""
    n, source = c.num_nextn_predict_layers, f"{_V3}, section 2.2; repository file README_WEIGHTS.md"
    if n < 1:
        raise ValueError(
            f"with_mtp=True, but num_nextn_predict_layers={n}: this model has no multi-token prediction module; "
            "leave with_mtp out, or give the config one"
        )
    text = f"{c.hidden_size:,} × (2 × {c.hidden_size:,})"
    inside = [Weight("eh_proj", "projection", (c.hidden_size, 2 * c.hidden_size), text, ("hidden_size",), source, n)]
    inside += attention_weights(c, n)
    inside += expert_weights(c, n) if c.n_routed_experts else [_dense_feed_forward(c, n)]
    inside.append(_norm(c, "norms/before attention and feed-forward", n, 2))
    inside.append(_norm(c, "norms/enorm, hnorm, shared_head.norm", n, 3))
    if copies:
        inside.append(replace(_table(c, "copy of the embedding", "embedding"), layers=n))
        inside.append(replace(_table(c, "copy of the output head", "head"), layers=n))
    named = [replace(w, part=f"multi-token prediction/{w.part}", source=source) for w in inside]
    return _with_keys(("num_nextn_predict_layers",), named)


def _dense_feed_forward(c: ModelConfig, layers: int) -> Weight:
    side = Side(c.intermediate_size, f"{c.intermediate_size:,}", ("intermediate_size",))
    return _feed_forward(c, "dense feed-forward", side, layers, _REPORTS[c.model_type])


def _feed_forward(c: ModelConfig, part: str, side: Side, layers: int, source: str) -> Weight:
    """gate_proj, up_proj and down_proj of a SwiGLU network: three matrices of one size."""
    text, keys = f"{side.text} × {c.hidden_size:,}", (*side.keys, "hidden_size")
    return Weight(part, "linear", (side.width, c.hidden_size), text, keys, source, layers, copies=3)


def _table(c: ModelConfig, part: str, kind: str) -> Weight:
    keys = ("vocab_size", "hidden_size", *(("tie_word_embeddings",) if kind == "tied" else ()))
    text = f"{c.vocab_size:,} × {c.hidden_size:,}"
    return Weight(part, kind, (c.vocab_size, c.hidden_size), text, keys, _REPORTS[c.model_type])


def _norm(c: ModelConfig, part: str, layers: int | None, copies: int | None) -> Weight:
    return Weight(
        part,
        "norm",
        (c.hidden_size,),
        f"{c.hidden_size:,}",
        ("hidden_size",),
        _REPORTS[c.model_type],
        layers,
        copies=copies,
        copies_word="norms",
    )


def _hidden(c: ModelConfig) -> Side:
    return Side(c.hidden_size, f"{c.hidden_size:,}", ("hidden_size",))


def _with_keys(keys: tuple[str, ...], weights: list[Weight]) -> list[Weight]:
    return [replace(w, keys=tuple(dict.fromkeys((*keys, *w.keys)))) for w in weights]
