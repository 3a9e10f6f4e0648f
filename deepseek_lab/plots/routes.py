"""Which experts tokens go to: the text in their colours, one bar per expert for one token, and what rules change."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arrange import Scale, flow, one_in, scale, spread, y_axis
from .routes_words import bias_note, brings, by_number, changes, headline, summary, visible
from .sheet import WIDTH, Box, Line, Shape, Sheet, Words, draw
from .style import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 548
LEFT, RIGHT, TOP, BOTTOM = 58, 568, 261, 411  # of the bars, in pixels
_MARGIN, _TEXT_Y, _ROW, _ROWS, _CELL = 14, 50, 39, 3, 18
_LEGEND_Y, _WEIGHT_Y, _NUMBER_Y, _GROUP_Y, _OUTPUT_Y, _CHANGE_Y = 190, 214, 429, 446, 484, 504
_GROUND, _DROPPED, _SHARED = "#EEEEEE", "#BDBDBD", "#0B4F7D"


@dataclass(frozen=True)
class Bars:
    """Where the experts stand: the left edge of every bar and group in pixels, the width of a bar, the axis."""

    lefts: tuple[float, ...]
    width: float
    group_edges: tuple[tuple[float, float], ...]
    scale: Scale
    every: int  # one expert in so many has its number written

    def middle(self, expert: int) -> float:
        return self.lefts[expert] + self.width / 2


def token_router(
    trace, pieces: Sequence[str], layer: int | None = None, token: int | None = None, bias: bool = True,
    groups: bool = True, shared: bool = True, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Draw which experts the tokens of a `RoutingTrace` go to, and return the Axes; the static twin of the widget.

    pieces: the text of each token. layer: index in the model, the last with a router unless told. token: the position
    of the one shown in full, the middle of the text unless told. bias, groups: whether experts are chosen with the
    correction bias and inside a few groups. shared: whether the shared expert answers. The Axes count in pixels of a
    picture 580 wide.
    """
    return draw(routes_sheet(trace, pieces, layer, token, bias, groups, shared), ax)


def routes_sheet(
    trace, pieces: Sequence[str], layer: int | None = None, token: int | None = None, bias: bool = True,
    groups: bool = True, shared: bool = True,
) -> Sheet:  # fmt: skip
    """Plan the picture. Raises ValueError for pieces that are not one per token and for a position outside the text."""
    token, at = check(trace, pieces, layer, token)
    choice, bars = at.choices[bias, groups], bar_places(at.groups.tolist(), trace.span)
    named = at, pieces, token, (bias, groups)
    selection = (at.centred_selection if bias else at.scores)[token].tolist()
    axis_name = "score (0 to 1)" + " plus bias" * bool(bias and at.bias.any())
    shapes = [
        Words(_MARGIN, 22, headline(*named), bold=True, kind="headline"),
        *_text(choice, pieces, token, len(at.groups)),
        *_legend(),
        *_grounds(choice.kept[token].tolist(), bars, limited=groups),
        *y_axis(bars.scale, LEFT, RIGHT),
        Words(16, (TOP + BOTTOM) / 2, axis_name, "middle", size=12, turned=True),
        *_bars(at, choice, token, selection, bars),
        *_chosen(at, choice, token, selection, bars),
        *_output(choice, token, shared),
        *(Words(_MARGIN, _CHANGE_Y + 18 * i, text, kind="change") for i, text in enumerate(changes(at, token))),
        Words(_MARGIN, _CHANGE_Y + 36, bias_note(at) if bias else "", size=12),
    ]
    return Sheet(HEIGHT, summary(*named, shared), tuple(shapes))


def colour_of(expert: int, count: int) -> str:
    """Return the colour of an expert: a hue of the circle, neighbours in three lightnesses, all under dark ink."""
    parts = colorsys.hls_to_rgb(expert / count, (0.88, 0.8, 0.72)[expert % 3], 0.75)
    return "#" + "".join(f"{round(255 * part):02X}" for part in parts)


def bar_places(groups: Sequence[int], span: tuple[float, float]) -> Bars:
    """Return where the bars stand: equal widths, a gap between groups, and an axis that holds the span of the trace."""
    count, number = len(groups), groups[-1] + 1
    gap = min(20.0, 120.0 / number)
    slot = (RIGHT - LEFT - 8 - gap * (number - 1)) / count
    width = slot * 0.72
    lefts = tuple(LEFT + 4 + slot * i + gap * group + (slot - width) / 2 for i, group in enumerate(groups))
    edges = []
    for group in range(number):
        members = [left for left, g in zip(lefts, groups, strict=True) if g == group]
        edges.append((members[0] - (slot - width) / 2 - 2, members[-1] + (slot + width) / 2 + 2))
    low, high = span
    high = max(high, 1.0) if high > 0.5 else high
    return Bars(lefts, width, tuple(edges), scale(min(low, 0.0), high, BOTTOM, TOP, most=8), one_in(slot))


def check(trace, pieces: Sequence[str], layer: int | None, token: int | None):
    """Return the token and the layer's trace to show. Raises ValueError for what does not fit the trace."""
    count = len(trace.tokens)
    if len(pieces) != count:
        raise ValueError(f"token_router got {len(pieces)} pieces for {count} tokens; give the text of each token")
    token = count // 2 if token is None else token
    if not 0 <= token < count:
        raise ValueError(f"token={token} is not in this text; choose 0 to {count - 1}")
    return token, trace.at(trace.layers[-1].layer if layer is None else layer)


def _text(choice, pieces: Sequence[str], token: int, count: int) -> list[Shape]:
    """Three lines of the text around the token. A token's ground has a stripe for each of its experts, as high as the
    expert's weight; below stands the expert with the largest."""
    shown = [visible(piece) for piece in pieces]
    widths = [max(8.4 * len(piece) + 6, _CELL if count <= 100 else 1.4 * _CELL) for piece in shown]
    rows = flow(pieces, widths, WIDTH - 2 * _MARGIN)
    here = next(i for i, row in enumerate(rows) if token in row)
    first = max(min(here - 1, len(rows) - _ROWS), 0)
    out: list[Shape] = []
    for line, row in enumerate(rows[first : first + _ROWS]):
        x, y = float(_MARGIN), _TEXT_Y + _ROW * line
        for i in row:
            pairs, top, middle = by_number(choice, i), y - 15.0, x + widths[i] / 2
            unit = 20 / sum(weight for _, weight in pairs)
            for expert, weight in pairs:
                out.append(Box(x, top, widths[i], weight * unit, colour_of(expert, count), kind="stripe", name=str(i)))
                top += weight * unit
            main = str(max(pairs, key=lambda pair: pair[1])[0])
            out.append(Words(middle, y, shown[i], "middle", i == token, True, 14, kind="piece"))
            out.append(Words(middle, y + 17, main, "middle", i == token, size=12, kind="main"))
            if i == token:
                out.append(Box(x, y - 15, widths[i], 20, edge=INK, line=2.4, kind="token"))
            x += widths[i]
    note = "stripes: a token's experts, as high as their weights; below, the expert with the largest"
    return [*out, Words(_MARGIN, _TEXT_Y + _ROWS * _ROW, note, size=12)]


def _legend() -> list[Shape]:
    y, blue = _LEGEND_Y, PALETTE["experts"]
    out: list[Shape] = [
        Box(14, y - 10, 13, 11, blue, kind="key"),
        Box(80, y - 10, 13, 11, "#FFFFFF", INK, "up", kind="key"),
        Box(181, y - 10, 13, 11, blue, INK, "down", kind="key"),
        Line(((306, y - 4), (320, y - 4)), line=3),
        *_tick(416, y - 4),
    ]
    names = {32: "score", 98: "bias added", 199: "bias taken off", 325: "sum decides", 426: "chosen: weight, share"}
    return out + [Words(x, y, text, size=12) for x, text in names.items()]


def _tick(x: float, y: float, kind: str = "") -> list[Shape]:
    return [Line(((x - 5, y), (x - 1.5, y + 4), (x + 5, y - 5)), line=2.2, kind=kind)]


def _grounds(kept: list[bool], bars: Bars, limited: bool) -> list[Shape]:
    """Groups by name under the bars; the ones that were not kept have a grey ground and say so."""
    out: list[Shape] = []
    if len(kept) == 1 or not limited:
        why = "one group" if len(kept) == 1 else "no group limit"
        return [Words((LEFT + RIGHT) / 2, _GROUP_Y, f"{why}: every expert may be chosen", "middle", size=12)]
    for group, ((left, right), inside) in enumerate(zip(bars.group_edges, kept, strict=True)):
        name, state = f"group {group}" if right - left > 48 else str(group), ("kept" if inside else "not kept")
        if not inside:
            out.append(Box(left, TOP, right - left, _GROUP_Y + 5 - TOP, _GROUND, kind="dropped", name=str(group)))
        middle = (left + right) / 2
        short = state if right - left > 48 else "" if inside else "out"
        texts = [f"{name}: {state}"] if right - left > 112 else [name, short]
        out += [Words(middle, _GROUP_Y + 13 * i, text, "middle", size=12, kind="group") for i, text in enumerate(texts)]
    return out


def _bars(at, choice, token: int, selection: list[float], bars: Bars) -> list[Shape]:
    count = len(at.groups)
    colours = [Box(x, _NUMBER_Y - 12, bars.width, 15, colour_of(i, count), kind="colour", name=str(i))
               for i, x in enumerate(bars.lefts)]  # fmt: skip
    out: list[Shape] = [*colours, Line(((LEFT, bars.scale.pixel(0)), (RIGHT, bars.scale.pixel(0))))]
    kept, groups = choice.kept[token].tolist(), at.groups.tolist()
    zero, chosen = bars.scale.pixel(0), set(choice.chosen[token].tolist())
    for expert, (score, total) in enumerate(zip(at.scores[token].tolist(), selection, strict=True)):
        left, name, inside = bars.lefts[expert], str(expert), kept[groups[expert]]
        top, end = bars.scale.pixel(score), bars.scale.pixel(total)
        fill = PALETTE["experts"] if inside else _DROPPED
        edge = dict(edge=INK, line=2.0) if expert in chosen else {}
        out.append(Box(left, top, bars.width, zero - top, fill, kind="score", name=name, **edge))
        if total != score:
            hatch, ground = ("up", "#FFFFFF" if inside else _GROUND) if total > score else ("down", fill)
            out.append(Box(left, min(top, end), bars.width, abs(top - end), ground, INK, hatch, kind="bias", name=name))
        out.append(Line(((left - 1.5, end), (left + bars.width + 1.5, end)), line=3, kind="sum", name=name))
        if expert % bars.every == 0:
            bold = expert in chosen and bars.every == 1
            out.append(Words(bars.middle(expert), _NUMBER_Y, name, "middle", bold=bold, size=12, kind="number"))
    return out


def _chosen(at, choice, token: int, selection: list[float], bars: Bars) -> list[Shape]:
    """What every chosen expert brings, its weight and a tick above its bar; where bars are thin, its number too."""
    chosen, brought = by_number(choice, token), brings(choice, token)
    numbered = bars.every > 1
    places = _apart([bars.middle(expert) for expert, _ in chosen], 64 if numbered else 36)
    out: list[Shape] = []
    for (expert, weight), place in zip(chosen, places, strict=True):
        text = f"{expert}: {weight:.2f}" if numbered else f"{weight:.2f}"
        out.append(Words(place, _WEIGHT_Y, text, "middle", bold=True, size=12, kind="weight"))
        out.append(Words(place, _WEIGHT_Y + 15, brought.get(expert, ""), "middle", size=12, kind="share"))
        out += _tick(place, _WEIGHT_Y + 25, "tick")
        end = bars.scale.pixel(max(selection[expert], at.scores[token, expert].item())) - 3
        corner = ((place, _WEIGHT_Y + 31), (bars.middle(expert), TOP - 3), (bars.middle(expert), max(end, TOP - 3)))
        out.append(Line(corner, dashes=(2, 2), kind="leader", name=str(expert)))
    return out


def _output(choice, token: int, shared: bool) -> list[Shape]:
    """A bar of the layer's output: what the routed experts bring, and what the shared one brings or takes away."""
    if choice.shares is None:
        return []
    said, y, left, room = brings(choice, token), _OUTPUT_Y, 116, 200
    own = room * min(max(choice.shares[token, -1].item(), 0.0), 1.0)
    x, corners = left + room - own, ((0, -11), (own, -11), (own, 2), (0, 2), (0, -11))
    out: list[Shape] = [Words(_MARGIN, y, "output made by", size=12)]
    out.append(Box(left, y - 11, room - own, 13, PALETTE["experts"], INK, kind="routed part"))
    if shared:
        out.append(Box(x, y - 11, own, 13, _SHARED, INK, kind="shared part"))
    else:
        edges = tuple((x + dx, y + dy) for dx, dy in corners)
        out.append(Line(edges, dashes=(2, 2), kind="lost part"))
    text = f"routed {said['routed']}, shared expert {said['shared']}" + " lost" * (not shared)
    return [*out, Words(left + room + 8, y, text, size=12, kind="output")]


def _apart(centres: list[float], width: float) -> list[float]:
    """Labels of this width moved apart to both sides alike: the mean of pushing them right and pushing them left."""
    low, high = LEFT - 20, WIDTH - 2
    right = spread(centres, width, low, high)
    left = spread([-centre for centre in reversed(centres)], width, -high, -low)
    return [(a - b) / 2 for a, b in zip(right, reversed(left), strict=True)]
