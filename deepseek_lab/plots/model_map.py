"""The model map: the model drawn as a stack of layers, a layer drawn from within, and the tensors of one block."""

from __future__ import annotations

from itertools import groupby
from posixpath import commonpath
from typing import TYPE_CHECKING

from deepseek_lab.config import ModelConfig
from deepseek_lab.units import format_bytes, format_count, format_flops

from .model_blocks import MODULE, WHOLE, Row, block, pieces, rows, together
from .model_drawing import COLOURS, drawing, pale
from .sheet import Box, Line, Shape, Sheet, Words, draw
from .style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 634
_LEFT, _RIGHT, _BAR, _BAR_END = 14, 566, 130, 490
_SHARES_Y, _TABLE_Y, _ROW, _DIM = 350, 420, 18, "#555555"
#: Where the columns of the table end, and what stands above them.
_COLUMNS = ((279, "shape"), (330, "count"), (402, "FP8 file"), (473, "BF16 file"), (_RIGHT, "for a token"))


def model_map(config: ModelConfig, block: str = WHOLE, ax: Axes | None = None) -> Axes:
    """Draw the model with one block marked, and the tensors of that block; the static twin of the widget.

    block: "whole model", a place such as "expert layers" or "prediction module", or a role in a layer such as
    "attention" or "routed experts"; see `model_blocks.block_names`. A token's FLOP are two for each weight that it
    uses; what attention does with earlier tokens comes on top. Returns the Axes, in pixels of a picture 580 wide.
    Raises ValueError for a block that the model does not have, naming those it has.
    """
    return draw(map_sheet(config, block), ax)


def map_sheet(config: ModelConfig, name: str = WHOLE) -> Sheet:
    """Plan the picture of a model with the block `name` marked."""
    found, table = block(config, name), rows(config, name)
    model = together("model", [p.row for p in pieces(config) if p.place != MODULE])
    own = together(name, [p.row for p in found if name != WHOLE or p.place != MODULE])
    title, uses = headline(own, model), used(own)
    shapes = [
        Words(_LEFT, 22, title, bold=True, kind="headline"),
        Words(_LEFT, 42, uses, size=12.5, kind="used"),
        *drawing(config, name),
        *_shares(config, name, own, model),
        *_table(table, together("together", table)),
    ]
    sizes = f"{format_bytes(own.stored)} in the FP8 layout of V3's files, {format_bytes(own.plain)} in BF16"
    return Sheet(HEIGHT, f"{title}. {uses}; {sizes}", tuple(shapes), "; ".join(_spoken(row) for row in table))


def headline(own: Row, model: Row) -> str:
    """Return how much of the model's parameters a block holds; a prediction module comes on top of them."""
    if own.name == WHOLE:
        return f"whole model: {own.elements:,} parameters"
    counted, of = format_count(own.elements), "of the model"
    if own.name == MODULE:
        return f"{own.name}: {counted} numbers in the files, {_percent(own.elements, model.elements)} on top {of}"
    return (
        f"{own.name}: {counted} of {format_count(model.elements)} parameters, {_percent(own.elements, model.elements)}"
    )


def used(own: Row) -> str:
    """Return how many tensors a block has, and how much of it works on one token."""
    count = f"{own.tensors:,} tensor{'s' * (own.tensors != 1)}"
    if not own.flops:
        return f"{own.elements:,} numbers in {count}; a token reads one row and multiplies nothing"
    return f"{own.elements:,} numbers in {count}; a token uses {own.flops // 2:,}: {format_flops(own.flops)}"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 0.95 else f"{share:.1g} %"


def _shares(config: ModelConfig, name: str, own: Row, model: Row) -> list[Shape]:
    """Two bars of the whole model, by what is stored and by what works on a token; the block in full colour."""
    out: list[Shape] = []
    marked = set(map(id, block(config, name)))
    for number, (field, words) in enumerate((("elements", "parameters"), ("flops", "a token's FLOP"))):
        y, whole = _SHARES_Y + 26 * number, getattr(model, field)
        beyond = together(MODULE, [p.row for p in pieces(config)])
        pixel = (_BAR_END - _BAR) / getattr(beyond, field)
        out.append(Words(_LEFT, y + 13, words, size=12.5))
        x = float(_BAR)
        for (role, place, lit), group in groupby(
            pieces(config), key=lambda p: (p.role, p.place == MODULE, id(p) in marked)
        ):
            wide = pixel * sum(getattr(p.row, field) for p in group)
            colour = COLOURS[MODULE if place else role]
            out.append(Box(x, y, wide, 16, colour if lit else pale(colour), kind="share", name=field + " " + role))
            x += wide
        end = _BAR + pixel * whole
        out.append(Box(_BAR, y, end - _BAR, 16, edge=GREY, kind="model", name=field))
        out.append(Words(_RIGHT, y + 13, _percent(getattr(own, field), whole), "end", True, kind="percent"))
    return out


def _table(table: list[Row], sums: Row) -> list[Shape]:
    """The tensors, a line each, under the beginning that their names have in common."""
    prefix, several = _common([row.name for row in table]), len(table) > 1
    out: list[Shape] = [Line(((_LEFT, _TABLE_Y + 24), (_RIGHT, _TABLE_Y + 24)), GREY)]
    out.append(
        Words(_LEFT, _TABLE_Y, prefix + "\N{HORIZONTAL ELLIPSIS}" * bool(prefix), mono=True, size=11.5, kind="prefix")
    )
    out += [Words(x, _TABLE_Y + 18, title, "end", size=11.5, colour=_DIM) for x, title in _COLUMNS]
    for number, row in enumerate([*table, sums] if several else table, start=1):
        last, y = row is sums, _TABLE_Y + 24 + number * _ROW
        out.append(Words(_LEFT, y, row.name.removeprefix(prefix), mono=not last, size=11, bold=last, kind="tensor"))
        for (x, _), text in zip(_COLUMNS, _cells(row), strict=True):
            out.append(Words(x, y, text, "end", last, size=11.5, kind="cell"))
    return out


def _common(names: list[str]) -> str:
    """Return what all names begin with, up to a dot; of one name in a layer all but the last two words."""
    if len(names) == 1:
        return names[0].rpartition(".")[0].rpartition(".")[0] + "." if ".layers." in names[0] else ""
    shared = commonpath([name.replace(".", "/") for name in names]).replace("/", ".")
    return shared and shared + "."


def _cells(row: Row) -> tuple[str, ...]:
    shape = " \N{MULTIPLICATION SIGN} ".join(f"{side:,}" for side in row.shape)
    return shape, f"{row.tensors:,}", format_bytes(row.stored), format_bytes(row.plain), format_flops(row.flops)


def _spoken(row: Row) -> str:
    shape, tensors, stored, plain, flops = _cells(row)
    return f"{row.name}: {tensors} tensors{' of ' + shape if shape else ''}, {stored}, in BF16 {plain}, {flops}"
