"""A picture as a list of boxes, lines and words in pixels: a widget writes it as SVG, its static twin draws it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .style import GREY, INK, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 580  # pixels: fits a column of 600
_INCHES = 7.2
_POINTS = 72 * _INCHES / WIDTH  # of one pixel
_ALIGN = {"start": "left", "middle": "center", "end": "right"}
#: Textures beside the colour, by name: their colour, and their strokes as matplotlib writes them.
HATCHES = {"up": (INK, "//////"), "down": (INK, "\\\\\\\\\\\\"), "before": (GREY, "///"), "dots": ("white", "..")}


@dataclass(frozen=True)
class Box:
    """A rectangle with its left top corner at (x, y); `hatch` is one of HATCHES; `kind` and `name` are for tests."""

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


def draw(sheet: Sheet, ax: Axes | None = None) -> Axes:
    """Draw a sheet on Axes whose units are its pixels, and return them."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = _whole(plt.figure, sheet)
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
        ax = draw(sheet, _whole(Figure, sheet))
        buffer = io.BytesIO()
        ax.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _whole(figure: Callable, sheet: Sheet) -> Axes:
    """Return Axes that fill a new figure with the proportions of the sheet."""
    return figure(figsize=(_INCHES, _INCHES * sheet.height / WIDTH), layout="none").add_axes((0, 0, 1, 1))


def _box(ax: Axes, box: Box, order: float) -> None:
    from matplotlib.patches import Rectangle

    place, fill = ((box.x, box.y), box.width, box.height), box.fill
    if box.hatch and box.height and box.width:
        colour, strokes = HATCHES[box.hatch]
        ax.add_patch(
            Rectangle(*place, facecolor=fill, edgecolor=colour, hatch=strokes, linewidth=0, zorder=order, label="")
        )
        fill = "none"
    look = dict(facecolor=fill, edgecolor=box.edge, linewidth=box.line * _POINTS, joinstyle="miter", zorder=order)
    ax.add_patch(Rectangle(*place, **look, label=f"{box.kind} {box.name}".strip()))


def _line(ax: Axes, line: Line, order: float) -> None:
    xs, ys = zip(*line.points, strict=True)
    look = dict(linewidth=line.line * _POINTS, zorder=order, label=f"{line.kind} {line.name}".strip() or "_line")
    if line.fill != "none":
        ax.fill(xs, ys, facecolor=line.fill, edgecolor=line.edge, **look)
        return
    dashes = (0, tuple(d / line.line for d in line.dashes)) if line.dashes else "-"
    ax.plot(xs, ys, color=line.edge, linestyle=dashes, **look)


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
