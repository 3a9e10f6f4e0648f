"""Memory in pages: blocks of 64 tokens from one pool, handed out when they are needed.

A contiguous cache must reserve room for the longest text a sequence could become. A paged one takes a block when the
last is full, so at most one block per sequence is partly empty, and what two sequences have in common is stored once:

block table       which blocks hold a sequence, in order
reference count   how many tables name a block
fork              copies the table, not the blocks; who first writes into a shared block gets a copy of it

Every layer has a pool of its own here. (Serving engines keep one table for all layers and a pool with a layer axis: all
layers store the same tokens, so their tables are equal.) Source: PagedAttention (arXiv 2309.06180); blocks of 64 as in
FlashMLA.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig
from .caches import new_buffer
from .fp8_cache import Fp8Latent, packed_width

BLOCK_SIZE = 64


class OutOfBlocks(RuntimeError):
    """The pool has fewer free blocks than are needed; nothing was stored."""


@dataclass
class Sequence:
    """A text in the pool: the blocks that hold it, in order, and how many tokens that is."""

    table: list[int] = field(default_factory=list)
    length: int = 0


class Block(NamedTuple):
    """What is in one block: the sequences that name it and how many of its slots hold a token of one of them."""

    index: int
    owners: tuple[int, ...]
    references: int
    filled: int


class Usage(NamedTuple):
    """What a pool holds. Slots are places for one token."""

    free_blocks: int
    used_blocks: int
    shared_blocks: int  # named by more than one table
    allocated_slots: int  # those of the used blocks
    filled_slots: int
    stored_tokens: int  # lengths of all sequences together: more than filled slots where they share

    @property
    def fragmentation(self) -> float:
        """Share of the allocated slots that hold no token."""
        return 1 - self.filled_slots / self.allocated_slots if self.allocated_slots else 0.0


class BlockPool:
    """Blocks of one layer, `block_size` tokens each, for any number of sequences.

    layout: "latent" in `dtype`, or "latent_fp8" (656 bytes per token in V3), which is read as `dtype`.
    grows: make more blocks when they run out, as other caches do, instead of raising OutOfBlocks.
    storage: [block, slot, latent + rope] in `dtype`, or [block, slot, bytes] uint8. Sequences have numbers and are made
    by a PagedCache. Raises ValueError for a model without a latent and for other layouts.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int = BLOCK_SIZE,
        dtype=torch.float32,
        device="cpu",
        layout: str = "latent",
        grows: bool = False,
    ):
        if layout not in ("latent", "latent_fp8") or not config.uses_latent_attention:
            heads = "latent attention" if config.uses_latent_attention else "grouped heads"
            raise ValueError(f"BlockPool got layout={layout!r} for a model with {heads}; it holds 'latent' or "
                             "'latent_fp8', which need a latent (kv_lora_rank)")  # fmt: skip
        if min(blocks, block_size) < 1:
            raise ValueError(f"BlockPool got blocks={blocks} and block_size={block_size}; both must be at least 1")
        self.config, self.layout, self.dtype, self.block_size = config, layout, dtype, block_size
        width, kind = (config.latent_width, dtype) if layout == "latent" else (packed_width(config), torch.uint8)
        self.storage = new_buffer((blocks, block_size, width), kind, device)
        self.sequences: dict[int, Sequence] = {}
        self.references = [0] * blocks
        self._free = list(reversed(range(blocks)))  # the lowest number is taken first
        self._numbers, self._grows = count(), grows

    def start(self) -> int:
        """Begin an empty sequence and return its number."""
        number = next(self._numbers)
        self.sequences[number] = Sequence()
        return number

    def fork(self, number: int) -> int:
        """Return the number of a new sequence that shares all blocks of this one."""
        old, new = self.sequences[number], self.start()
        self.sequences[new] = Sequence(list(old.table), old.length)
        for block in old.table:
            self.references[block] += 1
        return new

    def truncate(self, number: int, length: int) -> None:
        """Keep the first `length` tokens of a sequence and give back the blocks behind them."""
        sequence = self.sequences[number]
        kept = -(-length // self.block_size)
        for block in sequence.table[kept:]:
            self._release(block)
        del sequence.table[kept:]
        sequence.length = length

    def free(self, number: int) -> None:
        """End a sequence: blocks that no other one names are free again."""
        self.truncate(number, 0)
        del self.sequences[number]

    def extend(self, tokens: dict[int, int]) -> None:
        """Give every sequence (number: how many new tokens) blocks that it alone may write into.

        Raises OutOfBlocks, before anything changes, if there are too few.
        """
        needed = self._needed(tokens)
        if needed > len(self._free) and self._grows:
            self._grow(max(needed, len(self.references)))
        if needed > len(self._free):
            raise OutOfBlocks(f"{needed} new blocks of {self.block_size} tokens are needed, {len(self._free)} of "
                              f"{len(self.references)} are free; free a sequence or make a larger pool")  # fmt: skip
        for number, new in tokens.items():
            sequence = self.sequences[number]
            filled = sequence.length % self.block_size
            if new and filled and self.references[sequence.table[-1]] > 1:  # copy on write
                shared = sequence.table[-1]
                self.storage[self._free[-1], :filled] = self.storage[shared, :filled]
                sequence.table[-1] = self._take()
                self._release(shared)
            sequence.length += new
            while len(sequence.table) * self.block_size < sequence.length:
                sequence.table.append(self._take())

    def _needed(self, tokens: dict[int, int]) -> int:
        """How many blocks `extend` would take: for what does not fit, and for copies of blocks that are shared."""
        needed, writers = 0, Counter()
        for number, new in tokens.items():
            sequence = self.sequences[number]
            needed += -(-(sequence.length + new) // self.block_size) - len(sequence.table)
            if new and sequence.length % self.block_size:
                writers[sequence.table[-1]] += 1
        # Of all who name a block, the last one may write into it without a copy.
        return needed + sum(min(n, self.references[block] - 1) for block, n in writers.items())

    def slots(self, number: int, start: int = 0) -> Tensor:
        """Return where the tokens of a sequence from `start` on lie in the storage [block * slot]: [token] int64."""
        sequence, first = self.sequences[number], start // self.block_size
        table = torch.tensor(sequence.table[first:], dtype=torch.int64, device=self.storage.device)
        within = torch.arange(self.block_size, device=self.storage.device)
        slots = (table[:, None] * self.block_size + within).flatten()
        return slots[start - first * self.block_size : sequence.length - first * self.block_size]

    def _grow(self, blocks: int) -> None:
        old, storage = len(self.references), self.storage
        larger = new_buffer((old + blocks, *storage.shape[1:]), storage.dtype, storage.device)
        larger[:old] = storage[:old]
        self.storage = larger
        self.references += [0] * blocks
        self._free = [*reversed(range(old, old + blocks)), *self._free]

    def _take(self) -> int:
        block = self._free.pop()
        self.references[block] = 1
        return block

    def _release(self, block: int) -> None:
        self.references[block] -= 1
        if not self.references[block]:
            self._free.append(block)

    # What is read and shown ---------------------------------------------------------------------------------------

    def write(self, slots: Tensor, joint: Tensor) -> None:
        """Store joint [token, latent + rope] in these slots."""
        if self.layout == "latent_fp8":
            joint = Fp8Latent.quantize(joint, self.config.kv_lora_rank).pack()
        self.storage.flatten(0, 1)[slots] = joint

    def read(self, slots: Tensor) -> Tensor:
        """Return what these slots [...] hold: [..., latent + rope] in `dtype`."""
        flat = self.storage.flatten(0, 1)
        stored = flat.index_select(0, slots.flatten()).view(*slots.shape, flat.shape[-1])
        if self.layout == "latent_fp8":
            return Fp8Latent.unpack(stored, self.config.kv_lora_rank).dequantize(self.dtype)
        return stored

    @property
    def bytes_per_token(self) -> int:
        return self.storage[0, 0].nbytes

    def blocks(self) -> list[Block]:
        """Return what is in each block, from the first to the last, free ones included."""
        owners: list[list[int]] = [[] for _ in self.references]
        filled = [0] * len(owners)
        for number, sequence in self.sequences.items():
            for place, block in enumerate(sequence.table):
                owners[block].append(number)
                filled[block] = max(filled[block], min(self.block_size, sequence.length - place * self.block_size))
        return [Block(i, tuple(owners[i]), self.references[i], filled[i]) for i in range(len(owners))]

    def usage(self) -> Usage:
        """Count blocks, slots and tokens."""
        used = [block for block in self.blocks() if block.references]
        return Usage(
            free_blocks=len(self._free),
            used_blocks=len(used),
            shared_blocks=sum(block.references > 1 for block in used),
            allocated_slots=len(used) * self.block_size,
            filled_slots=sum(block.filled for block in used),
            stored_tokens=sum(sequence.length for sequence in self.sequences.values()),
        )
