"""E4M3 codes that are hard to add up, and what mmaemu makes of them, which shares no code with ours."""

import math

import mmaemu
import torch


def every(*shape, seed):
    """Any finite code: all exponents, subnormals and both zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, shape, generator=generator, dtype=torch.uint8)
    return torch.where(codes >= 0x7F, codes + 1, codes)  # 0x7F is left out, 0xFE the last


def subnormals(*shape, seed):
    return every(*shape, seed=seed) & 0x87


def mostly_zeros(*shape, seed):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.1
    return every(*shape, seed=seed).where(keep, 0)


def positive(*shape, seed):
    return every(*shape, seed=seed) & 0x7F


def far_apart(*shape, seed):
    """One in ten is among the largest numbers, the others are among the smallest."""
    codes = every(*shape, seed=seed)
    large = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.1
    return torch.where(large, (codes | 0x70) & 0xFE, codes & 0x8F)


def opposites(distance):
    """Codes whose products cancel in pairs, `distance` apart along K. An odd seed makes b, an even one a."""

    def make(*shape, seed):
        codes = every(*shape, seed=seed)
        first = torch.arange(shape[1]) // distance % 2 == 0
        return codes.where(first, codes.roll(distance, 1) ^ (0x80 if seed % 2 else 0))  # signs alternate in b alone

    return make


CODES = {
    "every code": every,
    "subnormals": subnormals,
    "nine of ten are zero": mostly_zeros,
    "positive": positive,
    "far apart": far_apart,
    "cancelling in a chain": opposites(1),
    "cancelling a chain later": opposites(32),
}


def operands(kind, m, n, k, step, seed=0):
    """Codes a [m, k] and b [n, k], and scales of very different sizes for each `step` along k."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (CODES[kind](rows, k, seed=2 * seed + i) for i, rows in enumerate((m, n)))
    scales = (torch.randn(rows, math.ceil(k / step), generator=generator).mul(3).exp() for rows in (m, n))
    return a, b, *scales, step


def by_mmaemu(a, b, a_scales, b_scales, step):
    """Each segment as the tensor cores of an H100 in mmaemu, then scaled and added in FP32 in the released order."""
    total = torch.zeros(len(a), len(b))
    for segment, (x, y) in enumerate(zip(a.split(step, 1), b.split(step, 1), strict=True)):
        x, y = (codes.contiguous().view(torch.float8_e4m3fn) for codes in (x, y))
        dot = mmaemu.accumulate(x, y, use_fast_accum=True, profile="hopper", splitk=1)
        total += (dot * a_scales[:, segment, None]) * b_scales[:, segment]
    return total


def differing(x, y):
    """How many of two equally shaped float32 results have other bits; any NaN is as good as another."""
    assert x.shape == y.shape and x.dtype == y.dtype == torch.float32
    return int(((x.view(torch.int32) != y.view(torch.int32)) & ~(x.isnan() & y.isnan())).sum())
