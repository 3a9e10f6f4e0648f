"""Store a matrix in eight bits a value: FP8 codes, and one float32 scale per 128 x 128 block.

Source: DeepSeek-V3 report, section 3.3.2; README_WEIGHTS.md of the released weights, whose `weight_scale_inv` is what
the codes are multiplied by, in spite of its name.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # as the released kernels: an all-zero block gets a scale, not a division by zero


class BlockScaled(NamedTuple):
    """A matrix as codes [row, column] float8_e4m3fn and scales [ceil(row / 128), ceil(column / 128)] float32."""

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """Return codes times scales, [row, column] float32. Ragged edges belong to the last block."""
        rows, columns = self.codes.shape
        expected = (-(-rows // BLOCK), -(-columns // BLOCK))
        if self.scales.shape != expected:
            raise ValueError(f"scales of shape {tuple(self.scales.shape)} beside codes {tuple(self.codes.shape)}; "
                             f"expected {expected}, one per {BLOCK} x {BLOCK} block")  # fmt: skip
        return self.codes.float() * _spread(self.scales.float(), rows, columns)


def quantize_blocks(w: Tensor) -> BlockScaled:
    """Return a matrix [row, column] as E4M3 codes and block scales; scale = max|block| / 448, code = w / scale.

    Raises ValueError for anything but a finite matrix: one infinity would turn its whole block into zeros.
    """
    if w.dim() != 2:
        raise ValueError(f"quantize_blocks got shape {tuple(w.shape)}; expected a matrix [row, column]")
    if not torch.isfinite(w).all():
        raise ValueError("quantize_blocks got a matrix with NaN or infinity; a scale cannot bring those into range")
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [block row, row, block column, column]
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=SMALLEST_AMAX) / E4M3_MAX
    codes = (w.float() / _spread(scales, rows, columns)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return BlockScaled(codes, scales)


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat each block's scale for all its values: [block row, block column] -> [row, column]."""
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
