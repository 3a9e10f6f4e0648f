"""A picture as a list of boxes, lines and words in pixels: a widget writes it as SVG, its static twin draws it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .style import INK, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 580  # pixels: fits a column of 600
_INCHES = 7.2
_POINTS = 72 * _INCHES / WIDTH  # of one pixel
_ALIGN = {"start": "left", "middle": "center", "end": "right"}
HATCHES = {"up": "//////", "down": "\\\\\\\\\\\\"}  # as matplotlib writes them


@dataclass(frozen=True)
class Box:
    """A rectangle with its left top corner at (x, y); `hatch` is "up" or "down"; `kind` and `name` are for tests."""

    x: float
    y: float
    width: float
    height: float
    fill: str = "none"
    edge: str = "none"
    hatch: str = ""
    line: float = 1.0
    kind: str = ""
    name: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points; `fill` closes it to a shape, `dashes` are the lengths of dash and gap."""

    points: tuple[tuple[float, float], ...]
    edge: str = INK
    line: float = 1.0
    dashes: tuple[float, float] | None = None
    fill: str = "none"
    kind: str = ""
    name: str = ""


@dataclass(frozen=True)
class Words:
    """A text whose base line is at y, anchored at its "start", "middle" or "end"; `turned` reads from bottom to top."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    bold: bool = False
    mono: bool = False
    size: float = 13
    colour: str = INK
    turned: bool = False
    kind: str = ""


Shape = Box | Line | Words


@dataclass(frozen=True)
class Sheet:
    """One picture of fixed size: `label` is its one-line text alternative, `detail` what else a reader hears."""

    height: float
    label: str
    shapes: tuple[Shape, ...]
    detail: str = ""

    def named(self, kind: str) -> list[Shape]:
        """Return the shapes of one kind, in the order in which they are drawn."""
        return [shape for shape in self.shapes if shape.kind == kind]


@dataclass(frozen=True)
class Scale:
    """A vertical axis: `low` lies at pixel `bottom`, `high` at pixel `top`; ticks are round numbers."""

    low: float
    high: float
    bottom: float
    top: float
    step: float

    def y(self, value: float) -> float:
        """The pixel at which a value lies."""
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + i * self.step for i in range(count + 1)]


def scale(low: float, high: float, bottom: float, top: float, most: int = 5) -> Scale:
    """Return an axis that holds low and high and ends on ticks; steps are 1, 2 or 5 times a power of 10."""
    rough = max((high - low) / most, 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, max(last, first + 1) * step, bottom, top, step)


def axis(plan: Scale, left: float, right: float) -> list[Shape]:
    """Return the ticks of a vertical axis with their numbers, and its lines from left to right."""
    out: list[Shape] = []
    for tick in plan.ticks():
        y = plan.y(tick)
        out.append(Line(((left, y), (right, y)), "#DDDDDD"))
        out.append(Words(left - 6, y + 4, f"{tick + 0.0:.6g}".replace("-", "\N{MINUS SIGN}"), "end", size=12))
    return out


def draw(sheet: Sheet, ax: Axes | None = None) -> Axes:
    """Draw a sheet on Axes whose units are its pixels, and return them."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(figsize=(_INCHES, _INCHES * sheet.height / WIDTH), layout="none").add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(sheet.height, 0))
    ax.axis("off")
    painters: dict[type, Callable] = {Box: _box, Line: _line, Words: _words}
    for order, shape in enumerate(sheet.shapes):
        painters[type(shape)](ax, shape, 2 + order / 10_000)
    return ax


def png(sheet: Sheet) -> bytes:
    """Return the sheet as PNG without a word to pyplot, so that a notebook does not show it a second time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(_INCHES, _INCHES * sheet.height / WIDTH), layout="none")
        draw(sheet, figure.add_axes((0, 0, 1, 1)))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _box(ax: Axes, box: Box, order: float) -> None:
    from matplotlib.patches import Rectangle

    look = dict(facecolor=box.fill, linewidth=box.line * _POINTS, zorder=order, label=f"{box.kind} {box.name}".strip())
    place = ((box.x, box.y), box.width, box.height)
    if box.hatch and box.height and box.width:
        ax.add_patch(
            Rectangle(*place, **look | {"label": "", "edgecolor": INK, "hatch": HATCHES[box.hatch], "linewidth": 0})
        )
        look["facecolor"] = "none"
    ax.add_patch(Rectangle(*place, **look, edgecolor=box.edge, joinstyle="miter"))


def _line(ax: Axes, line: Line, order: float) -> None:
    xs, ys = zip(*line.points, strict=True)
    label = f"{line.kind} {line.name}".strip() or "_line"
    dashes = (0, tuple(d / line.line for d in line.dashes)) if line.dashes else "-"
    if line.fill != "none":
        ax.fill(
            xs, ys, facecolor=line.fill, edgecolor=line.edge, linewidth=line.line * _POINTS, zorder=order, label=label
        )
        return
    ax.plot(xs, ys, color=line.edge, linewidth=line.line * _POINTS, linestyle=dashes, zorder=order, label=label)


def _words(ax: Axes, words: Words, order: float) -> None:
    look = dict(
        ha=_ALIGN[words.anchor], va="baseline", fontsize=words.size * _POINTS, color=words.colour, zorder=order,
        fontweight="bold" if words.bold else "normal", fontfamily="monospace" if words.mono else "sans-serif",
        rotation=90 if words.turned else 0, rotation_mode="anchor", parse_math=False,
    )  # fmt: skip
    ax.text(words.x, words.y, drawable(words.text, words.mono), **look)


def drawable(text: str, mono: bool = False) -> str:
    """Return the text with U+FFFD for characters that matplotlib's own font lacks: it would warn of each."""
    known = _characters("DejaVu Sans Mono" if mono else "DejaVu Sans")
    return "".join(c if ord(c) in known else "\N{REPLACEMENT CHARACTER}" for c in text)


@lru_cache(maxsize=2)
def _characters(family: str) -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(family)).get_charmap())


def printable(text: str) -> str:
    """Return the text with U+FFFD for control characters, which XML forbids and no font shows; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def wrap(text: str, columns: int, lines: int) -> list[str]:
    """Return at most so many lines of at most so many characters, broken at spaces where there are any.

    A last line that leaves something out ends in an ellipsis.
    """
    out = []
    for part in text.split("\n"):
        while len(part) > columns:
            cut = part.rfind(" ", 0, columns) + 1
            cut = cut if cut > columns / 2 else columns
            out.append(part[:cut])
            part = part[cut:]
        out.append(part)
    if len(out) > lines:
        out = [*out[: lines - 1], out[lines - 1][: columns - 1] + "\N{HORIZONTAL ELLIPSIS}"]
    return out


def flow(pieces: Sequence[str], widths: Sequence[float], room: float) -> list[list[int]]:
    """Return the numbers of the pieces on each line of width `room`, broken after blank pieces where there are any."""
    rows: list[list[int]] = [[]]
    for number, width in enumerate(widths):
        row = rows[-1]
        if row and sum(widths[i] for i in row) + width > room:
            blank = max((k for k, i in enumerate(row) if not pieces[i].strip()), default=len(row) - 1) + 1
            rows[-1:] = [row[:blank], row[blank:]]
        rows[-1].append(number)
    return rows
