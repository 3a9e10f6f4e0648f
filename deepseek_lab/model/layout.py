"""Where every tensor of a published checkpoint belongs in this library's model.

Published files keep each expert's matrices apart; here the experts are stacked. Prediction modules stand there behind
the last layer, as layers of further numbers. Everything else has the same name, behind the prefix "model.". This one
table serves reading, writing and their checks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..config import ModelConfig
from .transformer import Transformer


class Place(NamedTuple):
    """Where a published tensor lives: the name in our state dict, an index into it, and the published shape."""

    name: str
    index: tuple
    shape: tuple[int, ...]
    quantised: bool  # FP8 in the published FP8 checkpoints


def published_layout(config: ModelConfig) -> dict[str, Place]:
    """Return {published name: Place} for every tensor of a model, without allocating the model."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    places = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                places[name] = Place(name, (), tuple(tensor.shape), False)
        elif name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            places.update(_expert_places(name, tuple(tensor.shape), config))
        else:
            narrow = name.endswith(("_proj.weight", "_mqa.weight")) and not name.endswith("eh_proj.weight")
            places[_published(name, config)] = Place(name, (), tuple(tensor.shape), narrow)
    return places


def published_copies(config: ModelConfig) -> dict[str, str]:
    """Return {published name: name in our state dict} of what files repeat for each prediction module."""
    copies = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    return {prefix + name: own for prefix in module_prefixes(config) for name, own in copies.items()}


def module_prefixes(config: ModelConfig) -> list[str]:
    """Return how the published names of each prediction module's tensors begin."""
    return [f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)]


def _published(name: str, config: ModelConfig) -> str:
    """The published name for one in our state dict."""
    if not name.startswith("multi_token."):
        return "model." + name
    _, index, rest = name.split(".", 2)
    return module_prefixes(config)[int(index)] + rest


def _expert_places(name: str, shape: tuple[int, ...], config: ModelConfig):
    prefix, kind = _published(name, config).rsplit(".", 1)
    parts = ["down_proj"] if kind == "down_proj" else ["gate_proj", "up_proj"]  # one above the other
    height = shape[1] // len(parts)
    for expert in range(shape[0]):
        for number, part in enumerate(parts):
            rows = slice(number * height, (number + 1) * height)
            yield f"{prefix}.{expert}.{part}.weight", Place(name, (expert, rows), (height, shape[2]), True)


def check_whole(model: Transformer) -> None:
    """Raise ValueError where a model holds something that its config does not name: a file would lose it."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in Transformer(model.config).state_dict().items()}
    held = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    odd = sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))
    if odd:
        raise ValueError(f"{odd[0]} has shape {held.get(odd[0])} in the model and {wanted.get(odd[0])} by its config; "
                         "a file written by the config would lose that, so change the config too")  # fmt: skip
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.embed_tokens.weight:
        raise ValueError("tie_word_embeddings is set but head and embedding differ; use config.replace("
                         "tie_word_embeddings=False) to keep both")  # fmt: skip


def is_skipped(name: str) -> bool:
    """Whether a tensor is known but not part of a model: stored rope frequencies."""
    return name.endswith("rotary_emb.inv_freq")
