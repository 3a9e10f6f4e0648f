"""What a model keeps about the tokens it has read, and how many bytes that is.

A cache belongs to one layer and holds the whole batch:

append(*new)      store new tokens, return all; store(*new) does the same without reading them back
view()            all tokens so far            length      how many those are
truncate(length)  forget the later ones        fork()      a copy that goes its own way
nbytes            what the stored tokens take  allocated_nbytes   the buffers, room for further tokens included

What cannot be stored (another shape, NaN, infinity) raises ValueError and leaves the cache as it was. Buffers are as
long as `capacity` and double when they are full. Two kinds have files of their own, `fp8_cache` and `paged`;
`layouts.new_cache` makes the one that a model needs.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from ..config import ModelConfig


class _Buffers:
    """Tensors [batch, ..., token, width] that grow along the token axis."""

    def __init__(self, shapes: list[tuple[int, ...]], capacity: int, dtype, device):
        """shapes: [batch, ..., width] of each buffer; dtype: one for all of them, or a tuple."""
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * len(shapes)
        self.length = 0
        self._expected = shapes
        self._buffers = [
            new_buffer((*s[:-1], capacity, s[-1]), kind, device) for s, kind in zip(shapes, dtypes, strict=True)
        ]

    def append(self, *new: Tensor) -> list[Tensor]:
        """Store the new tokens behind the old ones and return views on all of them."""
        self.store(*new)
        return self.view()

    def store(self, *new: Tensor) -> None:
        """Store new tokens [batch, ..., token, width] behind the old ones."""
        self._write(*check_new(self, new, self._expected, self.dtype))

    def _write(self, *new: Tensor) -> None:
        end = self.length + new[0].shape[-2]
        for buffer, part in zip(self.reserve(new[0].shape[-2]), new, strict=True):
            buffer[..., self.length : end, :] = part
        self.length = end

    def reserve(self, tokens: int) -> list[Tensor]:
        """Make room for so many more tokens and return the whole buffers; who writes into them then sets `length`."""
        end = self.length + tokens
        for i, buffer in enumerate(self._buffers):
            if end > buffer.shape[-2]:
                self._buffers[i] = self._copy(buffer, max(end, 2 * buffer.shape[-2]))
        return self._buffers

    def view(self) -> list[Tensor]:
        """Return views on the stored tokens, without a copy."""
        return [buffer[..., : self.length, :] for buffer in self._buffers]

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only. ValueError for more than there are."""
        self.length = check_length(self, length, self.length)

    def fork(self):
        """Return a copy: what is appended to one is not in the other."""
        twin = copy.copy(self)
        twin._buffers = [self._copy(buffer, buffer.shape[-2]) for buffer in self._buffers]
        return twin

    def _copy(self, buffer: Tensor, capacity: int) -> Tensor:
        larger = new_buffer((*buffer.shape[:-2], capacity, buffer.shape[-1]), buffer.dtype, buffer.device)
        larger[..., : self.length, :] = buffer[..., : self.length, :]
        return larger

    @property
    def dtype(self) -> torch.dtype:
        return self._buffers[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tokens take."""
        return sum(buffer[..., : self.length, :].nbytes for buffer in self._buffers)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers, room for further tokens included."""
        return sum(buffer.nbytes for buffer in self._buffers)


class LatentCache(_Buffers):
    """Per token: the normalised latent and the rotated rope key, side by side (576 values in V3)."""

    def __init__(self, config: ModelConfig, batch: int = 1, capacity: int = 64, dtype=torch.float32, device="cpu"):
        super().__init__([(batch, config.latent_width)], capacity, dtype, device)

    def append(self, *joint: Tensor) -> Tensor:
        """Store [batch, token, kv_lora_rank + qk_rope_head_dim]; return the same for all tokens so far."""
        return super().append(*joint)[0]


class GroupedCache(_Buffers):
    """Per token: one key and one value for each of the `num_key_value_heads` groups.

    append(keys, values [batch, group, token, head_dim]) -> both for all tokens so far.
    """

    def __init__(self, config: ModelConfig, batch: int = 1, capacity: int = 64, dtype=torch.float32, device="cpu"):
        heads = config.num_key_value_heads
        shapes = [(batch, heads, config.qk_head_dim), (batch, heads, config.value_head_dim)]
        super().__init__(shapes, capacity, dtype, device)


class ExpandedCache(_Buffers):
    """Per token: a key and a value for every query head, what attention without any sharing keeps.

    append(keys [batch, head, token, qk_head_dim], values [batch, head, token, v_head_dim]) -> both for all tokens so
    far. A model with grouped heads may pass one per group: each is stored for every head of its group.
    """

    def __init__(self, config: ModelConfig, batch: int = 1, capacity: int = 64, dtype=torch.float32, device="cpu"):
        heads = config.num_attention_heads
        shapes = [(batch, heads, config.qk_head_dim), (batch, heads, config.value_head_dim)]
        super().__init__(shapes, capacity, dtype, device)
        self._groups = None if config.uses_latent_attention else config.num_key_value_heads

    def store(self, *new: Tensor) -> None:
        """Store keys and values, for every head or (grouped models) one per group."""
        heads, groups = self._expected[0][1], self._groups
        if groups and all(part.dim() == 4 and part.shape[1] == groups for part in new):
            new = tuple(part.repeat_interleave(heads // groups, dim=1) for part in new)
        super().store(*new)


# What every kind of cache checks before it changes anything ---------------------------------------------------------


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    """Return memory that may be written in any mode, even if it was made in inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def check_new(cache, new: tuple[Tensor, ...], shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Return new tokens in the cache's dtype. ValueError if they are not [batch, ..., token, width] or not finite."""
    name = f"{type(cache).__name__}.append"
    tokens = new[0].shape[-2] if new and new[0].dim() > 1 else 1
    expected = [(*shape[:-1], tokens, shape[-1]) for shape in shapes]
    got = [tuple(part.shape) for part in new]
    if got != expected:
        raise ValueError(f"{name} got {', '.join(map(str, got))}, expected {', '.join(map(str, expected))}; a cache "
                         "serves one model, layout and batch size, make a new one for another")  # fmt: skip
    stored = [part.to(dtype) for part in new]
    for part in stored:
        # The sum costs a fourth of asking each value; where finite values overflow in it, each is asked.
        if not math.isfinite(part.detach().sum()) and not part.isfinite().all():
            where = (~part.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name} got {part[tuple(where)].item()} at {where}; once stored it would spread to every "
                             "later token: find out where it came from")  # fmt: skip
    return stored


def check_length(cache, length: int, longest: int) -> int:
    """Return `length` if a sequence of `longest` tokens can be cut to it, else raise ValueError."""
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= longest:
        raise ValueError(f"{type(cache).__name__}.truncate got {length!r}; expected a whole number from 0 to the "
                         f"{longest} tokens that are stored")  # fmt: skip
    return length
