"""Trained models that come with the course: a few MB each, with a card that says how they were made.

`load("tiny")` returns the model, `card("tiny")` what is claimed of it. `python -m deepseek_lab.checkpoints` makes them
anew from text that is on every disk; a test measures the loss again that the card claims.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..model import Transformer, load_hf

NAMES = ("tiny",)


def directory(name: str) -> Path:
    """Return where a shipped checkpoint lies. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"there is no shipped checkpoint {name!r}; choose one of {', '.join(NAMES)}")
    return Path(__file__).parent / name


def load(name: str) -> Transformer:
    """Return a shipped model with float32 weights, in evaluation mode."""
    return load_hf(directory(name))


def card(name: str) -> dict:
    """Return the card of a shipped model: recipe, seed, text, losses, sizes."""
    return json.loads((directory(name) / "card.json").read_text(encoding="utf-8"))
