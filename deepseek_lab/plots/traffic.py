"""Where tokens travel: a text in the middle, nodes on both sides, a line for every copy that leaves, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepseek_lab.units import byte_unit, format_bytes

from .routes_words import token_name, visible
from .sheet import Box, Line, Shape, Sheet, Words, draw
from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 532
MOST_NODES, ROWS = 8, 12
LEFT, RIGHT = 14, 566
TOP, PITCH = 104, 26  # of the first row, from row to row
_NODE, _CENTRE = 128, 290
_BARS_Y, _BAR_X, _BAR = 440, 158, 150
_BLUE, _PALE, _BACK = PALETTE["experts"], "#CFE8F7", "#E4F2FB"


def traffic_map(
    layers: Sequence, pieces: Sequence[str], layer: int | None = None, token: int | None = None, ax: Axes | None = None
) -> Axes:
    """Draw to which nodes the tokens of a text travel, without the limit and with it; the static twin of the widget.

    layers: what `experts.trace_traffic` returns. pieces: the text of each token. layer: index in the model, the last
    unless told. token: its position, the middle of the text unless told. The Axes count in pixels of a picture 580
    wide. Raises ValueError as `check_traffic`.
    """
    return draw(traffic_sheet(layers, pieces, *check_traffic(layers, pieces, layer, token)), ax)


def check_traffic(layers: Sequence, pieces: Sequence[str], layer: int | None, token: int | None) -> tuple[int, int]:
    """Return layer and token to show. ValueError for what the traffic does not hold, and for more than 8 nodes."""
    known = {at.layer: at for at in layers}
    if not known:
        raise ValueError("traffic_map got no layers; give what experts.trace_traffic returns")
    layer = max(known) if layer is None else layer
    if layer not in known:
        raise ValueError(f"layer {layer} has no traffic here; choose one of {', '.join(map(str, known))}")
    count, nodes = known[layer].limited.slots.shape
    if len(pieces) != count or not count:
        raise ValueError(f"traffic_map got {len(pieces)} pieces for {count} tokens; give the text of each token")
    if nodes > MOST_NODES:
        raise ValueError(f"traffic_map got {nodes} nodes; it draws up to {MOST_NODES}")
    token = count // 2 if token is None else token
    if not 0 <= token < count:
        raise ValueError(f"token={token} is not in this text; choose 0 to {count - 1}")
    return layer, token


def traffic_sheet(layers: Sequence, pieces: Sequence[str], layer: int, token: int) -> Sheet:
    """Plan the picture of one layer around one token."""
    at = next(at for at in layers if at.layer == layer)
    sides = (("without", at.free), ("with", at.limited))
    first = max(min(token - ROWS // 2, len(pieces) - ROWS), 0)
    shown = range(first, min(first + ROWS, len(pieces)))
    here = [side.nodes_touched[token].item() for _, side in sides]
    title = f"{token_name(pieces, token)}, layer {layer}: {_nodes(here[0])} without limit, {here[1]} with"
    shapes: list[Shape] = [
        Words(LEFT, 22, title, bold=True, kind="headline"),
        Words(LEFT, 43, "a line is one copy of a token, thicker where more of its experts live", size=12),
        Words(LEFT, 59, "a node is as full as its share of the text's tokens", size=12),
        Words(LEFT, 87, "no limit", bold=True),
        Words(_CENTRE, 87, f"tokens {shown[0]:,} to {shown[-1]:,}", "middle", size=12),
        Words(RIGHT, 87, f"at most {_nodes(at.limit)}", "end", bold=True),
    ]
    for name, side in sides:
        shapes += _side(name, side, pieces, shown, token)
    shapes += _tokens(pieces, shown, token)
    bars = _bars(at, token)
    said = "; ".join(shape.text for shape in bars if getattr(shape, "kind", "") == "bytes")
    detail = "; ".join(f"{name} the limit, tokens at each node: {_list(side.tokens)}" for name, side in sides)
    return Sheet(HEIGHT, f"{title}. Bytes out and back: {said}", (*shapes, *bars), detail)


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _list(counts) -> str:
    return ", ".join(map(str, counts.tolist()))


def _half(pieces: Sequence[str], shown: range) -> float:
    """Half the width of the column of tokens."""
    return max(4.2 * max(len(visible(pieces[i])) for i in shown) + 5, 12)


def _side(name: str, side, pieces: Sequence[str], shown: range, token: int) -> list[Shape]:
    """The nodes of one side and the lines that lead there, those of the chosen token dark and on top."""
    nodes, half = side.slots.shape[1], _half(pieces, shown)
    out = -1 if name == "without" else 1
    step = ROWS * PITCH / nodes
    start, end = _CENTRE + out * (half + 2), (LEFT + _NODE if out < 0 else RIGHT - _NODE)
    lines: list[tuple[bool, Line]] = []
    for row, i in enumerate(shown):
        for node, slots in enumerate(side.slots[i].tolist()):
            if slots:
                arrives = TOP - 4 + node * step + (step - 8) * (row + 1) / (len(shown) + 1)
                points = ((start, TOP + (row + 0.5) * PITCH - 4), (end, arrives))
                look = (INK, 1.2 + slots * 0.8) if i == token else (_BLUE, 0.2 + slots * 0.6)
                lines.append((i == token, Line(points, *look, kind=name, name=f"{i} to {node}")))
    boxes = []
    for node in range(nodes):
        boxes += _node(name, side, node, TOP - 4 + node * step, step - 8, token)
    return [*(line for _, line in sorted(lines, key=lambda pair: pair[0])), *boxes]


def _node(name: str, side, node: int, y: float, high: float, token: int) -> list[Shape]:
    """One node: as full as it has tokens of the text, framed if the chosen token travels there."""
    x = LEFT if name == "without" else RIGHT - _NODE
    count, received, slots = len(side.slots), side.tokens[node].item(), side.slots[token, node].item()
    middle = y + high / 2
    frame = dict(edge=INK, line=2.4) if slots else dict(edge=GREY)
    out: list[Shape] = [
        Box(x, y, _NODE * received / count, high, _PALE, kind="received", name=f"{name} {node}"),
        Box(x, y, _NODE, high, kind="node", name=f"{name} {node}", **frame),
        Words(x + 6, middle - 3, f"node {node}", bold=bool(slots), size=12),
        Words(x + 6, middle + 12, f"{received:,}{f' of {count}' * (count < 1_000)} tokens", size=12),
    ]
    if slots:
        experts = "1 expert" if slots == 1 else f"{slots} experts"
        out.append(Words(x + _NODE - 6, middle - 3, experts, "end", size=12, kind="experts"))
    return out


def _tokens(pieces: Sequence[str], shown: range, token: int) -> list[Shape]:
    """The text from top to bottom; the chosen token stands in a dark box."""
    half, out = _half(pieces, shown), []
    for row, i in enumerate(shown):
        y, here = TOP + (row + 0.5) * PITCH, i == token
        if here:
            out.append(Box(_CENTRE - half, y - 13, 2 * half, 18, INK, kind="token"))
        colour = "#FFFFFF" if here else INK
        out.append(Words(_CENTRE, y, visible(pieces[i]), "middle", here, True, 14, colour, kind="piece"))
    return out


def _bars(at, token: int) -> list[Shape]:
    """Bytes out and back, of this token and of the whole text: two bars each, on one scale."""
    y = _BARS_Y
    out: list[Shape] = [
        Words(LEFT, y, "each pair to its own scale", size=12),
        Box(210, y - 11, 16, 12, _BLUE), Words(232, y, "out: FP8 codes and scales", size=12),
        Box(414, y - 11, 16, 12, _BACK, hatch="up"), Words(436, y, "back: BF16", size=12),
    ]  # fmt: skip
    count, y = len(at.free.slots), y + 5
    for title, chosen in (("this token", slice(token, token + 1)), (f"all {count:,}", slice(None))):
        pairs = [(s.dispatched[chosen].sum().item(), s.combined[chosen].sum().item()) for s in (at.free, at.limited)]
        totals = [sum(pair) for pair in pairs]
        unit = byte_unit(totals[0])[0]
        out.append(Words(LEFT, y + 19, title, bold=True, size=12))
        for number, (name, side) in enumerate((("without", at.free), ("with", at.limited))):
            y += 17 if number else 18
            there, back = (_BAR * size / max(totals) for size in pairs[number])
            nodes = side.nodes_touched[chosen].double().mean().item()
            words = _nodes(int(nodes)) if title == "this token" else f"{nodes:.2f} nodes each"
            words += f", {format_bytes(totals[number], unit=unit)}"
            if number and totals[0] != totals[1]:
                words += f", {100 * (totals[1] / totals[0] - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")
            out += [
                Words(LEFT + 88, y + 1, name, size=12),
                Box(_BAR_X, y - 9, there, 12, _BLUE, kind="out bytes", name=f"{title} {name}"),
                Box(_BAR_X + there, y - 9, back, 12, _BACK, hatch="up", kind="back bytes", name=f"{title} {name}"),
                Words(_BAR_X + _BAR + 10, y + 1, words, size=12, kind="bytes"),
            ]
        y += 6
    return out
