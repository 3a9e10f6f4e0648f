"""Pictures of long sums in short registers: their error over their length, and one sum as it grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .arrange import Scale, scale, y_axis
from .sheet import Line, Sheet, Words, draw
from .style import GREY, PALETTE

_LOOKS = (
    dict(color=PALETTE["gradients"], linestyle="-", marker="o"),
    dict(color=PALETTE["weights"], linestyle="--", marker="s"),
    dict(color=PALETTE["cache"], linestyle="-.", marker="^"),
    dict(color=GREY, linestyle=":", marker="D"),
)


def error_curves(sizes: Sequence[int], errors: Mapping[str, Sequence[float]], xlabel: str, ax=None):
    """Draw relative errors over sizes, both axes logarithmic, each curve with its name at its end; return the Axes.

    sizes: powers of two, for example products in a sum. errors: relative errors at each size, by the curve's name.
    Raises ValueError for no curve, for more than can be told apart and for unequal lengths.
    """
    import matplotlib.pyplot as plt

    if not 1 <= len(errors) <= len(_LOOKS):
        raise ValueError(f"error_curves got {len(errors)} curves; give 1 to {len(_LOOKS)}, which can be told apart")
    for name, values in errors.items():
        if len(values) != len(sizes):
            raise ValueError(f"error_curves got {len(values)} errors of {name!r} for {len(sizes)} sizes; give one each")
    ax = ax if ax is not None else plt.subplots()[1]
    for look, (name, values) in zip(_LOOKS, errors.items(), strict=False):
        ax.plot(sizes, values, markersize=5, **look)
        place = dict(xytext=(9, 0), textcoords="offset points", va="center", annotation_clip=False)
        ax.annotate(name, (sizes[-1], values[-1]), color=look["color"], **place)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel="relative error", xlim=(sizes[0] / 1.2, sizes[-1] * 1.2))
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, ha="right")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.10g} %")
    ax.minorticks_off()
    ax.grid(axis="y")
    return ax


HEIGHT = 436
LEFT, RIGHT = 70, 560
SUMS, ERRORS = (84, 246), (286, 396)  # top and bottom of the two panels, in pixels


def accumulator(records: Mapping, data=None, bits=None, every=None, ax=None):
    """Draw one long sum in a short register and beside it the exact one; return the Axes. Static twin of the widget.

    records: {(data, bits, every): record}, the register's fraction bits and products between promotions (0: never);
    a record has `.products`, and at each of them `.exact` and `.register` (sums) and `.error` (a share). data, bits and
    every choose one, the first record unless told. The Axes count in pixels of a picture 580 wide.
    """
    return draw(accumulator_sheet(records, *choose(records, data, bits, every)), ax)


def choose(records: Mapping, data=None, bits=None, every=None) -> tuple[str, int, int]:
    """Return the key of the record to show. Raises ValueError for none, other keys and empty records."""
    if not records:
        raise ValueError("accumulator got no records; give {(data, bits, every): record}")
    for key in records:
        if not isinstance(key, tuple) or len(key) != 3:
            raise ValueError(f"accumulator got a record under {key!r}; give {{(data, bits, every): record}}")
    first = next(iter(records))
    key = tuple(own if given is None else given for own, given in zip(first, (data, bits, every), strict=True))
    if key not in records:
        raise ValueError(f"accumulator has no record of {key}; choose one of {', '.join(map(str, records))}")
    if not any(records[key].products):
        raise ValueError(f"the record of {key} is of no products; add up at least one")
    return key


def accumulator_sheet(records: Mapping, data: str, bits: int, every: int) -> Sheet:
    """Plan the picture: two sums above, their difference below."""
    record = records[data, bits, every]
    across = Scale(0, record.products[-1], LEFT, RIGHT, record.products[-1] / 4)
    sums = [value for (kind, _, _), r in records.items() if kind == data for value in (*r.exact, *r.register)]
    up = scale(min(0, *sums), max(0, *sums), SUMS[1], SUMS[0])
    percent = [100 * error for error in record.error]
    down = scale(min(0, *percent), max(0, *percent), ERRORS[1], ERRORS[0], most=4)
    promoted = f"promoted every {every}" if every else "never promoted"
    words = f"{data} data, {bits} fraction bits, {promoted}"
    end = f"after {record.products[-1]:,} products {record.register[-1]:,.1f}, exact {record.exact[-1]:,.1f}"
    blue, red = PALETTE["weights"], PALETTE["gradients"]
    shapes = [
        Words(14, 22, f"{words}: {_signed(percent[-1])}", bold=True, kind="headline"),
        Words(14, 44, end, kind="end"),
        Line(((14, 60), (40, 60)), GREY, 5),
        Words(46, 64, "exact sum", size=12),
        Line(((130, 60), (156, 60)), blue, 2, (7, 3)),
        Words(162, 64, "register (with the total, if promoted)", size=12),
        *y_axis(up, LEFT, RIGHT),
        _curve(record.products, record.exact, across, up, GREY, 5, "exact"),
        _curve(record.products, record.register, across, up, blue, 2, "register", (7, 3)),
        Words(14, ERRORS[0] - 14, "error, % of the largest exact sum so far", size=12),
        *y_axis(down, LEFT, RIGHT),
        _curve(record.products, percent, across, down, red, 2, "error"),
        *(Words(across.pixel(t), ERRORS[1] + 18, f"{t:,.0f}", "middle", size=12) for t in across.ticks()),
        Words((LEFT + RIGHT) / 2, ERRORS[1] + 34, "products added", "middle", size=12),
    ]
    return Sheet(HEIGHT, f"{words}: error {_signed(percent[-1])}, {end}", tuple(shapes))


def _signed(percent: float) -> str:
    """An error in words, with a proper minus sign."""
    if math.isnan(percent):
        return "not a number"
    return f"{percent:+.2g} %".replace("-", "\N{MINUS SIGN}") if abs(percent) >= 1e-4 else "below 0.0001 %"


def _curve(products, values, across: Scale, up: Scale, colour: str, line: float, kind: str, dashes=None) -> Line:
    points = tuple((across.pixel(n), up.pixel(value)) for n, value in zip(products, values, strict=True))
    return Line(points, colour, line, dashes, kind=kind)
