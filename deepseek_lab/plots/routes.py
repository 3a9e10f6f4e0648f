"""Which experts a token goes to: the text, one bar per expert, and what bias and groups changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arrange import Scale, flow, one_in, scale, spread, y_axis
from .routes_words import bias_note, by_number, changes, headline, summary, visible
from .sheet import WIDTH, Box, Line, Shape, Sheet, Words, draw
from .style import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 450
LEFT, RIGHT, TOP, BOTTOM = 58, 568, 176, 336  # of the bars, in pixels
_MARGIN, _TEXT_Y, _ROW = 14, 50, 23
_LEGEND_Y, _WEIGHT_Y, _NUMBER_Y, _GROUP_Y, _CHANGE_Y = 122, 145, 353, 370, 404
_GROUND, _DROPPED = "#EEEEEE", "#BDBDBD"


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


def expert_routes(
    trace, pieces: Sequence[str], layer: int | None = None, token: int | None = None, ax: Axes | None = None
) -> Axes:
    """Draw which experts one token of a `RoutingTrace` goes to, and return the Axes; the static twin of the widget.

    pieces: the text of each token. layer: index in the model, the last with a router unless told. token: its position,
    the middle of the text unless told. The Axes count in pixels of a picture 580 wide.
    """
    return draw(routes_sheet(trace, pieces, layer, token), ax)


def routes_sheet(trace, pieces: Sequence[str], layer: int | None = None, token: int | None = None) -> Sheet:
    """Plan the picture. Raises ValueError for pieces that are not one per token and for a position outside the text."""
    token, at = check(trace, pieces, layer, token)
    bars = bar_places(at.groups.tolist(), trace.span)
    axis_name = "score (0 to 1)" + " plus bias" * bool(at.bias.any())
    shapes = [
        Words(_MARGIN, 22, headline(at, pieces, token), bold=True, kind="headline"),
        *_text(at, pieces, token),
        *_legend(),
        *_grounds(at, token, bars),
        *y_axis(bars.scale, LEFT, RIGHT),
        Words(16, (TOP + BOTTOM) / 2, axis_name, "middle", size=12, turned=True),
        *_bars(at, token, bars),
        *_chosen(at, token, bars),
        *(Words(_MARGIN, _CHANGE_Y + 18 * i, text, kind="change") for i, text in enumerate(changes(at, token))),
        Words(_MARGIN, _CHANGE_Y + 36, bias_note(at), size=12),
    ]
    return Sheet(HEIGHT, summary(at, pieces, token), tuple(shapes))


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
        raise ValueError(f"expert_routes got {len(pieces)} pieces for {count} tokens; give the text of each token")
    token = count // 2 if token is None else token
    if not 0 <= token < count:
        raise ValueError(f"token={token} is not in this text; choose 0 to {count - 1}")
    return token, trace.at(trace.layers[-1].layer if layer is None else layer)


def _text(at, pieces: Sequence[str], token: int) -> list[Shape]:
    """Two lines of the text around the token: it stands in a dark box, tokens that share its main expert on a bar."""
    shown = [visible(piece) for piece in pieces]
    widths = [8.4 * len(piece) + 2 for piece in shown]
    rows = flow(pieces, widths, WIDTH - 2 * _MARGIN)
    here = next(i for i, row in enumerate(rows) if token in row)
    early = rows[here].index(token) < len(rows[here]) / 2
    first = max(min(here - early, len(rows) - 2), 0)
    main = max(by_number(at, token), key=lambda pair: pair[1])[0]
    out: list[Shape] = []
    for line, row in enumerate(rows[first : first + 2]):
        x, y = float(_MARGIN), _TEXT_Y + _ROW * line
        for i in row:
            marked = i == token
            if marked:
                out.append(Box(x - 1, y - 14, widths[i], 19, INK, kind="token"))
            elif main in at.chosen[i].tolist():
                out.append(Box(x, y + 4, widths[i] - 3, 2.5, INK, kind="shared", name=str(i)))
            colour = "#FFFFFF" if marked else INK
            out.append(Words(x, y, shown[i], bold=marked, mono=True, size=14, colour=colour, kind="piece"))
            x += widths[i]
    note = f"underlined: tokens that also go to expert {main}, the one with the largest weight here"
    return [*out, Words(_MARGIN, _TEXT_Y + 2 * _ROW + 3, note, size=12)]


def _legend() -> list[Shape]:
    y, blue = _LEGEND_Y, PALETTE["experts"]
    out: list[Shape] = [
        Box(14, y - 10, 13, 11, blue, kind="key"),
        Box(80, y - 10, 13, 11, "#FFFFFF", INK, "up", kind="key"),
        Box(181, y - 10, 13, 11, blue, INK, "down", kind="key"),
        Line(((312, y - 4), (326, y - 4)), line=3),
        *_tick(464, y - 4),
    ]
    names = {32: "score", 98: "bias added", 199: "bias taken off", 331: "their sum decides", 474: "chosen, weight"}
    return out + [Words(x, y, text, size=12) for x, text in names.items()]


def _tick(x: float, y: float, kind: str = "") -> list[Shape]:
    return [Line(((x - 5, y), (x - 1.5, y + 4), (x + 5, y - 5)), line=2.2, kind=kind)]


def _grounds(at, token: int, bars: Bars) -> list[Shape]:
    """Groups by name under the bars; the ones that were not kept have a grey ground and say so."""
    out: list[Shape] = []
    kept = at.kept[token].tolist()
    if len(kept) == 1:
        return [Words((LEFT + RIGHT) / 2, _GROUP_Y, "one group: every expert may be chosen", "middle", size=12)]
    for group, ((left, right), inside) in enumerate(zip(bars.group_edges, kept, strict=True)):
        name, state = f"group {group}" if right - left > 48 else str(group), ("kept" if inside else "not kept")
        if not inside:
            out.append(Box(left, TOP, right - left, _GROUP_Y + 5 - TOP, _GROUND, kind="dropped", name=str(group)))
        middle = (left + right) / 2
        short = state if right - left > 48 else "" if inside else "out"
        texts = [f"{name}: {state}"] if right - left > 112 else [name, short]
        out += [Words(middle, _GROUP_Y + 13 * i, text, "middle", size=12, kind="group") for i, text in enumerate(texts)]
    return out


def _bars(at, token: int, bars: Bars) -> list[Shape]:
    out: list[Shape] = []
    kept, groups = at.kept[token].tolist(), at.groups.tolist()
    zero, chosen = bars.scale.pixel(0), set(at.chosen[token].tolist())
    for expert, (score, total) in enumerate(
        zip(at.scores[token].tolist(), at.centred_selection[token].tolist(), strict=True)
    ):
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
    return [*out, Line(((LEFT, zero), (RIGHT, zero)))]


def _chosen(at, token: int, bars: Bars) -> list[Shape]:
    """A weight and a tick above every chosen expert and a line down to its bar; where bars are thin, its number too."""
    chosen, selection = by_number(at, token), at.centred_selection[token].tolist()
    numbered = bars.every > 1
    places = _apart([bars.middle(expert) for expert, _ in chosen], 64 if numbered else 36)
    out: list[Shape] = []
    for (expert, weight), place in zip(chosen, places, strict=True):
        text = f"{expert}: {weight:.2f}" if numbered else f"{weight:.2f}"
        out.append(Words(place, _WEIGHT_Y, text, "middle", bold=True, size=12, kind="weight"))
        out += _tick(place, _WEIGHT_Y + 10, "tick")
        end = bars.scale.pixel(max(selection[expert], at.scores[token, expert].item())) - 3
        corner = ((place, _WEIGHT_Y + 16), (bars.middle(expert), TOP - 3), (bars.middle(expert), max(end, TOP - 3)))
        out.append(Line(corner, dashes=(2, 2), kind="leader", name=str(expert)))
    return out


def _apart(centres: list[float], width: float) -> list[float]:
    """Labels of this width moved apart to both sides alike: the mean of pushing them right and pushing them left."""
    low, high = LEFT - 20, WIDTH - 2
    right = spread(centres, width, low, high)
    left = spread([-centre for centre in reversed(centres)], width, -high, -low)
    return [(a - b) / 2 for a, b in zip(right, reversed(left), strict=True)]
