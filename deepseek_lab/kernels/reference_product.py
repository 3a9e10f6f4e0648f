"""The FP8 product as an H800 is modelled to add it up, in torch: what is right. The other bodies give the same bits.

A tensor core adds 32 products at a time to what it has so far. All 33 numbers are aligned to the largest exponent among
them, and what falls more than 13 bits behind its binary point is cut off, towards zero. The sum is kept in 22 bits
(sign, 8 of exponent, 13 of mantissa), again cut off. Every `step` values along K it is promoted: scaled, and added in
FP32. The same rules, bit for bit, as the preset `hopper` of the package mmaemu.
"""

import torch
from torch import Tensor

CHAIN = 32  # products that are added at once
KEPT = 13  # bits kept behind the binary point
ZERO = -100  # a zero's exponent: below every other


def product(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, step: int) -> Tensor:
    """a [M, K] times b [N, K] transposed, E4M3 codes as uint8 -> [M, N] float32.

    a_scales [M, S], b_scales [N, S] float32: one for each of the S = ceil(K / step) segments along K. Step: a multiple
    of 32. A NaN code (0x7F, 0xFF) makes all of its row of a, or of b, NaN.
        total += (dot * a_scale) * b_scale        rounded three times to FP32, in this order, as the released kernel.py
    """
    check(a, b, a_scales, b_scales, step)
    total = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)
    for segment, start in enumerate(range(0, a.shape[1], step)):
        dot = torch.zeros_like(total, dtype=torch.float64)  # wide enough that nothing is rounded but what is cut off
        for k in range(start, min(start + step, a.shape[1]), CHAIN):
            dot = add_chain(dot, a[:, k : k + CHAIN], b[:, k : k + CHAIN])
        total += (dot.float() * a_scales[:, segment, None]) * b_scales[:, segment]
    return total


def add_chain(partial: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add up to 32 products a [M, k] b [N, k] to partial [M, N] float64, as the tensor core does."""
    products = value(a)[:, None] * value(b)  # [M, N, k]; 8 bits of mantissa: exact
    exponents = torch.where(products == 0, ZERO, exponent(a)[:, None] + exponent(b))
    largest = torch.maximum(exponents.amax(-1), exponent_of(partial))
    unit = power_of_two(largest - KEPT)
    steps = (products / unit[..., None]).trunc().sum(-1) + (partial / unit).trunc()
    total = steps * unit
    unit = power_of_two(exponent_of(total) - KEPT)  # the sum may be longer than its parts
    return (total / unit).trunc() * unit + 0.0  # + 0.0: zero is +0


def value(codes: Tensor) -> Tensor:
    """The numbers that E4M3 codes stand for, float64."""
    return codes.view(torch.float8_e4m3fn).double()


def exponent(codes: Tensor) -> Tensor:
    """The exponents in E4M3 codes; subnormals have that of the smallest normal number, -6."""
    return (codes.int() >> 3 & 15).clamp(min=1) - 7


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2 |x|) of float64 numbers, ZERO where they are zero."""
    return torch.where(x == 0, ZERO, torch.frexp(x).exponent - 1)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float64, written into the exponent's bits: exact on every device."""
    return (exponent.clamp(2 * ZERO, -2 * ZERO).long() + 1023 << 52).view(torch.float64)


def check(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, step: int) -> None:
    """Raise ValueError where shapes do not fit, TypeError for other dtypes: compiled bodies check no index."""
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise TypeError(f"product got {a.dtype} and {b.dtype}; expected E4M3 codes as torch.uint8")
    if a_scales.dtype != torch.float32 or b_scales.dtype != torch.float32:
        raise TypeError(f"product got scales in {a_scales.dtype} and {b_scales.dtype}; expected torch.float32")
    if step < CHAIN or step % CHAIN:
        raise ValueError(f"product got step={step}; products are added {CHAIN} at a time, so choose a multiple of it")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"product got codes {tuple(a.shape)} and {tuple(b.shape)}; expected [M, K] and [N, K]")
    segments = -(-a.shape[1] // step)
    if a_scales.shape != (len(a), segments) or b_scales.shape != (len(b), segments):
        raise ValueError(f"product got scales {tuple(a_scales.shape)} and {tuple(b_scales.shape)}; expected "
                         f"{(len(a), segments)} and {(len(b), segments)}, one per {step} values along K")  # fmt: skip
