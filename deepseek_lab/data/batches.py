"""Random stretches of a text, the same ones for the same seed, from any step on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """`batches[step]` is [batch, length + 1] int64: inputs are all but the last token, targets all but the first.

    What a step sees depends on `seed` and `step` alone, so a run that resumes at step 700 needs no memory of the first
    699. Iterating yields step 0, 1, 2, ... without end.
    """

    def __init__(self, tokens: Tensor, batch: int, length: int, seed: int = 0):
        if not isinstance(tokens, Tensor):
            raise TypeError(f"Batches got {type(tokens).__name__}; expected a tensor [token]: for texts, "
                            "Batches(data.split(texts)[0], batch, length)")  # fmt: skip
        if tokens.dim() != 1 or len(tokens) < length + 1:
            raise ValueError(f"Batches got tokens of shape {tuple(tokens.shape)}; expected [token] with at least "
                             f"length + 1 = {length + 1} tokens")  # fmt: skip
        if batch < 1 or length < 1:
            raise ValueError(f"Batches got batch={batch}, length={length}; both are at least 1")
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed

    def __getitem__(self, step: int) -> Tensor:
        if step < 0:
            raise IndexError(f"batch {step} does not exist; steps count from 0")
        # Torch's CPU generator reads 32 bits of its seed. This odd multiplier, the golden ratio's share of 2^32, keeps
        # the steps of different seeds millions apart.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + step) % 2**32)
        starts = torch.randint(len(self.tokens) - self.length, (self.batch, 1), generator=generator)
        return self.tokens[starts + torch.arange(self.length + 1)].long()

    def __iter__(self) -> Iterator[Tensor]:
        step = 0
        while True:
            yield self[step]
            step += 1

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    def fingerprint(self) -> str:
        """A short text that differs when text, sizes or seed differ; a checkpoint remembers it."""
        digest = hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest()[:16]
        return f"{digest} batch={self.batch} length={self.length} seed={self.seed}"
