"""How many bytes a model's weights and its cache take, to the byte.

A value in FP8 is not one byte: its scale, and what stays in a wider format beside it, are counted too.
"""

from __future__ import annotations

from deepseek_lab.config import ModelConfig

from .ledger import Ledger, Line, grow
from .shapes import Weight, model_weights, refuse_other_than_config

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LAYOUTS = ("expanded", "grouped", "latent", "latent_fp8")
BLOCK = 128  # side of a weight block that shares one scale
TILE = 128  # cached latent values that share one scale

_FP8_WEIGHTS = "DeepSeek-V3 repository, README_WEIGHTS.md: E4M3 codes, one FP32 weight_scale_inv per 128 x 128 block"
_KEPT = "DeepSeek-V3 repository, README_WEIGHTS.md: embedding, head, norms, gate and eh_proj stay in BF16"
_BIAS = "safetensors metadata of deepseek-ai/DeepSeek-V3: the correction bias is FP32"
_CACHE_SOURCES = {
    "expanded": "DeepSeek-V2 report, table 1 (MHA): every query head keeps its own key and value",
    "grouped": "DeepSeek-V2 report, table 1 (GQA)",
    "latent": "DeepSeek-V2 report, table 1 (MLA); Insights into DeepSeek-V3 (arXiv 2505.09343), table 1",
    "latent_fp8": "FlashMLA repository, README.md: FP8 codes, an FP32 scale per 128, rope key in BF16",
}


def weights(config: ModelConfig, dtype: str = "bf16", with_mtp: bool = False) -> Ledger:
    """Return the bytes of a model's weights, part by part.

    dtype: "fp32", "bf16", "fp16", or "fp8" for the layout of the published V3 checkpoint: E4M3 codes and one FP32 scale
    per 128 x 128 block (ragged ones count whole) for the linear layers, BF16 for embedding, head, norms, gates, biases.
    The correction bias is FP32 in every dtype. with_mtp: as in the published files, which repeat embedding and head.

    V3 without MTP: 673,150,611,808 bytes in FP8, 1,342,052,868,096 in BF16. Raises ValueError for an unknown dtype.
    """
    if dtype not in (*BYTES, "fp8"):
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join((*BYTES, 'fp8'))}")
    lines = ((w.part, _weight_entry(w, dtype)) for w in model_weights(config, with_mtp, copies=True))
    own_layout = dtype != "fp8" or config.model_type == "deepseek_v3"
    note = "" if own_layout else "The layout of the published V3 checkpoint, applied to this model's shapes."
    return grow(f"weights, {dtype}", lines, note)


def checkpoint_elements(config: ModelConfig, with_mtp: bool = False) -> Ledger:
    """Return how many elements of each dtype the FP8 checkpoint holds, by safetensors' names: F8_E4M3, F32, BF16.

    V3 with its MTP module: 680,571,043,840 + 41,555,600 + 3,918,786,560 = 684,531,386,000, as its metadata say.
    """
    all_weights = model_weights(config, with_mtp, copies=True)
    lines = []
    for w in all_weights:
        dtype = {"linear": "F8_E4M3", "correction bias": "F32"}.get(w.kind, "BF16")
        lines.append((f"{dtype}/{w.part}", Line(w.name, w.elements(), "elements", w.formula(), w.keys, w.source)))
    for w in (w for w in all_weights if w.kind == "linear"):
        line = Line(w.name, w.blocks(), "elements", w.formula(_blocks_text(w)), w.keys, _FP8_WEIGHTS)
        lines.append((f"F32/scales/{w.part}", line))
    order = ("F8_E4M3", "BF16", "F32")
    return grow(
        "elements of the FP8 checkpoint", sorted(lines, key=lambda line: order.index(line[0].partition("/")[0]))
    )


def kv_cache(
    config: ModelConfig,
    tokens: int,
    batch: int = 1,
    layout: str | None = None,
    dtype: str = "bf16",
    with_mtp: bool = False,
    block_size: int = 1,
) -> Ledger:
    """Return the bytes of the key-value cache for `batch` sequences of `tokens` tokens each.

    layout, in values per token and layer:
    - "expanded": every head its own key and value: heads x (qk_head_dim + v_head_dim);
    - "grouped": 2 x num_key_value_heads x head_dim (Llama, Qwen);
    - "latent": kv_lora_rank + qk_rope_head_dim (DeepSeek);
    - "latent_fp8": the latent as FP8 codes with an FP32 scale per 128, the rope key in BF16 (656 bytes in V3);
    - None: "latent" or "grouped", whichever the model has.
    dtype: "bf16", "fp16" or "fp32". with_mtp: the MTP modules keep a cache as well. V3, latent: 70,272 bytes per token.
    block_size: tokens per block of a paged cache, where each sequence takes whole blocks and shares none.
    Raises ValueError for a layout that the model cannot have, naming those it can.
    """
    refuse_other_than_config(config)
    layout = layout or default_layout(config)
    reason = why_not(config, layout)
    if reason:
        raise ValueError(reason)
    if dtype not in BYTES or (layout == "latent_fp8" and dtype != "bf16"):
        own = "leave it out: latent_fp8 fixes its own types"
        advice = own if dtype in BYTES else f"choose one of {', '.join(BYTES)}"
        fp8 = "; FP8 exists as layout='latent_fp8'" if dtype == "fp8" else ""
        raise ValueError(f"dtype={dtype!r} does not go with layout={layout!r}; {advice}{fp8}")
    for name, value, least in (("tokens", tokens, 0), ("batch", batch, 1), ("block_size", block_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}; choose a whole number >= {least}")
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if with_mtp else 0)
    keys = ("num_hidden_layers", *(("num_nextn_predict_layers",) if with_mtp else ()))
    blocks = -(-tokens // block_size)
    room = ((tokens, "token"),) if block_size == 1 else ((blocks, "block"), (block_size, "token"))
    before = " × ".join(_plural(n, word) for n, word in ((batch, "sequence"), *room, (layers, "layer")))
    copies = batch * blocks * block_size * layers
    lines = [
        Line(part, copies * size, "bytes", f"{before} × {text}", (*keys, *used), _CACHE_SOURCES[layout])
        for part, size, text, used in _per_token_and_layer(config, layout, dtype)
    ]
    return Ledger(f"cache, {layout}", tuple(lines))


def default_layout(config: ModelConfig) -> str:
    """Return the cache that the model was made for: "latent" or "grouped"."""
    return "latent" if config.uses_latent_attention else "grouped"


def why_not(config: ModelConfig, layout: str) -> str:
    """Return why the model cannot have this cache layout, with what works instead; empty where it can."""
    if layout not in LAYOUTS:
        paged = "; for a paged one pass block_size=64 beside it" if layout == "paged" else ""
        return f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}{paged}"
    if config.uses_latent_attention and layout == "grouped":
        return (
            "layout='grouped' needs heads that share keys; this model has latent attention (kv_lora_rank="
            f"{config.kv_lora_rank}); choose 'latent', 'latent_fp8' or 'expanded'"
        )
    if not config.uses_latent_attention and layout.startswith("latent"):
        return (
            f"layout={layout!r} needs a latent (kv_lora_rank); this model has grouped heads (num_key_value_heads="
            f"{config.num_key_value_heads}); choose 'grouped' or 'expanded'"
        )
    return ""


def _per_token_and_layer(c: ModelConfig, layout: str, dtype: str) -> list[tuple[str, int, str, tuple[str, ...]]]:
    """Return (part, bytes, formula, config keys) of what one token leaves in one layer."""
    size = BYTES[dtype]
    if layout == "latent_fp8":
        tiles = -(-c.kv_lora_rank // TILE)
        return [
            ("latent codes", c.kv_lora_rank, f"{c.kv_lora_rank} × 1 byte", ("kv_lora_rank",)),
            ("latent scales", tiles * 4, f"⌈{c.kv_lora_rank} / {TILE}⌉ × 4 bytes", ("kv_lora_rank",)),
            ("rope key", c.qk_rope_head_dim * 2, f"{c.qk_rope_head_dim} × 2 bytes", ("qk_rope_head_dim",)),
        ]
    if layout == "latent":
        return [
            ("latent", c.kv_lora_rank * size, f"{c.kv_lora_rank} × {size} bytes", ("kv_lora_rank",)),
            ("rope key", c.qk_rope_head_dim * size, f"{c.qk_rope_head_dim} × {size} bytes", ("qk_rope_head_dim",)),
        ]
    heads_key = "num_attention_heads" if layout == "expanded" else "num_key_value_heads"
    heads, latent = getattr(c, heads_key), c.uses_latent_attention
    key_keys = ("qk_nope_head_dim", "qk_rope_head_dim") if latent else ("head_dim" if c.head_dim else "hidden_size",)
    value_keys = ("v_head_dim",) if latent else key_keys
    sides = (("keys", c.qk_head_dim, key_keys), ("values", c.value_head_dim, value_keys))
    return [
        (part, heads * width * size, f"{heads} heads × {width} × {size} bytes", (heads_key, *used))
        for part, width, used in sides
    ]


def _weight_entry(w: Weight, dtype: str) -> Line | Ledger:
    """Return the bytes of one weight: a line, or for FP8 a small ledger of codes and scales."""
    if w.kind == "correction bias":
        return Line(w.name, w.elements() * 4, "bytes", f"{w.formula()} × 4 bytes", w.keys, _BIAS)
    if dtype != "fp8":
        text = f"{w.formula()} × {BYTES[dtype]} bytes"
        return Line(w.name, w.elements() * BYTES[dtype], "bytes", text, w.keys, w.source)
    if w.kind != "linear":
        return Line(w.name, w.elements() * 2, "bytes", f"{w.formula()} × 2 bytes", w.keys, _KEPT)
    scales = f"{w.formula(_blocks_text(w))} × 4 bytes"
    return Ledger(
        w.name,
        (
            Line("codes", w.elements(), "bytes", f"{w.formula()} × 1 byte", w.keys, _FP8_WEIGHTS),
            Line("scales", w.blocks(BLOCK) * 4, "bytes", scales, w.keys, _FP8_WEIGHTS),
        ),
    )


def _plural(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def _blocks_text(w: Weight) -> str:
    return " × ".join(f"⌈{width:,} / {BLOCK}⌉" for width in w.shape)
