"""The roofline: the most operations per second that a machine does for each byte it reads, and what lies below it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from deepseek_lab.units import format_bytes, format_flops

from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_COLOURS = [PALETTE[part] for part in ("weights", "gradients", "cache", "moments")]
_DASHES = ("-", "--", "-.", ":")
_RING = dict(marker="o", markersize=9, color="white")
_GROUND = dict(facecolor="white", edgecolor="none", pad=0.5)
_TWO_LINES = 0.145  # of the height: what two lines of text need
_MANY = 4  # points that need a higher picture
_CROSSED = 400  # a roof behind a label is as bad as so many square pixels of text
_LINE = dict(arrowstyle="-", color=GREY, linewidth=1.2, shrinkA=0, shrinkB=5)
#: Where the name of a point may stand, in points (1/72 inch) from it: beside it, then further off with a line to it.
_BESIDE = ((9, -8, "left", "top"), (-9, 8, "right", "bottom"), (9, 8, "left", "bottom"))
_FURTHER = tuple(
    (9 * side, -8 - 9 * step, align, "top") for step in range(1, 10) for side, align in ((1, "left"), (-1, "right"))
)


def roofline(
    machines: Mapping[str, tuple[float, float]],
    points: Mapping[str, float | tuple[float, float]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the roof of each machine over FLOP per byte, both logarithmic, with points named beside them; return Axes.

    machines: (FLOP/s at most, bytes/s at most) by name; the ridge, where the roof bends, is the first over the second.
    points: FLOP per byte by name, drawn as a ring on the roof of the first machine, which is the most it could reach;
    or (FLOP per byte, measured FLOP/s), drawn as a diamond where it was measured. The picture holds up to 4 machines.
    Raises ValueError for no machine, more than that, and numbers that are not above 0.
    """
    import matplotlib.pyplot as plt

    points = dict(points or {})
    _check(machines, points)
    size = plt.rcParams["figure.figsize"] if len(points) < _MANY else (7.2, 4.6)
    ax = ax if ax is not None else plt.subplots(figsize=size)[1]
    ridges = {name: peak / bandwidth for name, (peak, bandwidth) in machines.items()}
    peak, bandwidth = next(iter(machines.values()))
    placed = {n: p if isinstance(p, tuple) else (p, min(peak, p * bandwidth)) for n, p in points.items()}
    _frame(ax, machines, ridges, placed)
    for name, colour, dashes in zip(machines, _COLOURS, _DASHES, strict=False):
        peak, bandwidth = machines[name]
        xs = (ax.get_xlim()[0], ridges[name], ax.get_xlim()[1])
        ax.plot(xs, [min(peak, x * bandwidth) for x in xs], color=colour, linestyle=dashes, label=name, zorder=3)
    _name_roofs(ax, machines)
    for name, (x, y) in placed.items():
        look = dict(marker="D", markersize=7, color=INK) if isinstance(points[name], tuple) else _RING
        ax.plot([x], [y], linestyle="none", markeredgecolor=INK, markeredgewidth=1.6, zorder=4, label=name, **look)
    said = {n: f": {format_flops(y)}/s" if isinstance(points[n], tuple) else f"\n{_short(x)} FLOP/byte"
            for n, (x, y) in placed.items()}  # fmt: skip
    _name_points(ax, placed, said)
    return ax


def _frame(ax: Axes, machines: Mapping, ridges: Mapping[str, float], placed: Mapping[str, tuple[float, float]]) -> None:
    """Give both axes room for all and their names, and say on which side of the first ridge what is scarce."""
    xs, peaks = [*ridges.values(), *(x for x, _ in placed.values())], [peak for peak, _ in machines.values()]
    ridge = next(iter(ridges.values()))
    left = 10.0 ** math.floor(math.log10(min(0.6, *(0.6 * x for x in xs), ridge / 40)))
    below = 20 if len(placed) < _MANY else 200  # room for the names of points
    bottom = min([left * min(b for _, b in machines.values()), *(y / below for _, y in placed.values())])
    crowded = sum(peak > max(peaks) / 30 for peak in peaks)
    top = 10.0 ** math.ceil(math.log10(3 * 10**crowded * max(peaks)))
    ax.set(xscale="log", yscale="log", xlim=(left, 60 * max(xs)))
    ax.set(ylim=(10.0 ** math.floor(math.log10(bottom)), top), ylabel="FLOP per second")
    ax.set(xlabel="FLOP per byte read from memory")
    ax.xaxis.set_major_formatter(lambda value, _: _short(value))
    ax.yaxis.set_major_formatter(lambda value, _: format_flops(value, 0))
    ax.minorticks_off()
    ax.grid()
    ax.axvline(ridge, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for words, anchor, shift in (("bound by memory", "right", -6), ("bound by arithmetic", "left", 6)):
        place = dict(xytext=(shift, -4), textcoords="offset points", va="top", ha=anchor)
        ax.annotate(words, (ridge, 1), xycoords=("data", "axes fraction"), fontweight="bold", **place)


def _name_roofs(ax: Axes, machines: Mapping[str, tuple[float, float]]) -> None:
    """Write each machine's name at the right end of its roof, above the roofs that leave it no room."""
    room, edge = _two_lines(ax), 0.0
    colours = dict(zip(machines, _COLOURS, strict=False))
    peaks = sorted(peak for peak, _ in machines.values())
    for name, (peak, bandwidth) in sorted(machines.items(), key=lambda item: item[1][0]):
        at = max(peak, edge)
        for other in peaks:
            at = other if at < other < at * room else at
        edge = at * room
        words = f"{name}: {format_flops(peak)}/s, {format_bytes(bandwidth, 'GB', 2)}/s\n"
        words += f"ridge {_short(peak / bandwidth)} FLOP/byte"
        place = dict(xytext=(-2, 4), textcoords="offset points", ha="right", va="bottom", bbox=_GROUND, zorder=2)
        ax.annotate(words, (ax.get_xlim()[1], at), color=colours[name], linespacing=1.1, **place)


def _name_points(ax: Axes, placed: Mapping[str, tuple[float, float]], said: Mapping[str, str]) -> None:
    """Write each point's name and what is said of it where it hides nothing, as near as that allows."""
    ax.figure.draw_without_rendering()  # only now do the axes have their final size
    hides = _Hidden(ax, placed.values())
    for name, point in sorted(placed.items(), key=lambda item: (-item[1][1], -item[1][0])):
        place = dict(textcoords="offset points", linespacing=1.1, bbox=_GROUND, zorder=2.5)
        label = ax.annotate(name + said[name], point, xytext=(0, 0), **place)
        best = min((*_BESIDE, *_FURTHER), key=lambda where: hides(_moved(label, *where)))
        hides.texts.append(_moved(label, *best))
        if best in _FURTHER:
            ax.annotate("", point, xytext=best[:2], textcoords="offset points", arrowprops=_LINE, zorder=2)


def _moved(label: Annotation, x: float, y: float, across: str, along: str) -> Bbox:
    """Put a label at so many points from what it names, and return the room it takes there."""
    label.set(position=(x, y), horizontalalignment=across, verticalalignment=along)
    return label.get_window_extent().padded(2)


class _Hidden:
    """How much a label would hide, in square pixels: of text, of markers, of itself outside the axes, and of roofs."""

    def __init__(self, ax: Axes, points: Iterable[tuple[float, float]]):
        from matplotlib.transforms import Bbox

        self.frame, self.texts = ax.get_window_extent(), [text.get_window_extent() for text in ax.texts]
        self.texts += [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in ax.transData.transform([*points])]
        self.roofs = [line.get_path().transformed(ax.transData) for line in ax.lines if len(line.get_xdata()) == 3]

    def __call__(self, label: Bbox) -> int:
        shared = [label.intersection(label, other) for other in (self.frame, *self.texts)]
        inside, *hidden = (box.width * box.height if box else 0 for box in shared)
        crossed = sum(roof.intersects_bbox(label, filled=False) for roof in self.roofs)
        return round(label.width * label.height - inside + sum(hidden)) + _CROSSED * crossed


def _two_lines(ax: Axes) -> float:
    """Return the factor on the vertical axis that two lines of text span."""
    low, high = ax.get_ylim()
    return (high / low) ** _TWO_LINES


def _short(number: float) -> str:
    """295.34 is "295", 1.0 is "1", 3.41 is "3.4"."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _check(machines: Mapping, points: Mapping) -> None:
    if not 1 <= len(machines) <= len(_COLOURS):
        raise ValueError(f"roofline got {len(machines)} machines; give 1 to {len(_COLOURS)}, which can be told apart")
    for name, given in [*machines.items(), *points.items()]:
        numbers = given if isinstance(given, tuple) else (given,)
        right = len(numbers) == 2 or (len(numbers) == 1 and name in points)
        if not right or not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"{name!r} is {given!r}; give (FLOP/s, bytes/s) of a machine, and FLOP per byte or (FLOP "
                             "per byte, FLOP/s) of a point, all above 0")  # fmt: skip
