"""One step at a time, as records."""

from .loop import StepRecord, evaluate, train
from .optimizer import Recipe

__all__ = ["Recipe", "StepRecord", "evaluate", "train"]
