"""Five caches of one model fill side by side: the prompt at once, the answer token by token, until memory is full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_lab.accounting.cache_race import KINDS, CacheRace
from deepseek_lab.accounting.memory_state import MODEL_NAMES, size_text
from deepseek_lab.units import byte_unit

from .arrange import scale
from .sheet import Box, Line, Shape, Sheet, Words, draw
from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 392
LEFT, RIGHT = 14, 566
_PHASES_Y, _ROWS_Y, _ROW, _BAR = 36, 80, 52, 20
_READ, _WRITTEN = PALETTE["cache"], "#BFE6D9"


def cache_race(tokens: int | None = None, race: CacheRace | None = None, ax: Axes | None = None, **settings) -> Axes:
    """Draw the five caches of a model at so many tokens per sequence; the static twin of the widget.

    tokens: the last step of the race unless told. race: or give its fields as settings: `cache_race(batch=32)`.
    The Axes, which it returns, count in pixels of a picture 580 wide. Raises ValueError for tokens below 0.
    """
    if race is not None and settings:
        raise ValueError(f"cache_race got a race and also {', '.join(settings)}; give one or the other")
    race = race or CacheRace(**settings)
    return draw(race_sheet(race, race.steps[-1] if tokens is None else tokens), ax)


def race_sheet(race: CacheRace, tokens: int) -> Sheet:
    """Plan the picture at `tokens` tokens per sequence."""
    read, written = min(tokens, race.prompt), max(tokens - race.prompt, 0)
    sequences = "1 sequence" if race.batch == 1 else f"{race.batch:,} sequences"
    title = f"{MODEL_NAMES[race.model]}, {sequences} of {tokens:,} tokens"
    room = f"{race.gpu}: {size_text(race.room)} beside the weights" if race.room else _no_room(race)
    shapes: list[Shape] = [Words(LEFT, 22, title, bold=True, kind="headline"), *_phases(race, read, written)]
    said = []
    for number, kind in enumerate(KINDS):
        size = race.ledger(kind, tokens).total
        end = runs_out_words(race, kind, tokens)
        shapes += _row(race, kind, read, tokens, _ROWS_Y + number * _ROW, end)
        said.append(f"{kind} {size_text(size)}, {end}")
    shapes += [*_axis(race), Words(LEFT, HEIGHT - 12, room, kind="room")]
    return Sheet(
        HEIGHT, f"{title}: {read:,} read at once, {written:,} written. {room}. {'; '.join(said)}", tuple(shapes)
    )


def runs_out_words(race: CacheRace, kind: str, tokens: int) -> str:
    """Return how many tokens fit, or that they no longer do."""
    limit = race.runs_out(kind)
    if not limit:
        return "no room for one token"
    return f"out of memory after {limit:,} tokens" if tokens > limit else f"room for {limit:,} tokens"


def _no_room(race: CacheRace) -> str:
    return f"{race.gpu}: no room, the weights alone take {size_text(race.weights)}"


def _phases(race: CacheRace, read: int, written: int) -> list[Shape]:
    """Both phases, the present one framed."""
    half, out = (RIGHT - LEFT - 12) / 2, []
    words = (f"1. prompt of {race.prompt:,} read at once", f"2. {written:,} written, one at a time")
    present = None if not read else 1 if written else 0
    for number, (text, (fill, hatch)) in enumerate(zip(words, ((_READ, ""), (_WRITTEN, "up")), strict=True)):
        x, now = LEFT + number * (half + 12), number == present
        frame = dict(edge=INK if now else "#DDDDDD", line=2.4 if now else 1, kind="phase", name=str(now))
        out += [Box(x, _PHASES_Y, half, 28, **frame), Box(x + 8, _PHASES_Y + 7, 22, 14, fill, INK, hatch, 0.8)]
        out.append(Words(x + 38, _PHASES_Y + 19, text, bold=now, size=12))
    return out


def _row(race: CacheRace, kind: str, read: int, tokens: int, y: float, end: str) -> list[Shape]:
    """One kind: its name, what it holds and when it runs out above its bar, which is as long as the room."""
    total, first = race.ledger(kind, tokens).total, race.ledger(kind, read).total
    out_of_memory = tokens > race.runs_out(kind)
    words = f"would take {size_text(total)}" if out_of_memory else size_text(total)
    left, width = LEFT, RIGHT - LEFT
    ends = [left + width * (min(size / race.room, 1) if race.room else 0) for size in (first, total)]
    y += 18
    out: list[Shape] = [
        Words(left, y - 5, kind, bold=True, size=13),
        Words(left + 84, y - 5, words, kind="size"),
        Words(RIGHT, y - 5, end, "end", bold=out_of_memory, kind="end"),
        Box(left, y, width, _BAR, "#F6F6F6"),
        Box(left, y, ends[0] - left, _BAR, _READ, kind="read", name=kind),
        Box(ends[0], y, ends[1] - ends[0], _BAR, _WRITTEN, hatch="up", kind="written", name=kind),
        Box(left, y, width, _BAR, edge=INK if out_of_memory else GREY, line=2.4 if out_of_memory else 1),
    ]
    if out_of_memory:
        cross = ((RIGHT - 17, y + 3, RIGHT - 3, y + 17), (RIGHT - 3, y + 3, RIGHT - 17, y + 17))
        out.append(Box(RIGHT - 20, y, 20, _BAR, PALETTE["gradients"], INK, line=2.4, kind="full", name=kind))
        out += [Line(((a, b), (c, d)), "white", 2.4) for a, b, c, d in cross]
    return out


def _axis(race: CacheRace) -> list[Shape]:
    """Ticks of the bytes under the bars; the bars end at the room."""
    if not race.room:
        return []
    y, out = _ROWS_Y + 5 * _ROW - 8, []
    unit, unit_bytes = byte_unit(race.room)
    for tick in scale(0, race.room / unit_bytes, LEFT, RIGHT, most=6).ticks():
        x = LEFT + (RIGHT - LEFT) * tick * unit_bytes / race.room
        if x < RIGHT - 100:
            text, anchor = (f"{tick:,.6g}", "middle") if tick else (f"0 {unit}", "start")
            out += [Line(((x, y), (x, y + 5))), Words(x, y + 19, text, anchor, size=12)]
    return [Line(((LEFT, y), (RIGHT, y))), *out, Words(RIGHT, y + 19, "all the room", "end", size=12)]
