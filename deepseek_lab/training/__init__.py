"""One step at a time, as records."""

from .loop import StepRecord, evaluate, next_token_loss, train
from .optimizer import averaged, make_optimizer
from .recipe import Recipe

__all__ = ["Recipe", "StepRecord", "averaged", "evaluate", "make_optimizer", "next_token_loss", "train"]
