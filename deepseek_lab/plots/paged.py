"""A paged cache after an operation: its blocks as cells, who shares them, and what that saves and wastes in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepseek_lab.units import byte_unit, format_bytes

from .sheet import Box, Shape, Sheet, Words, draw
from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BLOCKS = 64
LEFT, WIDE = 14, 552
_COLUMNS, _TOP, _ROW, _CELL = 8, 84, 56, (62, 46)
_FILL = PALETTE["cache"]


def paged_cache(trace: Sequence, step: int = -1, ax: Axes | None = None) -> Axes:
    """Draw the blocks of a paged cache after one operation; the static twin of the widget.

    trace: `attention.PoolStep`s in order. step: which one, the last unless told. The Axes, which it returns, count in
    pixels of a picture 580 wide. Raises ValueError as `check_trace`, IndexError for a step that is not there.
    """
    trace = check_trace(trace)
    return draw(paged_sheet(trace, range(len(trace))[step]), ax)


def check_trace(trace: Sequence) -> list:
    """Return the steps. Raises ValueError for none, for blocks of different size, and for more than 64 blocks."""
    trace = list(trace)
    sizes = sorted({step.block_size for step in trace})
    if len(sizes) != 1:
        raise ValueError(
            f"paged_cache got {len(trace)} steps with blocks of {sizes} tokens; give the steps of one pool"
        )
    if (most := max(len(step.blocks) for step in trace)) > MOST_BLOCKS:
        raise ValueError(f"paged_cache got a pool of {most} blocks; it draws up to {MOST_BLOCKS}, make a smaller pool")
    return trace


def paged_sheet(trace: Sequence, number: int) -> Sheet:
    """Plan the picture of one step: cells above, two bars of bytes below."""
    step, most = trace[number], max(len(step.blocks) for step in trace)  # a pool may grow
    bottom = _TOP + -(-most // _COLUMNS) * _ROW
    title = f"{number + 1} of {len(trace)}: {step.operation}"
    shapes: list[Shape] = [Words(LEFT, 22, title, bold=True, kind="headline"), *_legend(step.block_size)]
    for block in step.blocks:
        shapes += _cell(block, step.block_size)
    shapes += _bytes(step, trace, bottom + 8)
    said = (line.text for line in shapes if getattr(line, "kind", "") == "bytes")
    used, shared = step.usage.used_blocks, step.usage.shared_blocks
    label = f"{title}. {used} of {len(step.blocks)} blocks used, {shared} shared; {'; '.join(said)}"
    detail = "; ".join(
        f"block {b.index}: {b.filled} of {step.block_size} slots, sequences {', '.join(map(str, b.owners))}"
        for b in step.blocks
        if b.references
    )
    return Sheet(bottom + 112, label, tuple(shapes), detail)


def _legend(size: int) -> list[Shape]:
    """What a cell says: two lines."""
    return [
        Words(LEFT, 44, f"a cell is a block of {size:,} tokens: its number, and the sequences that name it", size=12),
        Box(LEFT, 55, 16, 12, _FILL), Words(LEFT + 22, 65, "filled", size=12),
        Box(LEFT + 84, 55, 16, 12, "#FFFFFF", GREY, "before"), Words(LEFT + 106, 65, "taken, but empty", size=12),
        Box(LEFT + 240, 55, 16, 12, "#FFFFFF", INK, line=2.6), Words(LEFT + 262, 65, "shared", size=12),
        Box(LEFT + 334, 55, 16, 12, "#FFFFFF", "#CCCCCC"), Words(LEFT + 356, 65, "free", size=12),
    ]  # fmt: skip


def _cell(block, size: int) -> list[Shape]:
    """One block: number and owners above, a bar of its slots below, a thick frame if it is shared."""
    row, column = divmod(block.index, _COLUMNS)
    (wide, high), x, y = _CELL, LEFT + column * 70, _TOP + row * _ROW
    edge, line = (INK, 2.6) if block.references > 1 else (GREY, 1) if block.references else ("#CCCCCC", 1)
    kind = "shared" if block.references > 1 else "own" if block.references else "free"
    full = (wide - 8) * block.filled / size
    out: list[Shape] = []
    if block.references:
        empty = dict(fill="#FFFFFF", hatch="before", kind="empty", name=str(block.index))
        out.append(Box(x + 4 + full, y + 22, wide - 8 - full, 20, **empty))
        out.append(Box(x + 4, y + 22, full, 20, _FILL, kind="filled", name=str(block.index)))
        out.append(Words(x + wide - 5, y + 16, _owners(block.owners), "end", size=12, kind="owners"))
    out.append(Words(x + 5, y + 16, str(block.index), bold=bool(block.references), size=12))
    return [*out, Box(x, y, wide, high, edge=edge, line=line, kind=kind, name=str(block.index))]


def _owners(owners: Sequence[int]) -> str:
    """The sequences in as many characters as a cell has room for: "0,2,3", "12 seq."."""
    text = ",".join(map(str, owners))
    return text if len(text) <= 5 else f"{len(owners)} seq."


def _bytes(step, trace: Sequence, y: float) -> list[Shape]:
    """What the blocks take and what the sequences would take one by one, on one scale for the whole trace."""
    largest = max(max(s.capacity, s.stored) for s in trace)
    unit = byte_unit(step.capacity)[0]

    def text(size: int) -> str:
        return format_bytes(size, unit=unit)

    share = f"{100 * step.usage.fragmentation:.1f} %"
    words = (
        f"taken in one layer {text(step.allocated)}, of it empty {text(step.empty)} ({share})",
        f"one copy for each sequence: {text(step.stored)}, sharing saves {text(step.saved)}",
    )
    bars = (
        (("pool bytes", 0, step.capacity, dict(edge="#CCCCCC")),
         ("filled bytes", 0, step.filled, dict(fill=_FILL)),
         ("empty bytes", step.filled, step.empty, dict(fill="#FFFFFF", edge=GREY, hatch="before"))),
        (("stored bytes", 0, step.stored, dict(fill="#BFE6D9")),),
    )  # fmt: skip
    out: list[Shape] = []
    for number, (line, parts) in enumerate(zip(words, bars, strict=True)):
        top = y + 14 + number * 46
        out.append(Words(LEFT, top, line, size=12, kind="bytes"))
        for kind, start, size, look in parts:
            out.append(Box(LEFT + WIDE * start / largest, top + 7, WIDE * size / largest, 14, kind=kind, **look))
    return out
