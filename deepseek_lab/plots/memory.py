"""The memory bar: what a model takes, against what the GPUs hold and what the setting before it took."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from deepseek_lab.accounting.memory_state import (
    MemoryState,
    capacity_label,
    change,
    headline,
    size_text,
    summary,
    verdict,
)
from deepseek_lab.units import GIB, byte_unit

from .arrange import Scale, scale, spread
from .sheet import WIDTH, Box, Line, Shape, Sheet, Words, draw
from .style import INK, part_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 226
LEFT, RIGHT = 14, 444  # of the byte axis, in pixels; the rest is room for words
_BAR_Y, _BAR_HEIGHT, _GHOST_Y, _GHOST_HEIGHT, _AXIS_Y, _LINE_TOP, _NAME_Y = 92, 40, 84, 56, 148, 78, 73
_NAME_WIDTH, _CHARACTER = 128, 7.6  # chosen generously: fonts differ between machines


def memory_bar(
    state: MemoryState | None = None, previous: MemoryState | None = None, ax: Axes | None = None, **settings
) -> Axes:
    """Draw one stacked bar of weights and cache with the capacity of the GPUs; the static twin of the widget.

    state: what to draw; or give its fields as settings: `memory_bar(model="deepseek-v3", cache="latent")`.
    previous: a state to draw hatched behind it, on the same scale, with the difference in words.
    The Axes, which it returns, count in pixels of a picture 580 wide.
    """
    if state is None:
        state = MemoryState(**settings)
    elif settings:
        raise ValueError(f"memory_bar got a state and also {', '.join(settings)}; give one or the other")
    return draw(memory_sheet(state, previous), ax)


def memory_sheet(state: MemoryState, previous: MemoryState | None = None) -> Sheet:
    """Plan the picture of `state`, with `previous` hatched behind it on the same scale."""
    largest = max(state.total, previous.total if previous else 0)
    if state.capacity <= 4 * largest:  # else both bars would be slivers
        largest = max(largest, state.capacity)
    unit, unit_bytes, plan = byte_scale(largest)

    def x(size_bytes: float) -> float:
        return plan.pixel(size_bytes / unit_bytes)

    shapes = [
        Words(LEFT, 24, headline(state), bold=True),
        *_bars(state, previous, x),
        *_capacity(state, x(state.capacity)),
        *_axis(plan, unit),
        *([] if previous is None else _change(state, previous, x)),
        Words(LEFT, HEIGHT - 13, verdict(state)),
    ]
    return Sheet(HEIGHT, summary(state, previous), tuple(shapes))


def byte_scale(largest: float) -> tuple[str, int, Scale]:
    """Return an axis from 0 to the first tick at or above `largest` bytes: its unit, the unit's bytes, the scale in it.

    GiB at most: the sums beside it are in GiB.
    """
    unit, unit_bytes = byte_unit(min(largest, 2 * GIB))
    return unit, unit_bytes, scale(0, largest / unit_bytes, LEFT, RIGHT, most=6)


def _bars(state: MemoryState, previous: MemoryState | None, x: Callable[[float], float]) -> list[Shape]:
    """The bar before and the parts of this one, apart in greyscale by seams, each with a line to its name above."""
    out: list[Shape] = []
    if previous is not None:
        width = x(previous.total) - LEFT
        out.append(Box(LEFT, _GHOST_Y, width, _GHOST_HEIGHT, "#FFFFFF", INK, "before", kind="ghost"))
    sides = list(pairwise(map(x, accumulate(state.parts.values(), initial=0))))
    for name, (left, right) in zip(state.parts, sides, strict=True):
        hatch = "dots" if name == "cache" else ""
        look = dict(fill=part_colour(name), hatch=hatch, kind="part", name=name)
        out.append(Box(left, _BAR_Y, right - left, _BAR_HEIGHT, **look))
    out += [Line(((left, _BAR_Y), (left, _BAR_Y + _BAR_HEIGHT)), "#FFFFFF") for left, _ in sides[1:]]
    centres = [(left + right) / 2 for left, right in sides]
    places = spread(centres, _NAME_WIDTH, 4, WIDTH - 4)
    for (name, size), centre, place in zip(state.parts.items(), centres, places, strict=True):
        out.append(Line(((centre, _BAR_Y), (centre, _BAR_Y - 9), (place, _NAME_Y))))
        out.append(Words(place, 52, name, "middle", kind="name"))
        out.append(Words(place, 68, size_text(size), "middle", bold=True))
    return out


def _capacity(state: MemoryState, x: float) -> list[Shape]:
    text, y = capacity_label(state), _AXIS_Y + 43
    if x > RIGHT:
        return [Words(RIGHT, y, f"{text}, beyond this scale \N{BLACK RIGHT-POINTING TRIANGLE}", "end")]
    half = len(text) * _CHARACTER / 2
    return [
        Line(((x, _LINE_TOP), (x, _AXIS_Y)), line=2.4, dashes=(6, 3), kind="capacity"),
        Line(((x, y - 19), (x + 5, y - 12), (x - 5, y - 12)), line=0, fill=INK),
        Words(min(max(x, LEFT + half), WIDTH - 8 - half), y, text, "middle"),
    ]


def _axis(plan: Scale, unit: str) -> list[Shape]:
    """A line of bytes with its ticks; the last one names the unit."""
    out: list[Shape] = [Line(((LEFT, _AXIS_Y), (RIGHT, _AXIS_Y)))]
    for tick in plan.ticks():
        x, text = plan.pixel(tick), f"{tick:,.6g}" + f" {unit}" * (tick == plan.ticks()[-1])
        out += [Line(((x, _AXIS_Y), (x, _AXIS_Y + 5))), Words(x, _AXIS_Y + 19, text, "middle", kind="tick")]
    return out


def _change(state: MemoryState, previous: MemoryState, x: Callable[[float], float]) -> list[Shape]:
    """The difference in two lines: on the hatched rest of the old bar if that is wide enough, else beside it."""
    if previous.total == state.total:
        return []
    now, before = x(state.total), x(previous.total)
    lines = change(state, previous).split(", ")
    width = max(map(len, lines)) * _CHARACTER
    middle = (now + before) / 2 if before - now > width + 12 else max(now, before) + 6 + width / 2
    y = _BAR_Y + _BAR_HEIGHT / 2 - 3
    ground = Box(middle - width / 2, y - 15, width, 37, "#FFFFFF")
    words = (Words(middle, y + 16 * i, text, "middle", bold=i == 0) for i, text in enumerate(lines))
    return [ground, *words]
