"""What a model keeps about the tokens it has read, and how many bytes that is.

A cache belongs to one layer and holds the whole batch. Buffers are as long as `capacity` and double when they are full;
`nbytes` counts what is stored for the tokens read so far, `allocated_nbytes` the buffers themselves.
"""

import torch
from torch import Tensor

from ..config import ModelConfig


class _Buffers:
    """Tensors [batch, ..., token, width] that grow along the token axis."""

    def __init__(self, shapes: list[tuple[int, ...]], capacity: int, dtype: torch.dtype, device):
        self.length = 0
        self._buffers = [torch.empty(*s[:-1], capacity, s[-1], dtype=dtype, device=device) for s in shapes]

    def _store(self, *news: Tensor) -> list[Tensor]:
        """Write the new tokens behind the old ones and return views on all of them."""
        end = self.length + news[0].shape[-2]
        for buffer, new in zip(self._buffers, news, strict=True):
            expected = (*buffer.shape[:-2], new.shape[-2], buffer.shape[-1])
            if new.shape != expected:
                raise ValueError(f"{type(self).__name__}.append got {tuple(new.shape)}, expected {expected}; a cache "
                                 "serves one batch size, make a new one for another batch")  # fmt: skip
        for buffer, new in zip(self.reserve(news[0].shape[-2]), news, strict=True):
            buffer[..., self.length : end, :] = new
        self.length = end
        return self.view()

    def reserve(self, tokens: int) -> list[Tensor]:
        """Make room for so many more tokens and return the whole buffers; who writes into them then sets `length`."""
        end = self.length + tokens
        for i, buffer in enumerate(self._buffers):
            if end > buffer.shape[-2]:
                larger = buffer.new_empty(*buffer.shape[:-2], max(end, 2 * buffer.shape[-2]), buffer.shape[-1])
                larger[..., : self.length, :] = buffer[..., : self.length, :]
                self._buffers[i] = larger
        return self._buffers

    def view(self) -> list[Tensor]:
        """Return views on the stored tokens, without a copy."""
        return [buffer[..., : self.length, :] for buffer in self._buffers]

    @property
    def dtype(self) -> torch.dtype:
        return self._buffers[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tokens take."""
        return sum(view.numel() * view.element_size() for view in self.view())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers, room for further tokens included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)


class LatentCache(_Buffers):
    """Per token: the normalised latent and the rotated rope key, side by side (576 values in V3)."""

    def __init__(self, config: ModelConfig, batch: int = 1, capacity: int = 64, dtype=torch.float32, device="cpu"):
        super().__init__([(batch, config.latent_width)], capacity, dtype, device)

    def append(self, joint: Tensor) -> Tensor:
        """Store [batch, token, kv_lora_rank + qk_rope_head_dim]; return the same for all tokens so far."""
        return self._store(joint)[0]


class GroupedCache(_Buffers):
    """Per token: one key and one value for each of the `num_key_value_heads` groups."""

    def __init__(self, config: ModelConfig, batch: int = 1, capacity: int = 64, dtype=torch.float32, device="cpu"):
        heads = config.num_key_value_heads
        shapes = [(batch, heads, config.qk_head_dim), (batch, heads, config.value_head_dim)]
        super().__init__(shapes, capacity, dtype, device)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [batch, group, token, head_dim]; return both for all tokens so far."""
        keys, values = self._store(keys, values)
        return keys, values


def new_cache(config: ModelConfig, batch: int = 1, capacity: int = 64, dtype=torch.float32, device="cpu"):
    """Return the empty cache that one layer of this model needs."""
    kind = LatentCache if config.uses_latent_attention else GroupedCache
    return kind(config, batch, capacity, dtype, device)
