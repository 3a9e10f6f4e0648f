"""Where everything in the memory bar goes, in pixels: the widget and its static twin draw from the same plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deepseek_lab.accounting.memory_state import MemoryState, Part, capacity_label, change, headline, size_text, verdict
from deepseek_lab.units import GIB, byte_unit

WIDTH, HEIGHT = 580, 226
LEFT, PLOT = 14, 430  # where bytes begin, and how many pixels the axis is long; the rest is room for words
BAR_Y, BAR_HEIGHT, GHOST_Y, GHOST_HEIGHT, AXIS_Y, LINE_TOP, NAME_Y = 92, 40, 84, 56, 148, 78, 73
_LABEL_WIDTH, _CHARACTER = 128, 7.6  # chosen generously: fonts differ between machines


@dataclass(frozen=True)
class ByteAxis:
    """An axis of bytes: `ticks` in bytes, written in `unit` of `unit_bytes` bytes each."""

    unit: str
    unit_bytes: int
    ticks: tuple[float, ...]

    @property
    def end(self) -> float:
        return self.ticks[-1]

    def pixels(self, size_bytes: float) -> float:
        """How many pixels long a bar of this many bytes is."""
        return size_bytes / self.end * PLOT

    def labels(self) -> list[str]:
        """Return the text of each tick; the last one carries the unit."""
        texts = [f"{tick / self.unit_bytes:,.6g}" for tick in self.ticks]
        return [*texts[:-1], f"{texts[-1]} {self.unit}"]


@dataclass(frozen=True)
class Words:
    """A text at (x, y), anchored at its "start", "middle" or "end"; `back` is the width of a white ground behind it."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    bold: bool = False
    back: float = 0


@dataclass(frozen=True)
class BarLayout:
    """The plan of one picture, in pixels: `edges` are the parts' borders, `leaders` run from a part to its name."""

    axis: ByteAxis
    parts: tuple[Part, ...]
    edges: tuple[float, ...]
    leaders: tuple[tuple[float, float], ...]
    ghost: float | None
    capacity: float | None
    words: tuple[Words, ...]


def bar_layout(state: MemoryState, previous: MemoryState | None = None) -> BarLayout:
    """Plan the picture of `state` with `previous` behind it, both on one scale; a capacity beyond the scale is None."""
    axis = bar_axis(state.total, previous.total if previous else 0, state.capacity)
    edges = [float(LEFT)]
    for part in state.parts:
        edges.append(edges[-1] + axis.pixels(part.size_bytes))
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    places = spread(centres, [_LABEL_WIDTH] * len(centres), 4, WIDTH - 4)
    words = [Words(LEFT, 24, headline(state), bold=True), Words(LEFT, HEIGHT - 13, verdict(state))]
    for part, place in zip(state.parts, places, strict=True):
        words += [
            Words(place, 52, part.name, "middle"),
            Words(place, 68, size_text(part.size_bytes), "middle", bold=True),
        ]
    capacity = LEFT + axis.pixels(state.capacity) if state.capacity <= axis.end else None
    ghost = None if previous is None else axis.pixels(previous.total)
    words += [_capacity_words(state, capacity), *_change_words(state, previous, axis)]
    leaders = tuple(zip(centres, places, strict=True))
    return BarLayout(axis, state.parts, tuple(edges), leaders, ghost, capacity, tuple(words))


def bar_axis(total: float, previous: float, capacity: float) -> ByteAxis:
    """Return the axis of a memory bar: both bars fit, and the capacity too unless it is over 4 times as long."""
    bars = max(total, previous)
    return byte_axis(max(bars, capacity) if capacity <= 4 * bars else bars)


def byte_axis(largest: float, most_ticks: int = 6) -> ByteAxis:
    """Return an axis from 0 to the first tick at or above `largest` bytes; steps are 1, 2 or 5 times a power of 10."""
    unit, size = byte_unit(min(largest, 2 * GIB))  # GiB at most: the sums beside it are in GiB
    rough = max(largest / size, 1e-9) / most_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    count = max(1, math.ceil(largest / size / step - 1e-9))
    return ByteAxis(unit, size, tuple(i * step * size for i in range(count + 1)))


def spread(centres: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Move label centres apart, as little as two passes need, so that none overlap between `low` and `high`.

    centres must ascend. Where the labels are wider than the room, the first ones reach beyond `low`.
    """
    placed, edge = [], low
    for centre, width in zip(centres, widths, strict=True):
        placed.append(max(centre, edge + width / 2))
        edge = placed[-1] + width / 2
    edge = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], edge - widths[i] / 2)
        edge = placed[i] - widths[i] / 2
    return placed


def _capacity_words(state: MemoryState, capacity: float | None) -> Words:
    text, y = capacity_label(state), AXIS_Y + 43
    if capacity is None:
        return Words(LEFT + PLOT, y, f"{text}, beyond this scale \N{BLACK RIGHT-POINTING TRIANGLE}", "end")
    half = len(text) * _CHARACTER / 2
    return Words(min(max(capacity, LEFT + half), WIDTH - 8 - half), y, text, "middle")


def _change_words(state: MemoryState, previous: MemoryState | None, axis: ByteAxis) -> list[Words]:
    """Return the difference in two lines: on the hatched rest of the old bar if that is wide enough, else beside it."""
    if previous is None or previous.total == state.total:
        return []
    now, before = LEFT + axis.pixels(state.total), LEFT + axis.pixels(previous.total)
    first, second = change(state, previous).split(", ")
    width = max(len(first), len(second)) * _CHARACTER
    middle = (now + before) / 2 if before - now > width + 12 else max(now, before) + 6 + width / 2
    y = BAR_Y + BAR_HEIGHT / 2
    return [Words(middle, y - 3, first, "middle", True, width), Words(middle, y + 13, second, "middle", False, width)]
