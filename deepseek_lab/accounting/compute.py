"""How many operations a token takes, by part. A multiply-add counts as two."""

from __future__ import annotations

from deepseek_lab.config import ModelConfig

from .decode import decode_step
from .ledger import Ledger, Line, grow
from .shapes import model_weights, refuse_other_than_config

_WEIGHTS = "Insights into DeepSeek-V3 (arXiv 2505.09343), table 2: its MoE rows are met by 2 FLOP per active parameter"
_SCORES = "Insights into DeepSeek-V3, table 2: its MoE rows are met by counting T / 2 keys on average, and T non-causal"
_NOTE = (
    "Active parameters, norms too, without the input embedding, of which a token only reads one row. Softmax, "
    "activation functions and what is computed again are left out."
)


def forward_flops(config: ModelConfig, tokens: int, causal: bool = True, with_mtp: bool = False) -> Ledger:
    """Return the FLOP per token of a forward pass over sequences of `tokens` tokens: a training step's, or a prefill's.

    causal: half of all pairs of tokens are counted; otherwise all of them, as kernels without a mask would compute.
    with_mtp: the multi-token prediction modules too, and the output head once more for each. V3 at 4,096 tokens:
    83.485 GFLOP causal. Raises ValueError for tokens below 1, and for with_mtp on a model without such modules.
    """
    return _flops(config, tokens, causal, with_mtp, passes=1)


def training_flops(config: ModelConfig, tokens: int, causal: bool = True, with_mtp: bool = False) -> Ledger:
    """Return the FLOP per token of forward and backward pass: three times `forward_flops`, whose arguments these are.

    The backward pass multiplies twice for every product, once for the input's gradient and once for the weight's.
    V3 at 4,096 tokens: 250.456 GFLOP causal, 281.158 not; V2: 155.308.
    """
    return _flops(config, tokens, causal, with_mtp, passes=3)


def decode_flops(config: ModelConfig, context: int, way: str | None = None) -> Ledger:
    """Return the FLOP of one decoded token, the last of `context`; `way` reads the cache as in `decode_step`."""
    step = decode_step(config, context, way)
    lines = _weight_lines(config, False, 1, without=("kv_b_proj",))  # the step counts it, in its own way
    layers = config.num_hidden_layers
    for line in step.flops:
        formula, keys = f"{layers} layers × {line.formula}", ("num_hidden_layers", *line.keys)
        lines.append(
            (f"attention/{line.part}", Line(line.part, layers * line.amount, "FLOP", formula, keys, line.source))
        )
    return grow(f"FLOP of one decoded token, {step.way}", lines, _NOTE)


def _flops(c: ModelConfig, tokens: int, causal: bool, with_mtp: bool, passes: int) -> Ledger:
    refuse_other_than_config(c)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens={tokens!r}; choose a whole number >= 1")
    lines = _weight_lines(c, with_mtp, passes)
    layers = c.num_hidden_layers + (c.num_nextn_predict_layers if with_mtp else 0)
    keys = ("num_hidden_layers", *(("num_nextn_predict_layers",) if with_mtp else ()), "num_attention_heads")
    half, before = (" / 2" if causal else ""), f"{passes} passes × " if passes > 1 else ""
    latent = c.uses_latent_attention
    key_keys = ("qk_nope_head_dim", "qk_rope_head_dim") if latent else ("head_dim" if c.head_dim else "hidden_size",)
    sides = (("scores", c.qk_head_dim, key_keys), ("mix", c.value_head_dim, ("v_head_dim",) if latent else key_keys))
    for part, width, used in sides:
        amount = passes * 2 * layers * c.num_attention_heads * width * tokens // (2 if causal else 1)
        text = f"{before}2 × {layers} layers × {c.num_attention_heads} heads × {width} × {tokens:,} tokens{half}"
        lines.append((f"attention/{part}", Line(part, amount, "FLOP", text, (*keys, *used), _SCORES)))
    return grow(f"FLOP per token, {'training' if passes > 1 else 'forward'}", lines, _NOTE)


def _weight_lines(c: ModelConfig, with_mtp: bool, passes: int, without: tuple[str, ...] = ()) -> list[tuple[str, Line]]:
    """Return two FLOP for every parameter that a token multiplies, by the weight's path."""
    before = f"{passes} passes × 2 × " if passes > 1 else "2 × "
    heads = 1 + c.num_nextn_predict_layers if with_mtp else 1
    lines = []
    for w in model_weights(c, with_mtp):
        if w.kind == "embedding" or w.name in without:
            continue
        times = heads if w.kind in ("head", "tied") else 1
        text, keys = f"{before}{f'{times} predictions × ' if times > 1 else ''}{w.formula(active=True)}", w.keys
        keys = (*keys, "num_nextn_predict_layers") if times > 1 else keys
        lines.append((w.part, Line(w.name, passes * 2 * times * w.elements(active=True), "FLOP", text, keys, _WEIGHTS)))
    return lines
