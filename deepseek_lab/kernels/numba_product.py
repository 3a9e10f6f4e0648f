"""The FP8 product on a CPU, as an H800 is modelled to add it up: the bits of reference_product.py.

Sixty-four columns of the result are computed side by side, for which 64 rows of b are turned and unpacked once. A chain
of 32 products is gone through twice: for the largest exponent, in bytes, and for the sum, in whole numbers.

Compiled functions check no index: `product` checks shapes first. What they call is in this file too, because Numba's
cache does not notice a change in another one.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from . import reference_product as reference

CHAIN = reference.CHAIN
WIDTH = 64  # columns side by side: the bytes of one AVX-512 register
KEPT, BIAS, MANTISSA, BYTE = (np.int32(number) for number in (reference.KEPT, 127, 23, 255))
CUT = np.int32(-1 << (23 - reference.KEPT))  # the bits of a float32 that FP22 has too
ZERO = -64  # a zero's exponent: with any other it is below LOWEST, and two of them still fit into a byte
LOWEST = np.int8(-12)  # exponent of the smallest products; all sums are multiples of 2^-18, so this floor cuts nothing

WHOLE = ir.VectorType(ir.IntType(32), WIDTH)

helper = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
kernel = njit(error_model="numpy", cache=True, nogil=True, no_cfunc_wrapper=True)


def product(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, step: int) -> Tensor:
    """a [M, K] times b [N, K] transposed, E4M3 codes as uint8 -> [M, N] float32. See reference_product.product."""
    reference.check(a, b, a_scales, b_scales, step)
    columns = len(b)
    a, b, a_scales, b_scales = (x.contiguous().numpy() for x in (a, b, a_scales, b_scales))
    a, a_scales = fill_up(a, a_scales, 1)
    b, b_scales = fill_up(b, b_scales, WIDTH)
    values, exponents = tables()
    a_values, a_exponents = values.take(a), exponents.take(a)
    total = np.zeros((len(a), len(b)), np.float32)
    for first in range(0, len(b), WIDTH):
        codes, scales = (np.ascontiguousarray(x[first : first + WIDTH].T) for x in (b, b_scales))  # [K or segment, 64]
        multiply(a_values, a_exponents, a_scales, values.take(codes), exponents.take(codes), scales, step, first, total)
    return torch.from_numpy(total)[:, :columns].contiguous()


def fill_up(codes: np.ndarray, scales: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill up with zeros to whole chains and a multiple of `rows`; a row with a NaN code gets NaN for its scales."""
    scales = np.where(((codes & 127) == 127).any(axis=1, keepdims=True), np.float32(np.nan), scales)
    more = -len(codes) % rows, -codes.shape[1] % CHAIN
    return np.pad(codes, [(0, more[0]), (0, more[1])]), np.pad(scales, [(0, more[0]), (0, 0)])


def tables() -> tuple[np.ndarray, np.ndarray]:
    """The value of each code, float32, and its exponent, int8. NaN counts as 0 here."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = reference.value(codes).nan_to_num(0).float()
    exponents = reference.exponent(codes).where(values != 0, ZERO)
    return values.numpy(), exponents.to(torch.int8).numpy()


@kernel
def multiply(a_values, a_exponents, a_scales, b_values, b_exponents, b_scales, step, first, total):
    """Add the 64 columns from `first` on to total [M, N]: a [M, K] and [M, segment], b [K, 64] and [segment, 64]."""
    rows, length = a_values.shape
    sums, largest = np.empty(WIDTH, np.int32), np.empty(WIDTH, np.int8)
    partial, scale = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for segment in range(a_scales.shape[1]):
        start = segment * step
        for m in range(rows):
            partial[:] = 0
            for k in range(start, min(start + step, length), CHAIN):
                largest[:] = LOWEST
                find_largest(a_exponents, m * length + k, b_exponents, k * WIDTH, largest)
                align(largest, partial, scale, sums)
                add_products(a_values, m * length + k, b_values, k * WIDTH, sums, scale)
                cut_off(sums, scale, partial)
            for j in range(WIDTH):
                total[m, first + j] += (partial[j] * a_scales[m, segment]) * b_scales[segment, j]


@helper
def align(largest, partial, scale, sums):
    """Write scale = 2^(13 - largest exponent, that of partial included), and partial times it, truncated, to sums."""
    for j in range(WIDTH):
        exponent = np.int32(np.int32(np.int32(np.float32(partial[j]).view(np.int32) >> MANTISSA) & BYTE) - BIAS)
        exponent = max(exponent, np.int32(largest[j]))
        scale[j] = np.int32(np.int32(np.int32(KEPT - exponent) + BIAS) << MANTISSA).view(np.float32)
        sums[j] = np.int32(partial[j] * scale[j])


@helper
def cut_off(sums, scale, partial):
    """Write sums / scale to partial, with the mantissa cut to 13 bits."""
    for j in range(WIDTH):
        exact = np.float32(np.float32(sums[j]) / scale[j])
        partial[j] = np.int32(exact.view(np.int32) & CUT).view(np.float32)


@intrinsic
def find_largest(typing_context, a, a_start, b, b_start, largest):
    """largest[j] = max(largest[j], a.flat[a_start + k] + b.flat[b_start + 64 k + j]) over k < 32, all int8."""

    def step(builder, largest, a, b):
        exponent = builder.add(a, b)
        return builder.select(builder.icmp_signed(">", exponent, largest), exponent, largest)

    return types.void(a, a_start, b, b_start, largest), through_chain(step)


@intrinsic
def add_products(typing_context, a, a_start, b, b_start, sums, scale):
    """sums[j] += int32(a.flat[a_start + k] * b.flat[b_start + 64 k + j] * scale[j]) for k < 32, truncated."""

    def step(builder, sums, a, b, scale):
        return builder.add(sums, builder.fptosi(builder.fmul(builder.fmul(a, b), scale), WHOLE))

    return types.void(a, a_start, b, b_start, sums, scale), through_chain(step)


def through_chain(step):
    """Code for `totals = step(totals, a[k], b[k], *constant)` over a chain, 64 totals at a time.

    The totals stay in registers. Plain loops made the compiler keep them in memory: nine times as slow.
    """

    def codegen(context, builder, signature, args):
        def vectors(i, start=None):
            """The array that is argument i, from argument `start` on, as a pointer to vectors of 64."""
            data = cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]).data
            data = data if start is None else builder.gep(data, [args[start]])
            return builder.bitcast(data, ir.VectorType(data.type.pointee, WIDTH).as_pointer())

        first = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        first, rows, place = builder.gep(first, [args[1]]), vectors(2, 3), vectors(4)
        constants = [builder.load(vectors(i), align=4) for i in range(5, len(args))]
        totals = cgutils.alloca_once_value(builder, builder.load(place, align=1))
        with cgutils.for_range(builder, ir.Constant(args[1].type, CHAIN)) as chain:
            a, b = (builder.load(builder.gep(pointer, [chain.index]), align=1) for pointer in (first, rows))
            a = builder.insert_element(ir.Constant(b.type, ir.Undefined), a, ir.Constant(WHOLE.element, 0))
            a = builder.shuffle_vector(a, a, ir.Constant(WHOLE, [0] * WIDTH))  # the same in all 64 places
            builder.store(step(builder, builder.load(totals), a, b, *constants), totals)
        builder.store(builder.load(totals), place, align=1)
        return context.get_dummy_value()

    return codegen
