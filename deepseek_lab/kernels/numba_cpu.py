"""Casts and scaling on a CPU: the bits of reference.py. The product is in numba_product.py.

A number is taken apart by its bits and without branches, so that the compiler can do sixteen at a time. In Numba the
sum of two uint32 has 64 bits, hence the many np.uint32(...), and `& BELOW_32` tells the compiler that a shift fits 32.
Compiled functions check no index: the functions at the end hand them contiguous arrays of matching sizes. What they
call is in this file too, because Numba's cache does not notice a change in another one.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import reference
from .numba_attention import decode_attention, decode_attention_fp8  # noqa: F401
from .numba_dispatch import permute, unpermute, unpermute_gradients  # noqa: F401
from .numba_product import product  # noqa: F401

ONE, BELOW_32 = np.uint32(1), np.uint32(31)
SIZE = np.uint32(0x7FFFFFFF)  # all of a float32 but its sign; sizes compare like whole numbers, NaN above infinity
MANTISSA = np.uint32(0x7FFFFF)
INFINITY, NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)
SMALLEST_AMAX = np.float32(reference.SMALLEST_AMAX)
PART = 1024  # columns of one row that are worked on at a time: with their codes they stay in the first cache

helper = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
kernel = njit(error_model="numpy", cache=True, nogil=True, no_cfunc_wrapper=True)


class Numbers(NamedTuple):
    """What compiled code has to know about a format, as 32-bit numbers."""

    shift: np.uint32  # how far a float32 mantissa is longer
    half: np.uint32  # just under half a step of it
    normal: np.uint32  # the first code with all its mantissa bits
    smallest_normal: np.uint32  # the same as a float32's bits
    rebias: np.uint32  # how much higher a float32's exponent is, where it stands in a code
    smallest: np.float32  # the smallest number above zero
    magic: np.float32  # a number whose last bit is worth that much
    largest: np.uint32  # codes
    overflow: np.uint32
    infinity: np.uint32
    nan: np.uint32
    sign: np.uint32
    to_sign: np.uint32  # how far a float32's sign lies above it


def fits(fmt) -> bool:
    """Whether all numbers of a format are float32 numbers with a bit to round off; the reference does the others."""
    return 0 < fmt.mantissa_bits < 23 and fmt.bias < 128 and fmt.max < 2.0**128


@cache
def numbers(fmt, overflow_code: int = 0) -> Numbers:
    """Return the numbers of a format that `fits`; one that has no infinity gets a code that never occurs."""
    shift, smallest, normal = 23 - fmt.mantissa_bits, fmt.smallest_subnormal, 1 << fmt.mantissa_bits
    whole = dict(shift=shift, half=(1 << (shift - 1)) - 1, normal=normal, smallest_normal=(128 - fmt.bias) << 23,
                 rebias=(127 - fmt.bias) << fmt.mantissa_bits, largest=fmt.max_code, overflow=overflow_code,
                 infinity=fmt.inf_code or 1 << fmt.bits, nan=fmt.nan_code, sign=1 << (fmt.bits - 1),
                 to_sign=32 - fmt.bits)  # fmt: skip
    return Numbers(smallest=np.float32(smallest), magic=np.float32(smallest * 2**23),
                   **{name: np.uint32(number) for name, number in whole.items()})  # fmt: skip


@helper
def to_code(value, fmt, scaled):
    """The code of a float32 as uint32: the nearest, ties to even. A scaled one cannot overflow, its NaN has no sign."""
    bits = np.float32(value).view(np.uint32)
    size = np.uint32(bits & SIZE)
    shift = np.uint32(fmt.shift & BELOW_32)
    # Half a step more where the last bit that stays is odd, just under it where it is even: what is cut off then ties.
    odd = np.uint32(np.uint32(size >> shift) & ONE)
    code = np.uint32(np.uint32(np.uint32(np.uint32(size + fmt.half) + odd) >> shift) - fmt.rebias)
    # Beside the magic number a sum keeps whole subnormal steps: the adder itself rounds to even.
    steps = np.uint32(np.float32(size.view(np.float32) + fmt.magic).view(np.uint32))
    code = np.uint32(steps - np.float32(fmt.magic).view(np.uint32)) if size < fmt.smallest_normal else code
    sign = np.uint32(np.uint32(bits >> np.uint32(fmt.to_sign & BELOW_32)) & fmt.sign)
    if scaled:
        return fmt.nan if size > INFINITY else np.uint32(code | sign)
    code = fmt.overflow if code > fmt.largest else code
    return np.uint32((fmt.nan if size > INFINITY else code) | sign)


@helper
def to_number(code, fmt):
    """The float32 that a code stands for; bits above the format's are ignored."""
    size = np.uint32(code & fmt.nan)
    bits = np.uint32(np.uint32(size + fmt.rebias) << np.uint32(fmt.shift & BELOW_32))
    subnormal = np.float32(np.float32(size) * fmt.smallest)
    bits = subnormal.view(np.uint32) if size < fmt.normal else bits
    bits = NAN if size > fmt.largest else bits
    bits = INFINITY if size == fmt.infinity else bits
    sign = np.uint32(np.uint32(code & fmt.sign) << np.uint32(fmt.to_sign & BELOW_32))
    return np.uint32(bits | sign).view(np.float32)


@helper
def to_scale(amax, largest, power_of_two):
    """The scale of a tile whose largest absolute value has the bits amax: NaN and infinity stay what they are."""
    size = np.uint32(amax).view(np.float32)
    scale = np.float32((SMALLEST_AMAX if size < SMALLEST_AMAX else size) / largest)
    bits = scale.view(np.uint32)
    if power_of_two and bits < INFINITY:
        return np.uint32(np.uint32(bits + MANTISSA) & INFINITY).view(np.float32)  # the exponent, one more if not exact
    return scale


# In what follows matrices are flat. An unsigned index cannot mean "from the end", which would cost a test.


@helper
def largest_size(x, start, count):
    """The bits of the largest absolute value of x[start : start + count]; NaN counts as the largest."""
    amax = np.uint32(0)
    for i in range(count):
        amax = max(amax, np.uint32(np.float32(x[np.uint64(start + np.uint64(i))]).view(np.uint32) & SIZE))
    return amax


@helper
def encode_part(x, start, count, scale, fmt, codes):
    """Write codes = x / scale from start on."""
    for i in range(count):
        at = np.uint64(start + np.uint64(i))
        codes[at] = to_code(x[at] / scale, fmt, True)


@kernel
def quantize_tiles(x, shape, tile, fmt, largest, power_of_two, codes, scales):
    """x [row * column] -> codes [row * column] and scales [tile row, tile column]."""
    (high, wide), columns, across = tile, shape[1], scales.shape[1]
    amax = np.empty(across, np.uint32)
    # Higher tiles are done across the whole width: memory is fastest when it is read in order.
    part = max(1, across if high > 1 else PART // wide)
    for i in range(scales.shape[0]):
        rows = range(i * high, min(shape[0], (i + 1) * high))
        for first in range(0, across, part):
            last = min(across, first + part)
            amax[first:last] = 0
            for row in rows:
                for j in range(first, last):
                    start, count = np.uint64(row * columns + j * wide), min(wide, columns - j * wide)
                    amax[j] = max(amax[j], largest_size(x, start, count))
            for j in range(first, last):
                scales[i, j] = to_scale(amax[j], largest, power_of_two)
            for row in rows:
                for j in range(first, last):
                    start, count = np.uint64(row * columns + j * wide), min(wide, columns - j * wide)
                    encode_part(x, start, count, scales[i, j], fmt, codes)


@kernel
def quantize_columns(x, shape, high, fmt, largest, power_of_two, codes, scales):
    """The same for tiles one column wide: sixteen neighbouring tiles at a time."""
    columns = shape[1]
    amax = np.empty(columns, np.uint32)
    for i in range(scales.shape[0]):
        rows = range(i * high, min(shape[0], (i + 1) * high))
        amax[:] = 0
        for row in rows:
            for j in range(columns):
                size = np.float32(x[np.uint64(row * columns + j)]).view(np.uint32) & SIZE
                amax[j] = max(amax[j], np.uint32(size))
        for j in range(columns):
            scales[i, j] = to_scale(amax[j], largest, power_of_two)
        for row in rows:
            for j in range(columns):
                at = np.uint64(row * columns + j)
                codes[at] = to_code(x[at] / scales[i, j], fmt, True)


@kernel
def dequantize_all(codes, scales, shape, tile, fmt, x):
    """codes [row * column] and scales [tile row, tile column] -> x [row * column]."""
    (high, wide), columns = tile, shape[1]
    for row in range(shape[0]):
        if wide == 1:
            for j in range(columns):
                at = np.uint64(row * columns + j)
                x[at] = to_number(np.uint32(codes[at]), fmt) * scales[row // high, j]
        else:
            for j in range(scales.shape[1]):
                scale, start = scales[row // high, j], np.uint64(row * columns + j * wide)
                for k in range(min(wide, columns - j * wide)):
                    at = np.uint64(start + np.uint64(k))
                    x[at] = to_number(np.uint32(codes[at]), fmt) * scale


@kernel
def encode_all(x, fmt, codes):
    """x [n] float32 -> codes [n]."""
    for i in range(x.size):
        codes[i] = to_code(x[i], fmt, False)


@kernel
def decode_all(codes, fmt, x):
    """codes [n] -> x [n] float32."""
    for i in range(x.size):
        x[i] = to_number(np.uint32(codes[i]), fmt)


def encode(x: Tensor, fmt, overflow_code: int) -> Tensor:
    """Codes of the nearest numbers; see reference.py, also for what follows."""
    if not fits(fmt):
        return reference.encode(x, fmt, overflow_code)
    # Not torch.empty: NumPy asks for large arrays in large pages. In small ones, touching them first outlasts the cast.
    codes = np.empty(x.shape, np.uint8 if fmt.bits <= 8 else np.int32)
    encode_all(flat(x), numbers(fmt, overflow_code), codes.reshape(-1))
    return torch.from_numpy(codes)


def decode(codes: Tensor, fmt) -> Tensor:
    """Numbers that codes stand for."""
    if not fits(fmt):
        return reference.decode(codes, fmt)
    x = np.empty(codes.shape, np.float32)
    decode_all(flat(codes.to(reference.code_dtype(fmt))), numbers(fmt), x.reshape(-1))
    return torch.from_numpy(x)


def quantize(x: Tensor, fmt, tile: tuple[int, int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """A matrix -> its codes, and the scales of its tiles."""
    if x.shape[1] == 1 < len(x):  # a column is a row that stands: its tiles lie side by side
        return tuple(part.T for part in quantize(x.T, fmt, (1, tile[0]), power_of_two))
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty([-(-size // side) for size, side in zip(x.shape, tile, strict=True)], np.float32)
    how = numbers(fmt, fmt.max_code), np.float32(fmt.max), power_of_two, codes.reshape(-1), scales
    if tile[1] == 1:
        quantize_columns(flat(x), tuple(x.shape), tile[0], *how)
    else:
        quantize_tiles(flat(x), tuple(x.shape), tile, *how)
    return torch.from_numpy(codes), torch.from_numpy(scales)


def dequantize(codes: Tensor, scales: Tensor, fmt, tile: tuple[int, int]) -> Tensor:
    """Codes times the scales of their tiles."""
    if codes.shape[1] == 1 < len(codes):
        return dequantize(codes.T, scales.T, fmt, (1, tile[0])).T
    x = np.empty(codes.shape, np.float32)
    dequantize_all(flat(codes), scales.contiguous().numpy(), tuple(codes.shape), tile, numbers(fmt), x.reshape(-1))
    return torch.from_numpy(x)


def flat(x: Tensor) -> np.ndarray:
    """The values of a tensor in one row, copied only where they do not lie like that."""
    return x.contiguous().view(-1).numpy()
