"""The product of two FP8 matrices, added up exactly enough or as the tensor cores of an H800 do.

What DeepSeek reports of that hardware (V3 report, 3.3.2 and 3.5.2; Insights paper, 3.1.1): 32 products are aligned to
the largest exponent among them, about 14 bits are kept and the rest is truncated, and the sum goes into registers of 22
bits (1 sign, 8 exponent, 13 mantissa). Over K = 4096 values errors came close to 2 %. So every 128 values the partial
sums are promoted: copied to FP32, multiplied there by the scales, and added.

"h800" is a model of it: the rules of the preset `hopper` of the package mmaemu, whose author found them to give the
recorded outputs of an H100 bit for bit. That was not checked here. Open is also whether an H800 aligns the partial sum
together with the products and truncates towards zero, as the model does: the report speaks of a shift filled with the
sign, which would truncate downwards. Later GPUs keep more bits.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import kernels
from .formats import E4M3
from .scaling import BLOCK, BlockScaled, as_matrix

CHAIN = 32  # values along K that one instruction multiplies and adds
ACCUMULATORS = ("fp32", "h800")


def fp8_matmul(
    a: BlockScaled,
    b: BlockScaled,
    accumulator: str = "fp32",
    promote_every: int | None = BLOCK,
) -> Tensor:
    """Return a @ b.T in float32: a [..., M, K] times b [N, K], which lies as the weight of a linear layer does.

    accumulator: "fp32" brings both back to float32 and takes one product of torch, E5M2 allowed. "h800" adds up codes
    as described above, and every `promote_every` values along K
        total += (sum * scale of a) * scale of b        in FP32, as the released kernel.py
    promote_every: a multiple of 32. As it is there that scales are applied, it must divide the width of tiles along K,
    unless the scale is the same all along K. None promotes once, at the end. It does nothing to "fp32".
    Raises TypeError for operands that are not BlockScaled; ValueError for shapes, devices, formats and scales that do
    not fit together, and for unknown accumulators.
    """
    _check(a, b, accumulator)
    if accumulator == "fp32":
        return without_autocast(torch.matmul, a.dequantize(), b.dequantize().T)
    step = _segment(a, b, promote_every)
    (a_codes, a_scales), (b_codes, b_scales) = (_rows(x, step) for x in (a, b))
    product = kernels.body_for(a_codes).product(a_codes, b_codes, a_scales, b_scales, step)
    return product.view(*a.codes.shape[:-1], len(b_codes))


def without_autocast(multiply: Callable[..., Tensor], a: Tensor, *more: Tensor) -> Tensor:
    """Return multiply(a, *more) in the dtype of its operands, where autocast would silently take fewer bits."""
    kind = a.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return multiply(a, *more)
    with torch.autocast(kind, enabled=False):
        return multiply(a, *more)


@cache
@_disable_current_modes()  # whoever listens to torch would slow both down, and take these products for the model's
def fast_bf16() -> bool:
    """Whether this CPU multiplies BF16 matrices clearly faster than float32 ones: measured once, in milliseconds.

    So it is where the CPU has instructions for it (AVX512_BF16, AMX), which add up in float32. torch on a CPU gives
    such a product in BF16 only.
    """
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(256, 512, dtype=dtype, device="cpu")
        seconds.append(min(timeit.repeat(lambda a=a: without_autocast(torch.matmul, a, a.T), number=1, repeat=6)))
    return seconds[0] < 0.7 * seconds[1]


def _segment(a: BlockScaled, b: BlockScaled, promote_every: int | None) -> int:
    """How many values along K share their scales and are added before they are promoted."""
    length = a.codes.shape[-1]
    widths = [x.tile[1] for x in (a, b) if x.tile[1] < length]  # those whose scales change along K
    if promote_every is None and not widths:
        return max(length + -length % CHAIN, CHAIN)
    if promote_every is not None and (not isinstance(promote_every, int) or promote_every < 1 or promote_every % CHAIN):
        raise ValueError(f"promote_every={promote_every!r}; an instruction adds {CHAIN} products, so choose a multiple "
                         f"of {CHAIN}, or None")  # fmt: skip
    if promote_every is None or any(width % promote_every for width in widths):
        change = " and ".join(str(width) for width in sorted(set(widths)))
        raise ValueError(f"promote_every={promote_every} with scales that change every {change} values along K: sums "
                         "are multiplied by their scales when they are promoted. Choose a number that divides the "
                         "width of the tiles, or one scale for all of K, as quantize_tensor gives")  # fmt: skip
    return promote_every


def _rows(x: BlockScaled, step: int) -> tuple[Tensor, Tensor]:
    """Codes as uint8 [row, K] and scales [row, segment]: those of `step` values along K."""
    codes, scales = as_matrix(x.codes), as_matrix(x.scales.float())
    rows = torch.arange(len(codes), device=scales.device) // x.tile[0]
    tiles = torch.arange(0, codes.shape[1], step, device=scales.device) // x.tile[1]
    return codes.view(torch.uint8), scales[rows][:, tiles]


def _check(a: BlockScaled, b: BlockScaled, accumulator: str) -> None:
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, BlockScaled):
            raise TypeError(f"fp8_matmul got {type(x).__name__} for {name}; expected BlockScaled, as quantize_tiles "
                            "and quantize_blocks return")  # fmt: skip
        x.check()
    if accumulator not in ACCUMULATORS:
        raise ValueError(f"accumulator={accumulator!r} is unknown; choose one of {', '.join(ACCUMULATORS)}")
    if b.codes.dim() != 2 or a.codes.shape[-1] != b.codes.shape[1]:
        raise ValueError(f"fp8_matmul got shapes {tuple(a.codes.shape)} and {tuple(b.codes.shape)}; expected [..., K] "
                         "and [N, K] with one K: b is transposed here, as nn.Linear does with its weight")  # fmt: skip
    if len({part.device for part in (a.codes, a.scales, b.codes, b.scales)}) > 1:
        raise ValueError(f"fp8_matmul got operands on {a.codes.device} and {b.codes.device} (scales on "
                         f"{a.scales.device} and {b.scales.device}); move them to one device")  # fmt: skip
    if accumulator == "h800" and not a.format == b.format == E4M3:
        raise ValueError(f'accumulator="h800" got {a.format.name} and {b.format.name}; V3 multiplies E4M3 only, and so '
                         'does this model. Quantize with fmt=E4M3, or take accumulator="fp32"')  # fmt: skip
