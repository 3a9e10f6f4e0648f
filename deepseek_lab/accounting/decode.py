"""What attention costs for one more token: operations and bytes of one layer, for each way of reading the cache."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_lab.config import ModelConfig

from .ledger import Ledger, Line
from .memory import BYTES
from .shapes import refuse_other_than_config

#: Ways of a model with latent attention; one with grouped heads has "grouped" alone.
LATENT_WAYS = ("expanded", "re-expanded", "absorbed")
_V2 = "DeepSeek-V2 report (arXiv 2405.04434), section 2.1"
_SOURCES = {
    "grouped": "DeepSeek-V2 report, table 1 (MHA, GQA, MQA)",
    "expanded": f"{_V2}.1: every head keeps its key and value",
    "re-expanded": f"{_V2}.2: keys and values are computed from the latents again at every step",
    "absorbed": f"{_V2}.2: W_UK goes to the query, W_UV to the output",
}


@dataclass(frozen=True)
class DecodeStep:
    """One decoded token per sequence in one layer.

    kept: numbers that one token leaves in the cache. flops: FLOP, a multiply-add as two. reads: bytes read from memory.
    Both hold what touches the cache and the up-projection of the latent, whose weights all sequences share. Other
    projections, which the ways have in common, softmax, norms and intermediate results are left out.
    """

    way: str
    kept: int
    flops: Ledger
    reads: Ledger

    @property
    def intensity(self) -> float:
        """FLOP per byte read."""
        return self.flops.total / self.reads.total

    @property
    def cache_intensity(self) -> float:
        """FLOP per byte of the cache alone, weights left out: 1 for MHA, 8 for GQA with 8 query heads per key, in BF16.

        Absorbed V3: 241.8.
        """
        return (self.flops["scores"].total + self.flops["mix"].total) / self.reads["cache"].total

    def seconds(self, peak: float, bandwidth: float) -> float:
        """Return the least time on a machine of `peak` FLOP/s and `bandwidth` bytes/s that overlaps both perfectly."""
        return max(self.flops.total / peak, self.reads.total / bandwidth)


def decode_step(
    config: ModelConfig, context: int, way: str | None = None, batch: int = 1, dtype: str = "bf16"
) -> DecodeStep:
    """Return what one decode step of `batch` sequences costs in one layer, the new token being the last of `context`.

    way: "grouped"; for latent attention "expanded" (keys and values of all heads are cached), "re-expanded" (latents
    are cached, and expanded at every step) or "absorbed" (heads attend to the latents). None: "absorbed", or "grouped".
    V3, one sequence: absorbed 33,554,432 + 278,528 x context FLOP, expanded 33,554,432 + 81,920 x context, re-expanded
    (33,554,432 + 81,920) x context. Raises ValueError for a way that the model does not have, and sizes below 1.
    """
    refuse_other_than_config(config)
    ways = LATENT_WAYS if config.uses_latent_attention else ("grouped",)
    way = way or ways[-1]
    if way not in ways:
        raise ValueError(f"way={way!r} does not go with kv_lora_rank={config.kv_lora_rank}; choose {' or '.join(ways)}")
    if dtype not in BYTES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(BYTES)}")
    for name, value in (("context", context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; choose a whole number >= 1")
    kept, text, keys = _kept(config, way)
    size, tokens = BYTES[dtype], f"{batch:,} × {context:,} × "
    cache = batch * context * kept * size
    reads = [Line("cache", cache, "bytes", f"{tokens}{text} × {size} bytes", keys, _SOURCES[way])]
    if config.uses_latent_attention:
        weights, text, keys = _up_projection(config)
        reads.append(Line("weights", weights * size, "bytes", f"{text} × {size} bytes", keys, _SOURCES[way]))
    flops = [
        Line(part, 2 * batch * count, "FLOP", f"2 × {batch:,} × {text}", keys, _SOURCES[way])
        for part, count, text, keys in _products(config, context, way)
    ]
    return DecodeStep(way, kept, Ledger(f"{way}: FLOP", tuple(flops)), Ledger(f"{way}: bytes read", tuple(reads)))


def equal_ridge(one: DecodeStep, other: DecodeStep) -> float | None:
    """Return the ridge (FLOP per byte) of the machine on which both take the same least time; None if one always wins.

    Below it the step with fewer operations is faster, above it the one that reads fewer bytes. Expanded and absorbed V3
    meet at 3.4 for long contexts.
    """
    more, fewer = sorted((one, other), key=lambda step: -step.flops.total)
    if more.flops.total == fewer.flops.total or more.reads.total >= fewer.reads.total:
        return None
    return more.flops.total / fewer.reads.total


def _kept(c: ModelConfig, way: str) -> tuple[int, str, tuple[str, ...]]:
    """Return how many numbers a token leaves in the cache, as a formula, from which keys."""
    if way in ("absorbed", "re-expanded"):
        keys = ("kv_lora_rank", "qk_rope_head_dim")
        return c.latent_width, f"({c.kv_lora_rank} + {c.qk_rope_head_dim})", keys
    key = "num_key_value_heads" if way == "grouped" else "num_attention_heads"
    heads, widths = getattr(c, key), (c.qk_head_dim, c.value_head_dim)
    used = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if way == "grouped":
        used = ("head_dim" if c.head_dim else "hidden_size",)
    return heads * sum(widths), f"{heads} heads × ({widths[0]} + {widths[1]})", (key, *used)


def _up_projection(c: ModelConfig) -> tuple[int, str, tuple[str, ...]]:
    """Return the weights of kv_b_proj: from a latent to every head's key (its part without rope) and value."""
    heads, widths = c.num_attention_heads, (c.qk_nope_head_dim, c.v_head_dim)
    keys = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    return (
        heads * sum(widths) * c.kv_lora_rank,
        f"{heads} heads × ({widths[0]} + {widths[1]}) × {c.kv_lora_rank}",
        keys,
    )


def _products(c: ModelConfig, context: int, way: str) -> list[tuple[str, int, str, tuple[str, ...]]]:
    """Return (part, multiply-adds of one sequence, formula, config keys)."""
    heads, rank = c.num_attention_heads, c.kv_lora_rank
    key, value = (c.latent_width, rank) if way == "absorbed" else (c.qk_head_dim, c.value_head_dim)
    out = []
    if way in ("expanded", "re-expanded"):
        tokens = context if way == "re-expanded" else 1
        count, text, keys = _up_projection(c)
        name = "expand every token" if way == "re-expanded" else "expand the new token"
        out.append((name, tokens * count, f"{tokens:,} × {text}", keys))
    if way == "absorbed":
        for name, width, field in (
            ("query into the latent", c.qk_nope_head_dim, "qk_nope_head_dim"),
            ("output from the latent", c.v_head_dim, "v_head_dim"),
        ):
            used = ("num_attention_heads", field, "kv_lora_rank")
            out.append((name, heads * width * rank, f"{heads} heads × {width} × {rank}", used))
    used = ("num_attention_heads",)
    out += [
        (part, heads * width * context, f"{context:,} × {heads} heads × {width}", used)
        for part, width in (("scores", key), ("mix", value))
    ]
    return out
