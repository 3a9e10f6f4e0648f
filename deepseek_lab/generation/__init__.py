"""Two phases: read the prompt at once (prefill), then write one token at a time (decode)."""

from .decode import generate, sample

__all__ = ["generate", "sample"]
