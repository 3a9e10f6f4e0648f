"""What one outlier does to the error of everything else: curves, and the tiles of one matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from deepseek_lab.precision import BLOCK, Outlier, OutlierStudy, outlier_study

from .accumulation import error_curves
from .arrange import spread
from .formats import power
from .sheet import Box, Line, Shape, Sheet, Words, draw
from .style import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 338
#: Shades of a tile by its relative error: the error from which on each is used.
SHADES = {0.0: "#EFEFEF", 0.04: "#F5C9A8", 0.08: PALETTE["gradients"], 0.4: "#4D1F00"}
_LEVELS = ("under 4 %", "4 % or more", "8 % or more", "40 % or more")
_LEFT, _MAP_Y, _MAP_WIDTH, _MAP_HEIGHT, _GAP = 14, 74, 172, 130, 18
_THINNEST = 2.4  # pixels: a single spoilt row of a large matrix is still seen


def error_against_outlier(
    sizes: Sequence[float], errors: Mapping[str, Sequence[float]], ax: Axes | None = None
) -> Axes:
    """Draw the relative error of everything but the outlier over the size of the outlier, both logarithmic.

    sizes: of the outlier, in units of the typical value. errors: 0.02 is 2 %, one per size, by the name of the way of
    scaling; the name stands at the end of its line. Raises ValueError where `error_curves` does.
    """
    ax = error_curves(sizes, errors, "size of the outlier, in units of the typical value", ax)
    powers = [math.log10(error) for curve in errors.values() for error in curve if error > 0]
    low, high = math.floor(min(powers, default=-2)), max(math.ceil(max(powers, default=0)), -1)
    ax.set(ylim=(10.0**low, 1.6 * 10.0**high), ylabel="relative error of the rest")
    ax.set_xscale("log")
    decades = range(math.ceil(math.log10(sizes[0])), math.floor(math.log10(sizes[-1])) + 1)
    ax.set_xticks([10.0**n for n in decades], [f"10{power(n)[1:]}" for n in decades], rotation=0, ha="center")
    labels = sorted(ax.texts[-len(errors) :], key=lambda label: label.xy[1])  # moved apart where curves end together
    ends = [math.log10(max(label.xy[1], 10.0**low)) for label in labels]
    for label, end in zip(labels, spread(ends, 0.09 * (high - low), low, high), strict=True):
        label.xy = (label.xy[0], 10.0**end)
    return ax


def outlier_explorer(
    study: OutlierStudy | None = None,
    size: float = 100_000,
    place: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw where one outlier spoils a matrix scaled per tensor, block and tile; the static twin of the widget.

    study: from `precision.outlier_study`, whose default it is unless told. size, place: of the outlier, the first place
    unless told. The Axes count in pixels of a picture 580 wide. Raises ValueError for what is not in the study.
    """
    study = outlier_study() if study is None else study
    return draw(outlier_sheet(study, size, study.places[0] if place is None else place), ax)


def outlier_sheet(study: OutlierStudy, size: float, place: tuple[int, int]) -> Sheet:
    """Plan the picture: one map of the matrix for each way of scaling, its tiles shaded by their error."""
    if (size, place) not in study.records:
        sizes, places = ", ".join(f"{s:g}" for s in study.sizes), ", ".join(map(str, study.places))
        raise ValueError(f"no outlier of size {size:g} at {place} in this study; it has sizes {sizes} at {places}")
    records = study.records[size, place]
    rows, columns = study.shape
    title = f"one value of {size:,.10g} times the typical size, at row {place[0]}, column {place[1]}"
    shapes: list[Shape] = [
        Words(_LEFT, 22, title, bold=True, kind="headline"),
        Words(
            _LEFT, 42, f"each map: the matrix, {rows} rows and {columns} columns; the ring marks the outlier", size=12
        ),
    ]
    for number, record in enumerate(records.values()):
        shapes += _map(record, study.shape, _LEFT + number * (_MAP_WIDTH + _GAP))
    shapes.append(Words(_LEFT, HEIGHT - 38, "relative error of the other values in each 1 x 128 tile:", size=12))
    for number, (shade, words) in enumerate(zip(SHADES.values(), _LEVELS, strict=True)):
        x = _LEFT + 136 * number
        shapes += [Box(x, HEIGHT - 26, 13, 13, shade, INK, line=0.7), Words(x + 19, HEIGHT - 15, words, size=12)]
    said = "; ".join(
        f"per {way}: error {_percent(r.error)}, {r.zeros:,} zeros, {r.nbytes:,} bytes" for way, r in records.items()
    )
    return Sheet(HEIGHT, f"{title}: {said}", tuple(shapes))


def _percent(error: float) -> str:
    return f"{100 * error:#.3g} %"


def _map(record: Outlier, shape: tuple[int, int], left: float) -> list[Shape]:
    """The matrix as its tiles, with the tiles or blocks that share a scale, and what it comes to in words below."""
    high, wide = _MAP_HEIGHT / shape[0], _MAP_WIDTH / shape[1]
    title = "one scale for all" if record.way == "tensor" else f"one per {record.way}"
    out: list[Shape] = [Words(left, _MAP_Y - 11, title, bold=True, size=12)]
    out.append(Box(left, _MAP_Y, _MAP_WIDTH, _MAP_HEIGHT, SHADES[0.0]))
    thinnest = _THINNEST if record.way.endswith("tile") else 0
    for start, end, tile, shade in _runs(record):
        width = min(BLOCK, shape[1] - BLOCK * tile) * wide
        top = min(_MAP_Y + start * high, _MAP_Y + _MAP_HEIGHT - thinnest)
        spoilt = dict(fill=shade, kind="spoilt", name=f"{record.way} {start} {end} {tile}")
        out.append(Box(left + BLOCK * tile * wide, top, width, max((end - start) * high, thinnest), **spoilt))
    if record.way != "tensor":
        xs = [left + column * wide for column in range(BLOCK, shape[1], BLOCK)]
        out += [Line(((x, _MAP_Y), (x, _MAP_Y + _MAP_HEIGHT)), "#8C8C8C", 0.7) for x in xs]
    if record.way.endswith("block"):
        ys = [_MAP_Y + row * high for row in range(BLOCK, shape[0], BLOCK)]
        out += [Line(((left, y), (left + _MAP_WIDTH, y)), "#8C8C8C", 0.7) for y in ys]
    out.append(Box(left, _MAP_Y, _MAP_WIDTH, _MAP_HEIGHT, edge=INK))
    x, y = left + (record.place[1] + 0.5) * wide, _MAP_Y + (record.place[0] + 0.5) * high
    ring = tuple((x + 6 * math.cos(a * math.pi / 8), y + 6 * math.sin(a * math.pi / 8)) for a in range(17))
    out += [Line(ring, "white", 4), Line(ring, INK, 1.8, kind="outlier")]
    y = _MAP_Y + _MAP_HEIGHT + 24
    words = (f"error {_percent(record.error)}", f"{record.zeros:,} became 0", f"{record.nbytes:,} bytes")
    return out + [Words(left, y + 20 * i, text, bold=not i, kind="result") for i, text in enumerate(words)]


def _runs(record: Outlier) -> list[tuple[int, int, int, str]]:
    """Return (first row, end, tile column, shade) for rows of one shade below each other, the palest left out."""
    out = []
    for tile, errors in enumerate(record.tile_errors.T.tolist()):
        shades = [next((SHADES[e] for e in reversed(SHADES) if error >= e), SHADES[0.0]) for error in errors]
        row = 0
        for shade, same in groupby(shades):
            count = len(list(same))
            if shade != SHADES[0.0]:
                out.append((row, row + count, tile, shade))
            row += count
    return out
