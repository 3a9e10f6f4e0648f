"""Bring a tensor into the range of eight bits: codes, and one scale for each part of it.

activations   1 x 128 tiles: a token's 128 neighbouring channels share a scale
weights       128 x 128 blocks
gradients     1 x 128 for the product that goes on backwards, 128 x 1 (along the tokens) for the weights' gradient

Scales are computed from the tensor itself: scale = max|tile| / 448, code = x / scale; value = code * scale.

Source: DeepSeek-V3 report, section 3.3.2; README_WEIGHTS.md of the released weights, whose `weight_scale_inv` is what
the codes are multiplied by, in spite of its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .formats import E4M3, E5M2, FloatFormat, find_format

BLOCK = 128
DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


class BlockScaled(NamedTuple):
    """A tensor as codes [..., row, column] and scales, one for each `tile` (rows, columns) of it.

    codes: float8_e4m3fn or float8_e5m2. scales: [ceil(row / rows), ceil(column / columns)] float32. Ragged edges belong
    to the last tile. Tiles of one row allow any number of leading axes, in the scales too.
    """

    codes: Tensor
    scales: Tensor
    tile: tuple[int, int] = (BLOCK, BLOCK)

    @property
    def format(self) -> FloatFormat:
        """E4M3 or E5M2."""
        return {dtype: find_format(name) for name, dtype in DTYPES.items()}[self.codes.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def T(self) -> BlockScaled:
        """The transposed matrix, codes contiguous again: 1 x 128 tiles become 128 x 1. ValueError for other shapes."""
        if self.codes.dim() != 2:
            raise ValueError(f".T got codes of shape {tuple(self.codes.shape)}; only a matrix [row, column] has one")
        return BlockScaled(self.codes.T.contiguous(), self.scales.T.contiguous(), self.tile[::-1])

    def check(self) -> None:
        """Raise TypeError for codes that are not FP8, ValueError for tiles and scales that do not fit them."""
        shape = self.codes.shape
        if self.codes.dtype not in DTYPES.values():
            raise TypeError(f"codes in {self.codes.dtype}; expected float8_e4m3fn or float8_e5m2, as quantize returns")
        check_tile("BlockScaled", shape, self.tile)
        sides = zip(shape[-2:], self.tile[-len(shape) :], strict=True)
        expected = (*shape[:-2], *(-(-size // side) for size, side in sides))
        if self.scales.shape != expected:
            raise ValueError(f"scales of shape {tuple(self.scales.shape)} beside codes {tuple(shape)}; "
                             f"expected {expected}, one per {self.tile[0]} x {self.tile[1]} tile")  # fmt: skip

    def dequantize(self) -> Tensor:
        """Return codes times scales, float32, without gradients. Raises TypeError and ValueError as `check` does."""
        self.check()
        codes, scales = as_matrix(self.codes), as_matrix(self.scales.float())
        codes = codes.view(torch.uint8)
        return kernels.body_for(codes).dequantize(codes, scales, self.format, self.tile).view(self.codes.shape)

    def to_published(self, name: str) -> dict[str, Tensor]:
        """Return the two tensors of a released checkpoint: `name` and `name_scale_inv`. Blocks of 128 x 128 only."""
        if self.tile != (BLOCK, BLOCK) or self.format != E4M3:
            raise ValueError(f"published weights are E4M3 in {BLOCK} x {BLOCK} blocks, this is {self.format.name} in "
                             f"{self.tile[0]} x {self.tile[1]} tiles; use quantize_blocks")  # fmt: skip
        return {name: self.codes, f"{name}_scale_inv": self.scales}

    @classmethod
    def from_published(cls, tensors: Mapping[str, Tensor], name: str) -> BlockScaled:
        """Return the weight `name` of a released checkpoint from its two tensors.

        Raises ValueError where one is missing or they do not fit, TypeError where `name` is not FP8.
        """
        missing = [key for key in (name, f"{name}_scale_inv") if key not in tensors]
        if missing:
            raise ValueError(f"the checkpoint has no {missing[0]}; an FP8 weight is stored with its scales beside it")
        weight = cls(tensors[name], tensors[f"{name}_scale_inv"])
        weight.check()
        return weight


def quantize_tiles(x: Tensor, axis: int = -1, **how) -> BlockScaled:
    """Return x in tiles of 128 along `axis`: 1 x 128 for -1 (activations), 128 x 1 for -2 (weight gradients).

    x: [..., column] for -1, [row, column] for -2. Further arguments are those of `quantize`.
    """
    if axis not in (-1, -2):
        raise ValueError(f"quantize_tiles got axis={axis}; tiles run along the last axis (-1) or the one before (-2)")
    return quantize(x, (1, BLOCK) if axis == -1 else (BLOCK, 1), **how)


def quantize_blocks(w: Tensor, **how) -> BlockScaled:
    """Return a matrix [row, column] in blocks of 128 x 128, as weights are. Further arguments: see `quantize`."""
    return quantize(w, (BLOCK, BLOCK), **how)


def quantize_tensor(x: Tensor, **how) -> BlockScaled:
    """Return a matrix [row, column] with a single scale. Further arguments: see `quantize`."""
    if isinstance(x, Tensor) and x.dim() != 2:
        raise ValueError(f"quantize_tensor got shape {tuple(x.shape)}; expected a matrix [row, column]")
    return quantize(x, tuple(max(size, 1) for size in getattr(x, "shape", ())), **how)


def quantize(
    x: Tensor,
    tile: tuple[int, int],
    scale: str = "fp32",
    fmt: FloatFormat | str = E4M3,
    nonfinite: str = "refuse",
) -> BlockScaled:
    """Return a tensor as FP8 codes and one scale per tile (rows, columns).

        scale = max(max|tile|, 1e-4) / fmt.max        code = nearest(x / scale)        in FP32

    x: [row, column], or any shape but () where tiles are one row high; taken as float32 and left as it is.
    scale: "fp32", or "ue8m0" for powers of two, rounded up so that no code overflows (a value near 3.4e38 may, once
    it is scaled back). fmt: E4M3 or E5M2.
    nonfinite: "refuse" NaN and infinity, or "pass" them on: their whole tile is lost, as with the released kernels.
    Raises ValueError for shapes without such tiles, unknown names and, unless passed on, a NaN or an infinity;
    TypeError for tensors that are not floating point.
    """
    fmt = find_format(fmt)
    _check(x, tile, scale, fmt, nonfinite)
    matrix = as_matrix(x).float().contiguous()
    codes, scales = kernels.body_for(x).quantize(matrix, fmt, tuple(tile), scale == "ue8m0")
    if nonfinite == "refuse" and scales.numel() and not scales.amax() < math.inf:  # NaN is not either
        where = (~torch.isfinite(x.float())).nonzero()[0].tolist()
        raise ValueError(f"quantize got {x[tuple(where)].item()} at {where}; a scale cannot bring NaN or infinity into "
                         'range. Find out where it came from, or pass nonfinite="pass" to lose its tile')  # fmt: skip
    if x.dim() != 2:  # tiles of one row: the leading axes come back
        scales = scales.view(*x.shape[:-1], scales.shape[-1])
    return BlockScaled(codes.view(DTYPES[fmt.name]).view(x.shape), scales, tuple(tile))


def _check(x: Tensor, tile: tuple[int, int], scale: str, fmt: FloatFormat, nonfinite: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize got {kind}; pass a tensor of floating-point numbers")
    check_tile("quantize", x.shape, tile)
    if fmt not in (E4M3, E5M2):
        raise ValueError(f"quantize got {fmt.name}; scales are for eight bits: choose E4M3 or E5M2")
    if scale not in ("fp32", "ue8m0"):
        raise ValueError(f'scale={scale!r} is unknown; choose "fp32" or "ue8m0"')
    if nonfinite not in ("refuse", "pass"):
        raise ValueError(f'nonfinite={nonfinite!r} is unknown; choose "refuse" or "pass"')


def check_tile(asking: str, shape: torch.Size, tile: tuple[int, int]) -> None:
    """Raise ValueError where a tensor of this shape has no such tiles: higher ones would straddle two matrices."""
    sides = tile if isinstance(tile, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{asking} got tile={tile}; expected two whole numbers from 1 up, (rows, columns)")
    if len(shape) != 2 and (tile[0] != 1 or not shape):
        raise ValueError(f"{asking} got shape {tuple(shape)}; expected a matrix [row, column] for "
                         f"{tile[0]} x {tile[1]} tiles")  # fmt: skip


def as_matrix(x: Tensor) -> Tensor:
    """View a tensor as [row, column], its last axis the columns; no gradients pass."""
    return torch.atleast_2d(x.detach()).flatten(0, -2)
