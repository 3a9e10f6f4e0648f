"""What a pool of blocks holds after an operation, kept so that it can be looked at later."""

from __future__ import annotations

from dataclasses import dataclass

from .pool import Block, BlockPool, Usage


@dataclass(frozen=True)
class PoolStep:
    """A pool after `operation` (words): its blocks, and sizes in bytes of its one layer.

    capacity: the whole pool. allocated: its used blocks. filled: their slots that hold a token. stored: the tokens of
    all sequences if each had its own copy.
    """

    operation: str
    blocks: tuple[Block, ...]
    usage: Usage
    block_size: int
    bytes_per_token: int

    @property
    def capacity(self) -> int:
        return len(self.blocks) * self.block_size * self.bytes_per_token

    @property
    def allocated(self) -> int:
        return self.usage.allocated_slots * self.bytes_per_token

    @property
    def filled(self) -> int:
        return self.usage.filled_slots * self.bytes_per_token

    @property
    def stored(self) -> int:
        return self.usage.stored_tokens * self.bytes_per_token

    @property
    def empty(self) -> int:
        """What the blocks take and no token fills."""
        return self.allocated - self.filled

    @property
    def saved(self) -> int:
        """What sharing saves against a copy for each sequence."""
        return self.stored - self.filled


def pool_step(pool: BlockPool, operation: str) -> PoolStep:
    """Return what the pool holds now: `steps.append(pool_step(pool, "fork 0"))` after each operation makes a trace."""
    return PoolStep(operation, tuple(pool.blocks()), pool.usage(), pool.block_size, pool.bytes_per_token)
