"""The FP8 casts and scalings of reference.py for an NVIDIA GPU; the product is in numba_cuda_product.py.

A kernel is built for each format, so that its bit widths are constants in it. On a GPU that has FP8 a cast is one
instruction, elsewhere shifts and a comparison. Tensors on a CPU are taken to the GPU and the result back.
"""

from functools import cache

import numpy as np
import torch
from numba import types
from torch import Tensor

from .cuda_device import THREADS, bits_of, bring, cuda, divide, has_fp8, inlined, instruction, number_of, start, times
from .numba_cuda_attention import decode_attention, decode_attention_fp8  # noqa: F401
from .numba_cuda_dispatch import permute, unpermute, unpermute_gradients  # noqa: F401
from .numba_cuda_product import NAN, product  # noqa: F401
from .reference import SMALLEST_AMAX, code_dtype

INFINITY = 0x7F800000  # float32, as bits
SMALLEST_AMAX_BITS = int(np.float32(SMALLEST_AMAX).view(np.int32))
CASTS = {(4, 3, 7, False): "e4m3", (5, 2, 15, True): "e5m2"}  # two numbers in, the lower one is wanted


def encoder(fmt, overflow_code: int, fp8: bool):
    """Return the device function float32 -> code; with `fp8` by the GPU's instruction where it does the same."""
    layout = fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.infinities
    if fp8 and layout in CASTS and overflow_code == fmt.max_code:
        text = f"cvt.rn.satfinite.{CASTS[layout]}x2.f32 $0, 0f00000000, $1;"
        cast = instruction(text, types.int16, types.float32)
        return inlined(lambda x: cast(x) | (bits_of(x) >> 24 & 0x80))  # the instruction drops the sign of NaN
    mantissa_bits, least, max_code, nan_code = fmt.mantissa_bits, 128 - fmt.bias, fmt.max_code, fmt.nan_code
    sign_bit = 1 << (fmt.bits - 1)

    def code_of(x):
        bits = bits_of(x)
        size = bits & 0x7FFFFFFF
        exponent = max(size >> 23, 1)
        whole = size - ((exponent - 1) << 23)  # with its leading one: |x| = whole * 2^(exponent - 150)
        lost = min(max(least - exponent, 0) + 23 - mantissa_bits, 25)  # bits that fall off at the end
        steps, rest = whole >> lost, whole & ((1 << lost) - 1)
        steps += 2 * rest + (steps & 1) > 1 << lost  # more than half, or half and odd
        code = steps + (max(exponent - least, 0) << mantissa_bits)
        code = code if code <= max_code else overflow_code
        code = code if size <= INFINITY else nan_code
        return code | (sign_bit if bits < 0 else 0)

    return inlined(code_of)


def decoder(fmt):
    """Return the device function code -> float32."""
    mantissa_bits, sign_shift, max_code, nan_code = fmt.mantissa_bits, fmt.bits - 1, fmt.max_code, fmt.nan_code
    inf_code = fmt.inf_code if fmt.infinities else -1
    shift, bias, step = 23 - mantissa_bits, (127 - fmt.bias) << 23, np.float32(fmt.smallest_subnormal)

    def value_of(code):
        code = np.int64(code)
        size = code & nan_code
        value = number_of(NAN if size != inf_code else INFINITY)
        if size >> mantissa_bits == 0:
            value = np.float32(size) * step
        elif size <= max_code:
            value = number_of((size << shift) + bias)
        return -value if code >> sign_shift & 1 else value

    return inlined(value_of)


@cache
def encode_kernel(fmt, overflow_code: int, fp8: bool):
    """Kernel (x [n] float32, codes [n])."""
    code_of = encoder(fmt, overflow_code, fp8)

    @cuda.jit
    def encode(x, codes):
        i = cuda.grid(1)
        if i < codes.size:
            codes[i] = code_of(x[i])

    return encode


@cache
def decode_kernel(fmt):
    """Kernel (codes [n], x [n] float32)."""
    value_of = decoder(fmt)

    @cuda.jit
    def decode(codes, x):
        i = cuda.grid(1)
        if i < codes.size:
            x[i] = value_of(codes[i])

    return decode


@cache
def quantize_kernel(fmt, across: int, down: int, fp8: bool):
    """Kernel (x, tile rows, tile columns, whether to round up, codes, scales); down x across threads for each tile."""
    code_of, largest, threads = encoder(fmt, fmt.max_code, fp8), np.float32(fmt.max), across * down
    nan_code = fmt.nan_code

    @cuda.jit
    def quantize(x, high, wide, power_of_two, codes, scales):
        found = cuda.shared.array(threads, types.int32)
        tile_row = cuda.blockIdx.x // scales.shape[1]
        tile_column = cuda.blockIdx.x - tile_row * scales.shape[1]
        top, left = tile_row * high + cuda.threadIdx.y, tile_column * wide + cuda.threadIdx.x
        bottom, right = min((tile_row + 1) * high, x.shape[0]), min((tile_column + 1) * wide, x.shape[1])

        amax = SMALLEST_AMAX_BITS  # sizes are in order as their bits are, with NaN on top
        for row in range(top, bottom, down):
            for column in range(left, right, across):
                amax = max(amax, bits_of(x[row, column]) & 0x7FFFFFFF)
        thread = cuda.threadIdx.y * across + cuda.threadIdx.x
        found[thread] = amax
        cuda.syncthreads()
        half = threads // 2
        while half > 0:
            if thread < half:
                found[thread] = max(found[thread], found[thread + half])
            cuda.syncthreads()
            half //= 2

        scale = divide(number_of(found[0]), largest)
        bits = bits_of(scale)
        if power_of_two and bits < INFINITY:
            scale = number_of(min(max((bits + 0x7FFFFF) >> 23, 1), 254) << 23)
        if thread == 0:
            scales[tile_row, tile_column] = scale
        for row in range(top, bottom, down):
            for column in range(left, right, across):
                code = code_of(divide(x[row, column], scale))
                codes[row, column] = code if code & nan_code != nan_code else nan_code

    return quantize


@cache
def dequantize_kernel(fmt, across: int, down: int):
    """Kernel (codes, scales, tile rows, tile columns, x); down x across threads for each tile."""
    value_of = decoder(fmt)

    @cuda.jit
    def dequantize(codes, scales, high, wide, x):
        tile_row = cuda.blockIdx.x // scales.shape[1]
        tile_column = cuda.blockIdx.x - tile_row * scales.shape[1]
        top, left = tile_row * high + cuda.threadIdx.y, tile_column * wide + cuda.threadIdx.x
        bottom, right = min((tile_row + 1) * high, x.shape[0]), min((tile_column + 1) * wide, x.shape[1])
        scale = scales[tile_row, tile_column]
        for row in range(top, bottom, down):
            for column in range(left, right, across):
                x[row, column] = times(value_of(codes[row, column]), scale)

    return dequantize


def block_shape(rows: int, columns: int) -> tuple[int, int]:
    """Threads (across, down) for a tile: powers of two, a row of up to 32 first, because neighbours read together."""
    across = min(32, THREADS, 1 << (columns - 1).bit_length())
    return across, min(THREADS // across, 1 << (rows - 1).bit_length())


def encode(x: Tensor, fmt, overflow_code: int) -> Tensor:
    """Codes of the nearest numbers; see reference.py, also for what follows."""
    (numbers,) = bring(x)
    codes = torch.empty(x.shape, dtype=code_dtype(fmt), device=numbers.device)
    kernel = encode_kernel(fmt, overflow_code, has_fp8())
    start(kernel, -(-x.numel() // THREADS), THREADS, numbers.flatten(), codes.flatten())
    return codes.to(x.device)


def decode(codes: Tensor, fmt) -> Tensor:
    """Numbers that codes stand for."""
    (there,) = bring(codes)
    x = torch.empty(codes.shape, dtype=torch.float32, device=there.device)
    start(decode_kernel(fmt), -(-codes.numel() // THREADS), THREADS, there.flatten(), x.flatten())
    return x.to(codes.device)


def quantize(x: Tensor, fmt, tile: tuple[int, int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """A matrix -> its codes, and the scales of its tiles."""
    (numbers,) = bring(x)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=numbers.device)
    shape = [-(-size // side) for size, side in zip(x.shape, tile, strict=True)]
    scales = torch.empty(shape, dtype=torch.float32, device=numbers.device)
    across, down = block_shape(*tile)
    kernel = quantize_kernel(fmt, across, down, has_fp8())
    start(kernel, scales.numel(), (across, down), numbers, *tile, power_of_two, codes, scales)
    return codes.to(x.device), scales.to(x.device)


def dequantize(codes: Tensor, scales: Tensor, fmt, tile: tuple[int, int]) -> Tensor:
    """Codes times the scales of their tiles."""
    there, scales = bring(codes, scales)
    x = torch.empty(codes.shape, dtype=torch.float32, device=there.device)
    across, down = block_shape(*tile)
    start(dequantize_kernel(fmt, across, down), scales.numel(), (across, down), there, scales, *tile, x)
    return x.to(codes.device)
