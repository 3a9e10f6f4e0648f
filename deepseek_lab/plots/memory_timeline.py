"""The memory of one training step: parts stacked from its start to its end, the fullest moment marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from deepseek_lab.units import byte_unit, format_bytes, format_seconds

from .arrange import one_in, scale, y_axis
from .replay import _dot
from .sheet import WIDTH, Box, Line, Shape, Sheet, Words, draw
from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 556
LEFT, RIGHT, TOP, BOTTOM = 52, 566, 84, 312
COLOURS = {
    "weights": PALETTE["weights"], "narrow weights": "#8CC3E6", "moments": PALETTE["moments"],
    "gradients": PALETTE["gradients"], "activations": PALETTE["activations"], "cache": PALETTE["cache"],
    "workspace": "#BDBDBD",
}  # fmt: skip
#: What a part is, beside its name.
WORDS = {"narrow weights": "copies in fewer bits", "activations": "saved for the backward pass",
         "workspace": "passing, or computed again"}  # fmt: skip
_MARGIN, _BAND_Y, _TABLE_Y, _ROW, _GRAIN = 14, 318, 422, 22, 3.0

Timelines = Mapping[tuple[str, bool], object]


def memory_timeline(
    timelines: Timelines, precision: str | None = None, recompute: bool = False, event: int | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Draw the memory of one training step and return the Axes; the static twin of the widget.

    timelines: `accounting.measured.Timeline`s of the same model by (precision, recomputed), such as ("FP32", False);
    all on one scale. precision: the first unless told. event: number of the stretch to look into, the one with the peak
    unless told. With the other way to `recompute` recorded too, its outline is dashed behind. The Axes count in pixels
    of a picture 580 wide. Raises ValueError as `check_timelines`.
    """
    return draw(timeline_sheet(timelines, *check_timelines(timelines, precision, recompute, event)), ax)


def check_timelines(
    timelines: Timelines, precision: str | None, recompute: bool, event: int | None
) -> tuple[str, bool, int]:
    """Return what to show. ValueError for what was not recorded, and for steps that did not do the same in order."""
    if not timelines:
        raise ValueError("memory_timeline got no timelines; give one at least, by (precision, recomputed)")
    steps = {key: [e.label for e in timeline.events] for key, timeline in timelines.items()}
    if any(labels != next(iter(steps.values())) for labels in steps.values()):
        raise ValueError(f"memory_timeline got steps of {[len(labels) for labels in steps.values()]} events that do "
                         "not compare; record the same step of the same model each time")  # fmt: skip
    precision = next(iter(timelines))[0] if precision is None else precision
    if (precision, recompute) not in timelines:
        raise ValueError(f"there is no timeline for precision={precision!r}, recompute={recompute}; choose one of "
                         f"{', '.join(map(str, timelines))}")  # fmt: skip
    events = timelines[precision, recompute].events
    if event is None:
        event = peak_event(timelines[precision, recompute])
    if not 0 <= event < len(events):
        raise ValueError(f"event={event} is not in this step; choose 0 to {len(events) - 1}")
    return precision, recompute, event


def peak_event(timeline) -> int:
    """Return the number of the event that holds the fullest moment of the step."""
    return max(range(len(timeline.events)), key=lambda i: timeline.events[i].fullest.total)


def timeline_sheet(timelines: Timelines, precision: str, recompute: bool, event: int) -> Sheet:
    """Plan the picture of one step, with a marker in one of its events where that is fullest."""
    timeline, other = timelines[precision, recompute], timelines.get((precision, not recompute))
    largest = max(t.peak.total for t in timelines.values())
    unit, size = byte_unit(largest)
    plan, at = scale(0, largest / size, BOTTOM, TOP), timeline.events[event]
    slot = (RIGHT - LEFT) / len(timeline.events)

    def y(amount: int) -> float:
        return plan.pixel(amount / size)

    peak = f"peak {format_bytes(timeline.peak.total)} in {timeline.peak.label}"
    title = f"{precision} {'with' if recompute else 'without'} recomputation: {peak}"
    shown = f"{at.label}: {format_bytes(at.fullest.total)} at its fullest, {format_seconds(at.seconds)}"
    shapes = [
        Words(_MARGIN, 22, title, bold=True, kind="headline"),
        Words(_MARGIN, 42, compared(timeline, other, recompute), kind="compared"),
        Words(_MARGIN, 66, f"{unit} at each moment of the step", size=12),
        *y_axis(plan, LEFT, RIGHT),
        *_stack(timeline, slot, y),
        *([] if other is None else _ghost(other, slot, y)),
        *_marks(timeline, event, slot, y),
        *_band(timeline, slot, event),
        Words(_MARGIN, _TABLE_Y - 14, shown, bold=True, kind="event"),
        *_table(at.fullest.bytes, largest),
    ]
    parts = ", ".join(f"{part} {format_bytes(amount)}" for part, amount in at.fullest.bytes.items() if amount)
    return Sheet(HEIGHT, f"{title}. {shown}: {parts}", tuple(shapes), _detail(timeline))


def compared(timeline, other, recompute: bool) -> str:
    """Return how the peak compares with that of the other way; where that was not recorded, what a parameter takes."""
    if other is None:
        return f"{timeline.peak.total / timeline.parameters:,.1f} bytes per parameter at the peak"
    size = format_bytes(other.peak.total)
    if recompute:
        return f"{timeline.peak.total / other.peak.total:.2f} of the peak without it (dashed), {size}"
    return f"with it (dashed) the peak is {size}, {other.peak.total / timeline.peak.total:.2f} of this"


def _detail(timeline) -> str:
    return "; ".join(f"{e.label} {format_bytes(e.fullest.total)}" for e in timeline.events)


def _points(timeline, slot: float) -> list[tuple[float, Mapping[str, int]]]:
    """Return (x, bytes by part) along the step: all events equally wide, a few points in each, the fullest kept."""
    out = []
    for number, event in enumerate(timeline.events):
        left, moments = LEFT + slot * number, event.moments
        count = min(len(moments), max(int(slot / _GRAIN), 1))
        if count == 1:
            out += [(left + 1, event.fullest.bytes), (left + slot - 1, event.fullest.bytes)]
            continue
        bins = groupby(range(len(moments)), key=lambda i: i * count // len(moments))
        for place, members in bins:
            fullest = max((moments[i] for i in members), key=lambda moment: moment.total)
            out.append((left + slot * (place + 0.5) / count, fullest.bytes))
    return out


def _stack(timeline, slot: float, y: Callable[[int], float]) -> list[Shape]:
    """One area per part, from the weights up; a white line between neighbours keeps them apart in grey."""
    points, out = _points(timeline, slot), []
    below = [0] * len(points)
    for part, colour in COLOURS.items():
        if not timeline.largest(part):
            continue
        above = [low + amounts[part] for low, (_, amounts) in zip(below, points, strict=True)]
        upper = [(x, y(total)) for (x, _), total in zip(points, above, strict=True)]
        lower = [(x, y(total)) for (x, _), total in zip(points, below, strict=True)]
        out.append(Line((*upper, *reversed(lower)), colour, 0, fill=colour, kind="part", name=part))
        out.append(Line(tuple(lower), "#FFFFFF", 0.8))
        below = above
    return [*out, Line(((LEFT, BOTTOM), (RIGHT, BOTTOM)))]


def _ghost(other, slot: float, y: Callable[[int], float]) -> list[Shape]:
    line = tuple((x, y(sum(amounts.values()))) for x, amounts in _points(other, slot))
    return [Line(line, INK, 1.4, (5, 3), kind="ghost")]


def _marks(timeline, event: int, slot: float, y: Callable[[int], float]) -> list[Shape]:
    """The peak with its size, and a line at the moment that the table below tells of."""
    peak = peak_event(timeline)
    x, top_x, top_y = _x(timeline, event, slot), _x(timeline, peak, slot), y(timeline.peak.total)
    side = "end" if top_x > (LEFT + RIGHT) / 2 else "start"
    beside, text = top_x + (-9 if side == "end" else 9), f"peak {format_bytes(timeline.peak.total)}"
    wide = 7.8 * len(text)
    return [
        Line(((x, TOP - 4), (x, BOTTOM)), INK, 1.4, (2, 2), kind="moment"),
        _dot(top_x, top_y, 5, INK, "peak"),
        Box(beside - wide if side == "end" else beside, top_y - 19, wide, 17, "#FFFFFF"),
        Words(beside, top_y - 6, text, side, bold=True, size=12, kind="peak"),
    ]


def _x(timeline, number: int, slot: float) -> float:
    """Where the fullest moment of an event lies."""
    moments, left = timeline.events[number].moments, LEFT + slot * number
    count = min(len(moments), max(int(slot / _GRAIN), 1))
    if count == 1:
        return left + slot / 2
    place = next(i for i, moment in enumerate(moments) if moment is timeline.events[number].fullest)
    return left + slot * (place * count // len(moments) + 0.5) / count


def _band(timeline, slot: float, event: int) -> list[Shape]:
    """What happens under each stretch: the number of a layer, and the phase below; the chosen one is framed."""
    out, every = [], one_in(slot)
    for number, one in enumerate(timeline.events):
        x, name = LEFT + slot * number, short_name(one.label)
        chosen = number == event
        frame = dict(edge=INK, line=2.0) if chosen else dict(edge="#FFFFFF")
        out.append(Box(x + 0.5, _BAND_Y, slot - 1, 18, "#FFFFFF" if chosen else "#EDEDED", **frame, kind="slot",
                       name=str(number)))  # fmt: skip
        if number % every == 0 or chosen:
            out.append(Words(x + slot / 2, _BAND_Y + 13, name, "middle", chosen, size=12))
    for phase, group in groupby(range(len(timeline.events)), key=lambda i: phase_of(timeline.events[i].label)):
        numbers = [*group]
        left, right = LEFT + slot * numbers[0] + 3, LEFT + slot * (numbers[-1] + 1) - 3
        out.append(Line(((left, _BAND_Y + 24), (right, _BAND_Y + 24)), GREY, 2))
        out.append(Words((left + right) / 2, _BAND_Y + 39, phase, "middle", size=12, kind="phase"))
    names = dict.fromkeys(one.label.split()[-1] for one in timeline.events)
    words = ", ".join(f"{short_name(n)} {n.removesuffix('.0')}" for n in names if not n.startswith("layers."))
    return [*out, Words(WIDTH / 2, _BAND_Y + 60, words, "middle", size=12, colour="#555555", kind="names")]


def phase_of(label: str) -> str:
    """Return "forward", "backward" or "update"; the loss ends the forward pass."""
    first = label.split()[0]
    return {"start": "forward", "forward": "forward", "loss": "forward", "backward": "backward"}.get(first, "update")


def short_name(label: str) -> str:
    """Return a character or two for a stretch: the number of a layer, the first letter of anything else."""
    name = label.split()[-1]
    part, _, number = name.rpartition(".")
    if part == "multi_token":
        return "m" if number == "0" else f"m{number}"
    return number if part else {"lm_head": "h", "zero_grad": "z"}.get(name, name[0])


def _table(amounts: Mapping[str, int], largest: int) -> list[Shape]:
    """A row for each part: its name, its bytes at the moment, and these as a bar."""
    out: list[Shape] = []
    for number, part in enumerate(part for part in COLOURS if part != "cache" or amounts[part]):
        y = _TABLE_Y + number * _ROW
        out.append(Box(_MARGIN, y, 14, 14, COLOURS[part], kind="key", name=part))
        out.append(Words(_MARGIN + 22, y + 12, part))
        out.append(Words(150, y + 12, WORDS.get(part, ""), size=12, colour="#555555"))
        out.append(Words(408, y + 12, format_bytes(amounts[part]), "end", True, kind="amount"))
        wide = (RIGHT - 420) * amounts[part] / largest
        out.append(Box(420, y, wide, 14, COLOURS[part], kind="bar", name=part))
    return out
