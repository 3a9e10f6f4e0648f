"""Two phases: read the prompt at once (prefill), then write one token at a time (decode)."""

from .decode import first_difference, generate, sample

__all__ = ["first_difference", "generate", "sample"]
