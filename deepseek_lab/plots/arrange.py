"""Where things go on a sheet: round ticks on an axis, labels that do not touch, text that fits its room."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from .sheet import Line, Shape, Words


@dataclass(frozen=True)
class Scale:
    """An axis in either direction: `low` lies at pixel `start`, `high` at pixel `end`, a tick at every `step`."""

    low: float
    high: float
    start: float
    end: float
    step: float

    def pixel(self, value: float) -> float:
        """The pixel at which a value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]


def scale(low: float, high: float, start: float, end: float, most: int = 5) -> Scale:
    """Return an axis that holds low and high and ends on ticks; steps are 1, 2 or 5 times a power of 10."""
    rough = max((high - low) / most, 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, max(last, first + 1) * step, start, end, step)


def y_axis(plan: Scale, left: float, right: float) -> list[Shape]:
    """Return the ticks of a vertical axis with their numbers, and its lines from left to right."""
    out: list[Shape] = []
    for tick in plan.ticks():
        y = plan.pixel(tick)
        out.append(Line(((left, y), (right, y)), "#DDDDDD"))
        out.append(Words(left - 6, y + 4, f"{tick + 0.0:.6g}".replace("-", "\N{MINUS SIGN}"), "end", size=12))
    return out


def one_in(slot: float) -> int:
    """Return how many bars, `slot` pixels each, share one number under them: it needs 18 pixels."""
    return next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * slot >= 18)


def spread(centres: Sequence[float], width: float, low: float, high: float) -> list[float]:
    """Move the centres of labels of one width apart, as little as two passes need, so that none overlap in low..high.

    centres must ascend. Where the labels are wider than the room, the first ones reach beyond `low`.
    """
    placed: list[float] = []
    for centre in centres:
        placed.append(max(centre, placed[-1] + width if placed else low + width / 2))
    edge = high + width / 2
    for i in reversed(range(len(placed))):
        edge = placed[i] = min(placed[i], edge - width)
    return placed


def printable(text: str) -> str:
    """Return the text with U+FFFD for control characters, which XML forbids and no font shows; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def wrap(text: str, columns: int, lines: int) -> list[str]:
    """Return at most so many lines of at most so many characters, broken at spaces where there are any.

    A last line that leaves something out ends in an ellipsis.
    """
    breaker = textwrap.TextWrapper(columns, drop_whitespace=False, replace_whitespace=False, break_on_hyphens=False)
    out = [row for part in text.split("\n") for row in breaker.wrap(part) or [""]]
    return out if len(out) <= lines else [*out[: lines - 1], out[lines - 1][: columns - 1] + "\N{HORIZONTAL ELLIPSIS}"]


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
