"""Random stretches of a text, the same ones for the same seed, from any step on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from numbers import Integral

import torch
from torch import Tensor


class Batches:
    """`batches[step]` is [batch, length + 1] int64: inputs are all but the last token, targets all but the first.

    What a step sees depends on `seed` and `step` alone, so a run that resumes at step 700 needs no memory of the first
    699. Iterating yields step 0, 1, 2, ... without end.
    """

    def __init__(self, tokens: Tensor, batch: int, length: int, seed: int = 0):
        for name, number in (("batch", batch), ("length", length), ("seed", seed)):
            if not isinstance(number, Integral):
                raise TypeError(f"Batches got {name}={number!r}; expected a whole number")
        if batch < 1 or length < 1:
            raise ValueError(f"Batches got batch={batch}, length={length}; both are at least 1")
        self.tokens = check_tokens(tokens, "Batches", length)
        self.batch, self.length, self.seed = int(batch), int(length), int(seed)

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
        digest = hashlib.sha256(self.tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        return f"{digest} batch={self.batch} length={self.length} seed={self.seed}"


def check_tokens(tokens: Tensor, asking: str, length: int) -> Tensor:
    """Return tokens [token] of a text; TypeError or ValueError, in the name of who asks, for what are none.

    length: of the stretches that are to be read; each has one token more.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{asking} got {type(tokens).__name__}; expected a tensor [token]: for texts, "
                        "Batches(data.split(texts)[0], batch, length)")  # fmt: skip
    if tokens.dim() != 1 or len(tokens) < length + 1:
        raise ValueError(f"{asking} got tokens of shape {tuple(tokens.shape)}; expected [token] with at least "
                         f"length + 1 = {length + 1} tokens")  # fmt: skip
    whole = tokens.long()
    odd = tokens.isnan() if tokens.is_floating_point() else whole < 0
    if odd.any():
        place = int(odd.int().argmax())
        raise ValueError(f"{asking} got token {tokens[place].item()} at place {place}; tokens count from 0, was the "
                         "text encoded with a tokenizer?")  # fmt: skip
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{asking} got tokens of {tokens.dtype}; expected whole numbers, such as torch.int64")
    return tokens
