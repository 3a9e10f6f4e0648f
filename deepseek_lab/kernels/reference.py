"""The FP8 kernels as equations, in torch: what is right. The other bodies give the same bits, faster.

`fmt` is a precision.FloatFormat; a `tile` (rows, columns) is the part of a matrix that shares one scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_attention import decode_attention, decode_attention_fp8  # noqa: F401
from .reference_dispatch import permute, unpermute, unpermute_gradients  # noqa: F401
from .reference_product import product  # noqa: F401

SMALLEST_AMAX = 1e-4  # as the released kernels: an all-zero tile gets a scale, not a division by zero


def encode(x: Tensor, fmt, overflow_code: int) -> Tensor:
    """Codes of the nearest numbers, ties to even: x float32 of any shape -> uint8, int32 or int64 of that shape."""
    size = x.abs().double()
    exponent = (torch.frexp(size).exponent - 1).clamp(min=1 - fmt.bias).long().where(size > 0, 1 - fmt.bias)
    steps = torch.ldexp(size, fmt.mantissa_bits - exponent).round()  # round() goes to even
    finite = steps.nan_to_num(0, 0, 0).long() + ((exponent + fmt.bias - 1) << fmt.mantissa_bits)
    finite = torch.where(size.isinf(), fmt.max_code + 1, finite)
    codes = torch.where(finite > fmt.max_code, overflow_code, finite)
    codes = torch.where(size.isnan(), fmt.nan_code, codes) | (x.signbit().long() << (fmt.bits - 1))
    return codes.to(code_dtype(fmt))


def decode(codes: Tensor, fmt) -> Tensor:
    """Numbers that codes stand for: whole numbers of any shape -> float32 of that shape."""
    codes = codes.long()
    size = codes & fmt.nan_code
    exponent, mantissa = size >> fmt.mantissa_bits, size & ((1 << fmt.mantissa_bits) - 1)
    whole = torch.where(exponent > 0, mantissa + (1 << fmt.mantissa_bits), mantissa)
    value = torch.ldexp(whole.double(), exponent.clamp(min=1) - fmt.bias - fmt.mantissa_bits)
    value = torch.where(size > fmt.max_code, torch.nan, value)
    if fmt.infinities:
        value = torch.where(size == fmt.inf_code, torch.inf, value)
    return torch.where(codes >> (fmt.bits - 1) & 1 > 0, -value, value).float()


def quantize(x: Tensor, fmt, tile: tuple[int, int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [row, column] float32 -> codes [row, column] uint8 and scales [tile row, tile column] float32.

    scale = max(max|tile|, 1e-4) / fmt.max, rounded up to a power of two where asked; code = x / scale. All NaN get the
    one code without a sign: the sign of a NaN that a division makes is the processor's choice.
    """
    (rows, columns), (high, wide) = x.shape, within(tile, x.shape)
    padded = F.pad(x, (0, -columns % wide, 0, -rows % high))
    tiles = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))  # [tile row, row, tile column, column]
    scales = tiles.abs().amax(dim=(1, 3)).clamp(min=SMALLEST_AMAX) / fmt.max
    if power_of_two:
        scales = round_up_to_power_of_two(scales)
    scaled = (x / spread(scales, tile, x.shape)).clamp(-fmt.max, fmt.max)
    return encode(scaled, fmt, fmt.max_code).masked_fill(scaled.isnan(), fmt.nan_code), scales


def dequantize(codes: Tensor, scales: Tensor, fmt, tile: tuple[int, int]) -> Tensor:
    """codes [row, column] uint8 and scales [tile row, tile column] float32 -> code times scale, float32."""
    return decode(codes, fmt) * spread(scales, tile, codes.shape)


def round_up_to_power_of_two(scales: Tensor) -> Tensor:
    """The next power of two at or above: by the exponent bits, for log2 rounds a little above 2^-9 down to -9."""
    power = (scales.view(torch.int32) + 0x7FFFFF & 0x7F800000).view(torch.float32)
    return torch.where(scales.isfinite(), power, scales)


def spread(scales: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """Repeat each tile's scale for all its values: [tile row, tile column] -> shape."""
    (rows, columns), (high, wide) = shape, within(tile, shape)
    return scales.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def within(tile: tuple[int, int], shape: torch.Size) -> tuple[int, int]:
    """A tile no larger than the matrix, so that nothing is filled up or repeated beyond it."""
    return tuple(max(min(side, size), 1) for side, size in zip(tile, shape, strict=True))


def code_dtype(fmt) -> torch.dtype:
    """The smallest type that holds the codes as numbers from 0 up."""
    return torch.uint8 if fmt.bits <= 8 else torch.int32 if fmt.bits < 32 else torch.int64
