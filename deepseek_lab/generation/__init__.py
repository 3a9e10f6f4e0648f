"""Two phases: read the prompt at once (prefill), then write one token at a time (decode), or several (speculate)."""

from .decode import first_difference, generate, sample
from .speculative import Speculation, SpeculationStep, speculate

__all__ = ["Speculation", "SpeculationStep", "first_difference", "generate", "sample", "speculate"]
