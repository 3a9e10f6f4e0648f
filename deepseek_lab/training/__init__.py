"""One step at a time, as records."""

from .loop import StepRecord, evaluate, next_token_loss, train
from .optimizer import Recipe, make_optimizer

__all__ = ["Recipe", "StepRecord", "evaluate", "make_optimizer", "next_token_loss", "train"]
