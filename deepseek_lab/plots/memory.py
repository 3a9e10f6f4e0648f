"""The memory bar as a figure: what a model takes, against what the GPUs hold."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from deepseek_lab.accounting.memory_state import MemoryState

from . import bar_layout as at
from .bar_layout import BarLayout, bar_layout
from .style import FONT_SIZE, GREY, INK, PALETTE, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = 7.2
_TEXTURE = {"cache": "oo"}  # a second sign beside the colour
_ALIGN = {"start": "left", "middle": "center", "end": "right"}


def memory_bar(
    state: MemoryState | None = None, previous: MemoryState | None = None, ax: Axes | None = None, **settings
) -> Axes:
    """Draw one stacked bar of weights and cache with the capacity of the GPUs; the static twin of the widget.

    state: what to draw; or give its fields as settings: `memory_bar(model="deepseek-v3", cache="latent")`.
    previous: a state to draw hatched behind it, on the same scale, with the difference in words.
    The x axis is in the unit that its last tick names, so a bar's width times that unit is its bytes. Returns the Axes.
    """
    if state is None:
        state = MemoryState(**settings)
    elif settings:
        raise ValueError(f"memory_bar got a state and also {', '.join(settings)}; give one or the other")
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(figsize=(_INCHES, _INCHES * at.HEIGHT / at.WIDTH), layout="none").add_axes((0, 0, 1, 1))
    plan = bar_layout(state, previous)
    per_pixel = plan.axis.end / plan.axis.unit_bytes / at.PLOT  # axis units
    ax.set_xlim(-at.LEFT * per_pixel, (at.WIDTH - at.LEFT) * per_pixel)
    ax.set_ylim(at.HEIGHT, 0)
    _draw_axis(ax, plan)
    _draw_bars(ax, plan)
    _draw_marks(ax, plan, per_pixel)
    _draw_words(ax, plan, per_pixel)
    return ax


def memory_png(state: MemoryState, previous: MemoryState | None = None) -> bytes:
    """Return the figure as PNG without a word to pyplot, so that a notebook does not show it a second time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(_INCHES, _INCHES * at.HEIGHT / at.WIDTH), layout="none")
        memory_bar(state, previous, ax=figure.add_axes((0, 0, 1, 1)))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_axis(ax: Axes, plan: BarLayout) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_position(("data", at.AXIS_Y))
    ax.spines["bottom"].set_bounds(0, plan.axis.end / plan.axis.unit_bytes)
    ax.set_yticks([])
    ax.set_xticks([tick / plan.axis.unit_bytes for tick in plan.axis.ticks], plan.axis.labels())


def _draw_bars(ax: Axes, plan: BarLayout) -> None:
    """Draw the bars in axis units: the one before, and the parts of this one from left to right."""
    unit, left = plan.axis.unit_bytes, 0.0
    if plan.ghost is not None:
        before, place = plan.ghost / at.PLOT * plan.axis.end / unit, (at.GHOST_Y, at.GHOST_HEIGHT)
        look = {"facecolor": "white", "edgecolor": GREY, "hatch": "///", "label": "before"}
        ax.barh(place[0], before, place[1], align="edge", **look)
        ax.barh(place[0], before, place[1], align="edge", facecolor="none", edgecolor=INK, linewidth=1)
    for part in plan.parts:
        look = {"color": PALETTE[part.role], "edgecolor": "white", "linewidth": 0, "hatch": _TEXTURE.get(part.role)}
        ax.barh(at.BAR_Y, part.size_bytes / unit, at.BAR_HEIGHT, left, align="edge", label=part.name, **look)
        left += part.size_bytes / unit


def _draw_marks(ax: Axes, plan: BarLayout, per_pixel: float) -> None:
    """Draw the seams between parts, the lines from parts to their names, and the capacity."""
    for edge in plan.edges[1:-1]:
        xs = [(edge - at.LEFT) * per_pixel] * 2
        ax.plot(xs, [at.BAR_Y, at.BAR_Y + at.BAR_HEIGHT], "-", color="white", linewidth=1)
    for centre, place in plan.leaders:
        xs = [(x - at.LEFT) * per_pixel for x in (centre, centre, place)]
        ax.plot(xs, [at.BAR_Y, at.BAR_Y - 9, at.NAME_Y], "-", color=INK, linewidth=0.9)
    if plan.capacity is not None:
        xs = [(plan.capacity - at.LEFT) * per_pixel] * 2
        ax.plot(xs, [at.LINE_TOP, at.AXIS_Y], color=INK, linewidth=2, linestyle=(0, (3, 1.5)), label="capacity")
        ax.plot(xs[:1], [at.AXIS_Y + 28], marker="^", color=INK, markersize=6, linestyle="none")


def _draw_words(ax: Axes, plan: BarLayout, per_pixel: float) -> None:
    for words in plan.words:
        back = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if words.back else None
        look = {
            "fontsize": FONT_SIZE - 0.5,
            "fontweight": "bold" if words.bold else "normal",
            "bbox": back,
            "zorder": 5,
        }
        x = (words.x - at.LEFT) * per_pixel
        ax.text(x, words.y, words.text, ha=_ALIGN[words.anchor], va="baseline", **look)
