"""What one large value costs the others: the same matrix with outliers of several sizes, scaled in three ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .scaling import BLOCK, BlockScaled, quantize_blocks, quantize_tensor, quantize_tiles

#: The ways of scaling by the name of what shares a scale.
WAYS = {"tensor": quantize_tensor, "128 x 128 block": quantize_blocks, "1 x 128 tile": quantize_tiles}


@dataclass(frozen=True)
class Outlier:
    """One outlier in a matrix, scaled in one way; the outlier itself counts in none of the numbers.

    size: in units of the matrix's root mean square. place: (row, column). way: one of WAYS. error: relative, in the
    Euclidean norm, over all other values. zeros: how many other values became 0 that were not. nbytes: codes and
    scales. tile_errors: the relative error of each 1 x 128 tile [row, ceil(column / 128)], NaN for a tile of zeros.
    """

    size: float
    place: tuple[int, int]
    way: str
    error: float
    zeros: int
    nbytes: int
    tile_errors: Tensor = field(repr=False)


@dataclass(frozen=True)
class OutlierStudy:
    """All records of one matrix: `records[size, place][way]`. shape: (rows, columns). typical: root mean square."""

    shape: tuple[int, int]
    typical: float
    sizes: tuple[float, ...]
    places: tuple[tuple[int, int], ...]
    records: Mapping[tuple[float, tuple[int, int]], Mapping[str, Outlier]] = field(repr=False)

    def errors(self, place: tuple[int, int] | None = None) -> dict[str, list[float]]:
        """Return the errors over `sizes` by way of scaling, at one place, the first unless told."""
        place = self.places[0] if place is None else tuple(place)
        if place not in self.places:
            raise ValueError(f"this study has no outlier at {place}; it has {', '.join(map(str, self.places))}")
        return {way: [self.records[size, place][way].error for size in self.sizes] for way in WAYS}


def outlier_study(
    x: Tensor | None = None,
    sizes: Sequence[float] = (1, 10, 100, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6),
    places: Sequence[tuple[int, int]] | None = None,
    **how,
) -> OutlierStudy:
    """Put an outlier of each size at each place of a matrix, scale it per tensor, block and tile, and record errors.

    x: [row, column], for example activations [token, channel]; unless given, 256 x 512 normal numbers (seed 0). sizes:
    in units of x's root mean square. places: (row, column), unless given one inside and the first and last corner.
    Further arguments are those of `quantize`.
    Raises ValueError for what is no matrix with values, for a place outside it, for no sizes and for outliers that are
    not finite in float32.
    """
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float32) if x is None else x
    x = x.detach().float()
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"outlier_study got shape {tuple(x.shape)}; expected a matrix [row, column] with values")
    rows, columns = x.shape
    places = places or dict.fromkeys([(rows * 2 // 5, columns * 2 // 5), (0, 0), (rows - 1, columns - 1)])
    places = tuple(map(tuple, places))
    for row, column in places:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"place ({row}, {column}) is outside a matrix of {rows} x {columns}")
    sizes, typical = tuple(map(float, sizes)), x.double().square().mean().sqrt().item()
    if not 0 < typical < math.inf:
        raise ValueError("outlier_study got only zeros, or NaN or infinity among its values, and so no typical size; "
                         "pass a matrix with other values")  # fmt: skip
    if not sizes:
        raise ValueError("outlier_study got no sizes; give at least one, in units of the root mean square")
    for size in sizes:
        if not abs(size * typical) <= torch.finfo(torch.float32).max:
            raise ValueError(f"an outlier of {size:g} times {typical:g} is no finite number in float32; a scale cannot "
                             "bring it into range")  # fmt: skip
    records = {
        (size, place): {way: _record(x, size, place, way, typical, how) for way in WAYS}
        for size in sizes
        for place in places
    }
    return OutlierStudy((rows, columns), typical, sizes, places, records)


def _record(x: Tensor, size: float, place: tuple[int, int], way: str, typical: float, how: Mapping) -> Outlier:
    changed = x.clone()
    changed[place] = size * typical
    scaled: BlockScaled = WAYS[way](changed, **how)
    wrong = scaled.dequantize().double() - changed
    wrong[place] = changed[place] = 0  # the outlier itself counts in nothing
    zeros = (changed != 0) & (scaled.codes.float() == 0)
    total, lost = (part.double().norm().item() for part in (changed, wrong))
    error = lost / total if lost else 0.0  # nothing is lost of nothing: the outlier is alone
    return Outlier(size, place, way, error, int(zeros.sum()), scaled.nbytes, (_norms(wrong) / _norms(changed)).float())


def _norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each 1 x 128 tile."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).norm(dim=-1)
