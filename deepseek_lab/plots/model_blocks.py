"""The blocks of a model, and the tensors of each: names as in published checkpoints, amounts from `accounting`.

A piece is what one role holds in one place: "attention" in the dense layers is one, "attention" in the expert layers
another. A block collects the pieces of one role, or of one place, or all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from deepseek_lab.accounting import weights
from deepseek_lab.accounting.shapes import Weight, model_weights, refuse_other_than_config
from deepseek_lab.config import ModelConfig

WHOLE, DENSE, EXPERT, FINAL, MODULE = "whole model", "dense layers", "expert layers", "final norm", "prediction module"
_INSIDE, _FINAL_NORM, _MODULE_NORMS = "multi-token prediction/", "norms/final", "norms/enorm, hnorm, shared_head.norm"
_NAMES = {
    "embedding": ["model.embed_tokens.weight"],
    "embedding and output head": ["model.embed_tokens.weight"],
    "output head": ["lm_head.weight"],
    _FINAL_NORM: ["model.norm.weight"],
    "norms/before attention and feed-forward": ["input_layernorm.weight", "post_attention_layernorm.weight"],
    _MODULE_NORMS: ["enorm.weight", "hnorm.weight", "shared_head.norm.weight"],
    "experts/gate": ["mlp.gate.weight"],
    "experts/correction bias": ["mlp.gate.e_score_correction_bias"],
    "copy of the embedding": ["embed_tokens.weight"],
    "copy of the output head": ["shared_head.head.weight"],
}
_NETWORKS = {"dense feed-forward": "mlp", "experts/shared experts": "mlp.shared_experts"}
#: What the names of a role's tensors in a layer have in common.
_ALL_OF = {
    "norms": "*_layernorm.weight",
    "attention": "self_attn.*",
    "dense feed-forward": "mlp.*",
    "gate": "mlp.gate.*",
    "shared experts": "mlp.shared_experts.*",
    "routed experts": "mlp.experts.*",
}


@dataclass(frozen=True)
class Row:
    """Tensors of one name: how many, the shape of each, and of all their numbers, bytes and FLOP for one token.

    stored: bytes in the FP8 layout of V3's files. plain: bytes in BF16. flops: two for each number that a token uses.
    """

    name: str
    shape: tuple[int, ...]
    tensors: int
    elements: int
    stored: int
    plain: int
    flops: int


@dataclass(frozen=True)
class Piece:
    """A row with the role and the place that it belongs to, and the numbers of the first and the last of its layers."""

    role: str
    place: str
    layers: tuple[int, int] | None
    row: Row


@lru_cache(maxsize=8)
def pieces(config: ModelConfig) -> tuple[Piece, ...]:
    """Return all that a model's files hold, in the order in which a token meets it."""
    refuse_other_than_config(config)
    with_mtp = config.num_nextn_predict_layers > 0
    stored, plain = (weights(config, dtype, with_mtp) for dtype in ("fp8", "bf16"))
    out = []
    for weight in model_weights(config, with_mtp, copies=True):
        role, names = _role(weight), _names(weight, config)
        # Embeddings are read, not multiplied: a token takes one row.
        used = 0 if weight.kind == "embedding" else weight.elements(active=True)
        whole = (weight.elements(), stored[weight.part].total, plain[weight.part].total, 2 * used)
        for place, layers in _places(weight, config).items():
            here, parts = layers[1] - layers[0] + 1 if layers else 1, (weight.layers or 1) * len(names)
            for name in names:
                shape = weight.shape[::-1] if name.endswith("down_proj.weight") else weight.shape
                amounts = [amount * here // parts for amount in (weight.tensors(), *whole)]
                out.append(Piece(role, place, layers, Row(name, shape, *amounts)))
    return tuple(sorted(out, key=_depth))


def block_names(config: ModelConfig) -> list[str]:
    """Return the names of the blocks that this model has: the whole, its places and the roles in them."""
    ends = ["embedding", "embedding and output head", "layers", DENSE, EXPERT, *_ALL_OF, FINAL, "output head", MODULE]
    found = {name for piece in pieces(config) for name in (piece.place, piece.role)}
    return [WHOLE, *(name for name in ends if name in found)]


def block(config: ModelConfig, name: str) -> list[Piece]:
    """Return the pieces of a block. Raises ValueError for one that the model does not have, naming those it has."""
    if name not in block_names(config):
        raise ValueError(f"block={name!r} is not in this model; choose one of {', '.join(block_names(config))}")
    return [p for p in pieces(config) if name in (WHOLE, p.place) or (name == p.role and p.place != MODULE)]


def rows(config: ModelConfig, name: str) -> list[Row]:
    """Return the tensors of a block by their full names; what consists of several roles, role by role."""
    found = block(config, name)
    numbers = [number for piece in found for number in piece.layers or ()]
    groups: dict[str, list[Row]] = {}
    for piece in found:
        span = piece.layers if name == WHOLE else piece.layers and (min(numbers), max(numbers))
        groups.setdefault(_label(piece, name, span), []).append(piece.row)
    return [together(label, parts) for label, parts in groups.items()]


def together(name: str, parts: list[Row]) -> Row:
    """Return several rows as one; it keeps their shape where they have one name."""
    sums = [sum(getattr(row, field) for row in parts) for field in ("tensors", "elements", "stored", "plain", "flops")]
    same = {(row.name, row.shape) for row in parts}
    return Row(name, parts[0].shape if len(same) == 1 else (), *sums)


def span_text(first: int, last: int) -> str:
    return f"{first}" if first == last else f"[{first}\N{EN DASH}{last}]"


def _label(piece: Piece, name: str, span: tuple[int, int] | None) -> str:
    if span is None:
        return piece.row.name
    layer = f"model.layers.{span_text(*span)}."
    if name == WHOLE:
        return f"{layer}*"
    if name == MODULE and _ALL_OF.get(piece.role, "").startswith("mlp."):
        return f"{layer}mlp.*"
    return layer + (_ALL_OF.get(piece.role, piece.row.name) if name == piece.place else piece.row.name)


def _role(weight: Weight) -> str:
    """Return what a weight does in a layer; else its own name, or that of the module in which it stands."""
    part = weight.part.removeprefix(_INSIDE)
    first, _, last = part.partition("/")
    if first == "experts":
        return "gate" if last == "correction bias" else last
    if first in _ALL_OF and part not in (_FINAL_NORM, _MODULE_NORMS):
        return first
    return MODULE if part != weight.part else FINAL if part == _FINAL_NORM else part


def _names(weight: Weight, config: ModelConfig) -> list[str]:
    """Return the names of a weight's tensors, behind that of their layer where they stand in one."""
    part = weight.part.removeprefix(_INSIDE)
    if part in _NAMES:
        return _NAMES[part]
    first, _, last = part.partition("/")
    if first == "attention":
        return [f"self_attn.{last.removesuffix(' bias')}.{'bias' if weight.kind == 'bias' else 'weight'}"]
    if part == "experts/routed experts":
        network = f"mlp.experts.{span_text(0, config.n_routed_experts - 1)}"
    elif part in _NETWORKS:
        network = _NETWORKS[part]
    else:
        return [f"{part}.weight"]
    return [f"{network}.{side}_proj.weight" for side in ("gate", "up", "down")]


def _places(weight: Weight, config: ModelConfig) -> dict[str, tuple[int, int] | None]:
    """Return the places where tensors of this weight stand, each with the numbers of its first and last layer."""
    dense, count = config.num_dense_layers, config.num_hidden_layers
    if weight.part.startswith(_INSIDE):
        return {MODULE: (count, count + config.num_nextn_predict_layers - 1)}
    if weight.layers is None:
        return {_role(weight): None}
    if not config.n_routed_experts:
        return {"layers": (0, count - 1)}
    stacks = {DENSE: (0, dense - 1), EXPERT: (dense, count - 1)}
    without = {"dense feed-forward": EXPERT, "experts": DENSE}.get(weight.part.partition("/")[0])
    return {name: (first, last) for name, (first, last) in stacks.items() if first <= last and name != without}


def _depth(piece: Piece) -> int:
    """Sort by place: what stands before the layers, the layers, what stands behind them."""
    if piece.place == MODULE:
        return 4
    return 3 if piece.place in (FINAL, "output head") else 1 + (piece.place == EXPERT) if piece.layers else 0
