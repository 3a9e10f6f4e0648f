"""The FP8 product of reference_product.py on an NVIDIA GPU: what an H800's tensor core adds up, done in plain FP32.

It imitates the accumulator bit for bit, so it uses no tensor core and is no fast product.
"""

from functools import cache

import numpy as np
import torch
from numba import types
from torch import Tensor

from .cuda_device import SIMULATED, bits_of, bring, cuda, inlined, number_of, start, times
from .reference_product import CHAIN, KEPT, check

SIDE = 4 if SIMULATED else 16  # a block of SIDE x SIDE threads computes as many sums
SMALLEST = -12  # exponent of the smallest product, two subnormals; a partial sum is a multiple of 2^-18
ZERO = -20  # a zero's exponent: with the largest, 8, it is at SMALLEST and raises no maximum
NOT_A_NUMBER = 1000  # a NaN's: with any other it is above
INFINITE = 100  # which no number's exponent reaches
CUT = ~((1 << (23 - KEPT)) - 1)  # keeps KEPT bits of a float32's mantissa
NAN = 0x7FC00000


@inlined
def exponent_of(code):
    exponent = max(code >> 3 & 15, 1) - 7
    exponent = exponent if code & 0x7F != 0 else ZERO
    return exponent if code & 0x7F != 0x7F else NOT_A_NUMBER


@inlined
def value_of(code):
    size = code & 0x7F
    whole = size & 7 if size < 8 else size & 7 | 8
    value = np.float32(whole) * number_of((max(size >> 3, 1) - 7 - 3 + 127) << 23)
    return -value if code > 0x7F else value


@inlined
def add_chain(dot, a_values, b_values, a_exponents, b_exponents, row, column):
    """Add CHAIN products to dot; NaN stays NaN."""
    largest = max((bits_of(dot) >> 23 & 0xFF) - 127, SMALLEST)
    for k in range(CHAIN):
        largest = max(largest, a_exponents[k, row] + b_exponents[k, column])
    added = number_of(NAN)
    if largest < INFINITE:
        steps = number_of((127 + KEPT - largest) << 23)
        whole = np.int32(dot * steps)  # cuts towards zero
        for k in range(CHAIN):
            whole = np.int32(whole + np.int32(a_values[k, row] * b_values[k, column] * steps))
        added = number_of(bits_of(np.float32(whole) * number_of((127 - KEPT + largest) << 23)) & CUT)
    return added


@cache
def product_kernel():
    """Kernel (a, b, a_scales, b_scales, step, out) on blocks (M / SIDE, N / SIDE) of SIDE x SIDE threads."""

    @cuda.jit
    def product(a, b, a_scales, b_scales, step, out):
        a_values = cuda.shared.array((CHAIN, SIDE), types.float32)
        b_values = cuda.shared.array((CHAIN, SIDE), types.float32)
        a_exponents = cuda.shared.array((CHAIN, SIDE), types.int32)
        b_exponents = cuda.shared.array((CHAIN, SIDE), types.int32)
        across, down = cuda.threadIdx.x, cuda.threadIdx.y
        m, n = cuda.blockIdx.x * SIDE + down, cuda.blockIdx.y * SIDE + across
        row_of_b = cuda.blockIdx.y * SIDE + down  # the row that this thread fetches
        inside = m < out.shape[0] and n < out.shape[1]
        total = np.float32(0)
        for segment in range(a_scales.shape[1]):
            end = min((segment + 1) * step, a.shape[1])
            dot = np.float32(0)
            for first in range(segment * step, end, CHAIN):
                for k in range(across, CHAIN, SIDE):
                    code_a = np.int32(a[m, first + k]) if m < a.shape[0] and first + k < end else np.int32(0)
                    code_b = (
                        np.int32(b[row_of_b, first + k]) if row_of_b < b.shape[0] and first + k < end else np.int32(0)
                    )
                    a_values[k, down], a_exponents[k, down] = value_of(code_a), exponent_of(code_a)
                    b_values[k, down], b_exponents[k, down] = value_of(code_b), exponent_of(code_b)
                cuda.syncthreads()
                dot = add_chain(dot, a_values, b_values, a_exponents, b_exponents, down, across)
                cuda.syncthreads()
            if inside:
                total += times(times(dot, a_scales[m, segment]), b_scales[n, segment])
        if inside:
            out[m, n] = total

    return product


def product(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, step: int) -> Tensor:
    """a [M, K] times b [N, K] transposed, E4M3 codes -> [M, N] float32; see reference_product.py."""
    check(a, b, a_scales, b_scales, step)
    arguments = bring(a, b, a_scales, b_scales)
    out = torch.zeros(len(a), len(b), dtype=torch.float32, device=arguments[0].device)
    blocks = -(-len(a) // SIDE), -(-len(b) // SIDE)
    start(product_kernel(), blocks, (SIDE, SIDE), *arguments, step, out)
    return out.to(a.device)
