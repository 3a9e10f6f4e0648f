"""The latent cache in eight bits: 656 bytes per token and layer in V3, not 576.

512 codes      the latent in E4M3, one byte each
 16 bytes      four scales in FP32, one for each 128 neighbouring values of a token (tiles of 1 x 128)
128 bytes      the rope key, 64 values that stay in BF16: it carries the position and is never averaged

The scales are FP32 numbers, but powers of two: a product with one is exact. Source: FlashMLA repository, README.md
("FP8 KV cache") and tests/quant.py: 2 ** ceil(log2(max(max|tile| / 448, 1e-4))). Tiles whose largest value is below
0.0448 get finer scales here, as `precision.quantize` has them: its floor is 1e-4 before the division by 448.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig
from ..precision.scaling import BLOCK, BlockScaled, quantize_tiles
from .caches import _Buffers, check_new

SCALES = ("ue8m0", "fp32")


class Fp8Latent(NamedTuple):
    """Tokens in the FP8 layout.

    codes: [..., token, latent] float8_e4m3fn. scales: [..., token, ceil(latent / 128)] float32, one per tile.
    rope: [..., token, rope] bfloat16.
    """

    codes: Tensor
    scales: Tensor
    rope: Tensor

    @classmethod
    def quantize(cls, joint: Tensor, latent: int, scale: str = "ue8m0") -> Fp8Latent:
        """Return latents and rope keys [..., token, latent + rope] in eight bits. ValueError for NaN and infinity."""
        blocks = quantize_tiles(joint[..., :latent], scale=scale)
        return cls(blocks.codes, blocks.scales, joint[..., latent:].detach().to(torch.bfloat16))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [..., token, latent + rope]: codes times scales, and the rope key."""
        latent = BlockScaled(self.codes, self.scales, (1, BLOCK)).dequantize()
        return torch.cat([latent, self.rope.float()], dim=-1).to(dtype)

    def pack(self) -> Tensor:
        """Return the bytes as published [..., token, 656] uint8: a token's codes, its scales, its rope key."""
        return torch.cat([_plain(part).view(torch.uint8) for part in self], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor, latent: int) -> Fp8Latent:
        """Return the three parts of packed bytes [..., token, 656] uint8; `latent` is 512 in V3."""
        scales = 4 * -(-latent // BLOCK)
        parts = packed.split([latent, scales, packed.shape[-1] - latent - scales], dim=-1)
        dtypes = torch.float8_e4m3fn, torch.float32, torch.bfloat16
        return cls(*(_plain(part).view(dtype) for part, dtype in zip(parts, dtypes, strict=True)))


def _plain(x: Tensor) -> Tensor:
    """Return a copy that may be viewed in another width: `contiguous()` leaves odd strides and starts as they are."""
    return x.clone(memory_format=torch.contiguous_format)


def packed_width(config: ModelConfig) -> int:
    """Return the bytes of one token in one layer: 656 in V3."""
    return config.kv_lora_rank + 4 * -(-config.kv_lora_rank // BLOCK) + 2 * config.qk_rope_head_dim


class Fp8LatentCache(_Buffers):
    """Per token: the latent as FP8 codes and scales, the rope key in BF16.

    scale: "ue8m0" for powers of two, as published, or "fp32". dtype: what readers get. `parts()` is what kernels read.
    No gradients pass through it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        capacity: int = 64,
        dtype=torch.float32,
        device="cpu",
        scale: str = "ue8m0",
    ):
        if scale not in SCALES:
            raise ValueError(f"Fp8LatentCache got scale={scale!r}; choose one of {', '.join(SCALES)}")
        expected = [(batch, config.latent_width)]
        widths = config.kv_lora_rank, -(-config.kv_lora_rank // BLOCK), config.qk_rope_head_dim
        stored = torch.float8_e4m3fn, torch.float32, torch.bfloat16
        super().__init__([(batch, width) for width in widths], capacity, stored, device)
        self._expected = expected
        self.kv_lora_rank, self._scale, self._dtype = config.kv_lora_rank, scale, dtype

    def append(self, *joint: Tensor) -> Tensor:
        """Store [batch, token, kv_lora_rank + qk_rope_head_dim]; return all tokens so far, dequantised, in `dtype`."""
        return super().append(*joint)[0]

    def store(self, *joint: Tensor) -> None:
        """As `append`, without dequantising anything: what a kernel that reads `parts()` wants."""
        (checked,) = check_new(self, joint, self._expected, torch.float32)
        self._write(*Fp8Latent.quantize(checked, self.kv_lora_rank, self._scale))

    def parts(self) -> Fp8Latent:
        """Return views on codes, scales and rope keys of all tokens [batch, token, .], without a copy."""
        return Fp8Latent(*super().view())

    def raw(self) -> Tensor:
        """Return all tokens as published: [batch, token, 656] uint8, a copy."""
        return self.parts().pack()

    def view(self) -> list[Tensor]:
        """Return all tokens dequantised: [batch, token, kv_lora_rank + qk_rope_head_dim], a copy."""
        return [self.parts().dequantize(self._dtype)]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype
