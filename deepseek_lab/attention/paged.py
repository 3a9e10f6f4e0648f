"""A latent cache whose tokens lie in the blocks of a pool: see `pool` for what that saves."""

from __future__ import annotations

import torch
from torch import Tensor

from .caches import check_length, check_new
from .pool import BlockPool


class PagedCache:
    """A batch of sequences in a BlockPool, of equal or different lengths.

    Read as a whole it is [batch, slot, latent + rope] with the newest tokens of all sequences in the last slots, where
    causal attention expects them; shorter sequences have zeros in front, which `hidden()` marks.

        cache = PagedCache(pool, batch=2)
        cache.append(joint, tokens=[5, 3])    # of the second sequence the last 3 tokens are real
        answers = cache.fork(0, 0, 0)         # three continuations of the first, which is stored once

    Blocks come back with `free`, not when a cache is forgotten: the pool may outlive it.
    Raises OutOfBlocks when the pool is full and ValueError for what does not fit or was freed; both change nothing.
    """

    def __init__(self, pool: BlockPool, batch: int = 1):
        self.pool = pool
        self.sequences = [pool.start() for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.pool.sequences[number].length for number in self.sequences]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, which is how many slots `view` has."""
        return max(self.lengths, default=0)

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def kv_lora_rank(self) -> int:
        """Numbers of a latent; the rope key is what follows them."""
        return self.pool.config.kv_lora_rank

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tokens would take without sharing."""
        return sum(self.lengths) * self.pool.bytes_per_token

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the blocks that the sequences name; one that several name counts once."""
        blocks = {block for number in self.sequences for block in self.pool.sequences[number].table}
        return len(blocks) * self.pool.block_size * self.pool.bytes_per_token

    def append(self, *joint: Tensor, tokens: list[int] | None = None) -> Tensor:
        """Store [batch, token, latent + rope] and return all tokens so far; `tokens` as in `store`."""
        self.store(*joint, tokens=tokens)
        return self.view()[0]

    def store(self, *joint: Tensor, tokens: list[int] | None = None) -> None:
        """Store [batch, token, latent + rope] behind each sequence.

        tokens: how many are real in each row, the last ones; padding on the left is not stored. None: all of them.
        """
        self._refuse_freed()
        expected = [(len(self.sequences), self.pool.config.latent_width)]
        stored = torch.float32 if self.pool.layout == "latent_fp8" else self.pool.dtype
        (new,) = check_new(self, joint, expected, stored)
        longest = new.shape[1]
        tokens = [longest] * len(new) if tokens is None else list(tokens)
        if len(tokens) != len(new) or not all(isinstance(n, int) and 0 <= n <= longest for n in tokens):
            raise ValueError(f"PagedCache.append got tokens={tokens} for {len(new)} sequences of {longest} new tokens; "
                             "expected for each how many of them are real")  # fmt: skip
        before = self.lengths
        try:
            self.pool.extend(dict(zip(self.sequences, tokens, strict=True)))
            for row, number, n in zip(new, self.sequences, tokens, strict=True):
                if n:
                    self.pool.write(self.pool.slots(number, self.pool.sequences[number].length - n), row[-n:])
        except BaseException:  # Ctrl-C too: no sequence keeps slots that nobody wrote
            for number, length in zip(self.sequences, before, strict=True):
                self.pool.truncate(number, length)
            raise

    def slots(self) -> Tensor:
        """Return where every token lies in the pool's storage [batch, slot] int64; -1 in front of shorter sequences."""
        self._refuse_freed()
        rows = torch.full((len(self.sequences), self.length), -1, device=self.pool.storage.device)
        for row, number, length in zip(rows, self.sequences, self.lengths, strict=True):
            row[self.length - length :] = self.pool.slots(number)
        return rows

    def hidden(self) -> Tensor:
        """Return [batch, slot], True where a slot of `view` holds no token."""
        return self.slots() < 0

    def view(self) -> list[Tensor]:
        """Return all tokens [batch, slot, latent + rope], gathered from their blocks: a copy."""
        slots = self.slots()
        joint = self.pool.read(slots.clamp(min=0))
        return [joint.masked_fill(slots[..., None] < 0, 0) if len(set(self.lengths)) > 1 else joint]

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Keep the first `length` slots of `view`, or the first `length` tokens of one sequence of the batch.

        For the whole batch every sequence loses as many of its newest tokens as the longest does.
        """
        self._refuse_freed()
        if sequence is not None:
            number = self._number(sequence)
            self.pool.truncate(number, check_length(self, length, self.pool.sequences[number].length))
            return
        lost = self.length - check_length(self, length, self.length)
        for number, own in zip(self.sequences, self.lengths, strict=True):
            self.pool.truncate(number, max(own - lost, 0))

    def fork(self, *sequences: int) -> PagedCache:
        """Return a cache that shares the blocks of these sequences of the batch (any number of times), or of all."""
        self._refuse_freed()
        numbers = [self._number(s) for s in sequences] or self.sequences
        twin = PagedCache(self.pool, batch=0)
        twin.sequences = [self.pool.fork(number) for number in numbers]
        return twin

    def free(self, *sequences: int) -> None:
        """Give back the blocks of these sequences, which leave the batch, or of all: the cache has ended then."""
        self._refuse_freed()
        gone = {self._number(s) for s in sequences} or set(self.sequences)
        for number in gone:
            self.pool.free(number)
        self.sequences = [number for number in self.sequences if number not in gone]

    def _number(self, sequence: int) -> int:
        if sequence not in range(len(self.sequences)):
            raise ValueError(f"this PagedCache holds {len(self.sequences)} sequences, there is no sequence "
                             f"{sequence!r}; was it freed?")  # fmt: skip
        return self.sequences[sequence]

    def _refuse_freed(self) -> None:
        if not self.sequences:
            raise ValueError("this PagedCache was freed, it has no sequences any more; make a new one on its pool")
