"""A text written with drafts, pass by pass: what was guessed, what stands, what was refused, and what that saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .arrange import flow, printable
from .routes_words import VISIBLE, visible
from .sheet import Box, Line, Shape, Sheet, Words, draw
from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DRAFTS = 4
LEFT, WIDE = 14, 552
_CELL_Y, _CELL, _LEGEND_Y, _TEXT_Y, _ROW, _ROWS = 78, (106, 30), 166, 210, 40, 6
_LETTER, _ACCEPTED, _REFUSED = 8.4, "#BFE6D9", PALETTE["gradients"]

Spell = Callable[[int], str]


def speculation_viewer(speculation, spell: Spell, step: int = -1, ax: Axes | None = None) -> Axes:
    """Draw a text as it stood after one pass of the model; the static twin of the widget.

    speculation: a `generation.Speculation`. spell: a function from a token's number to its text. step: which pass
    behind the prompt, the last unless told. The Axes, which it returns, count in pixels of a picture 580 wide.
    Raises ValueError as `check_speculation`, IndexError for a pass that is not there.
    """
    steps = check_speculation(speculation)
    return draw(speculation_sheet(speculation, spell, range(len(steps))[step]), ax)


def check_speculation(speculation) -> Sequence:
    """Return the passes. Raises ValueError for none, and for more than 4 drafts in one."""
    steps = speculation.steps
    if not steps:
        raise ValueError("speculation_viewer got a text without a pass behind its prompt; let at least two tokens be "
                         "written")  # fmt: skip
    if (most := max(len(step.drafted) for step in steps)) > MOST_DRAFTS:
        raise ValueError(f"speculation_viewer got {most} drafts in one pass; it draws up to {MOST_DRAFTS}")
    return steps


def speculation_sheet(speculation, spell: Spell, number: int) -> Sheet:
    """Plan the picture of one pass: its drafts above, the text so far, and tokens against passes below."""
    steps = speculation.steps
    past, step = steps[: number + 1], steps[number]
    place, told = f"pass {number + 1} of {len(steps)}", account(past)
    tokens = speculation.tokens[0].tolist()
    pieces = [_shown(spell(token)) for token in tokens]
    rows = flow(pieces, [_width(piece) for piece in pieces], WIDE)
    shown = min(len(rows), _ROWS)
    bottom = _TEXT_Y + _ROW * shown
    shapes = [
        Words(LEFT, 22, f"{place}: {outcome(step)}", bold=True, kind="headline"),
        Words(LEFT, 43, told, kind="account"),
        *_checked(step, spell),
        *_legend(),
        *_text(pieces, rows, past, spell),
        *_bars(steps, number, bottom + 6),
    ]
    text = "".join(spell(token) for token in tokens[: step.place + len(step.written)])
    return Sheet(bottom + 62, f"{place}: {deed(step, spell)}. {told}", tuple(shapes), printable(text))


def outcome(step) -> str:
    """Return in a few words what became of the drafts of a pass."""
    drafted = len(step.drafted)
    if drafted > 1:
        return f"{step.accepted} of {drafted} drafts accepted"
    return f"the draft is {'accepted' if step.accepted else 'refused'}" if drafted else "nothing to guess"


def deed(step, spell: Spell) -> str:
    """Return which drafts of a pass were accepted, which was refused, and which token the model wrote itself."""
    own, right = _quoted(step.written[-1], spell), [_quoted(token, spell) for token in step.drafted[: step.accepted]]
    if not step.drafted:
        return f"nothing to guess, the model writes {own}"
    stands = f"{' '.join(right)} accepted, " if right else ""
    if step.accepted < len(step.drafted):
        return f"{stands}{_quoted(step.drafted[step.accepted], spell)} refused, the model writes {own}"
    return f"{stands}the model adds {own}"


def account(past: Sequence) -> str:
    """Return in words how many tokens so many passes wrote, and how many drafts were accepted."""
    written, drafted = (sum(len(getattr(step, name)) for step in past) for name in ("written", "drafted"))
    accepted, several = sum(step.accepted for step in past), "es" * (len(past) > 1)
    return (
        f"{written:,} tokens in {len(past):,} pass{several}, {written / len(past):.2f} a pass; "
        f"{accepted:,} of {drafted:,} drafts accepted"
    )


def _quoted(token: int, spell: Spell) -> str:
    return f"“{visible(spell(token))}”"


def _shown(piece: str) -> str:
    """Return a token's text as it stands in a line: as `visible`, but a space stays a space."""
    return printable("".join(c if c == " " else VISIBLE.get(c, c) for c in piece) or VISIBLE[""])


def _width(piece: str) -> float:
    return _LETTER * len(piece) + 2


def _checked(step, spell: Spell) -> list[Shape]:
    """One cell per draft, struck out if it was refused, then the token of the model's own."""
    out: list[Shape] = [Words(LEFT, _CELL_Y - 10, "this pass", size=12)]
    wide, high = _CELL
    for place, token in enumerate([*step.drafted, step.written[-1]]):
        x, own = LEFT + (wide + 5) * place, place == len(step.drafted)
        right, refused = place < step.accepted, step.accepted == place < len(step.drafted)
        kind = "own" if own else "accepted" if right else "refused" if refused else "unseen"
        fill = _ACCEPTED if right else "#FFFFFF"
        out.append(Box(x, _CELL_Y, wide, high, fill, INK if right or own else GREY, line=1.6, kind=kind))
        out.append(Words(x + wide / 2, _CELL_Y + 21, visible(spell(token)), "middle", True, True, 14, kind="checked"))
        out += [_stroke(x + 6, _CELL_Y + high - 5, wide - 12, high - 10)] if refused else []
        said = {"own": ("the model's own",), "unseen": ("not looked at",)}.get(kind)
        for line, words in enumerate(said or (kind, f"odds {step.odds[place]:.2f}")):
            out.append(Words(x + wide / 2, _CELL_Y + high + 15 + 15 * line, words, "middle", size=12, kind="verdict"))
    return out


def _stroke(x: float, y: float, wide: float, high: float) -> Line:
    """A line through something, from its left bottom corner (x, y) up to the right."""
    return Line(((x, y), (x + wide, y - high)), _REFUSED, 1.8, kind="stroke")


def _legend() -> list[Shape]:
    y = _LEGEND_Y
    return [
        Words(LEFT, y, "prompt", size=12, colour="#666666"),
        Box(LEFT + 58, y - 11, 14, 14, _ACCEPTED), Line(((LEFT + 58, y + 3), (LEFT + 72, y + 3)), INK, 1.6),
        Words(LEFT + 78, y, "accepted draft", size=12),
        Words(LEFT + 184, y, "a", mono=True, size=14), Words(LEFT + 198, y, "the model's own", size=12),
        Words(LEFT + 312, y, "a", mono=True, size=12), _stroke(LEFT + 310, y + 2, 12, 12),
        Words(LEFT + 326, y, "refused draft", size=12),
        Box(LEFT + 426, y - 12, 16, 17, edge=INK, line=2.4), Words(LEFT + 448, y, "this pass", size=12),
    ]  # fmt: skip


def _text(pieces: Sequence[str], rows: Sequence[Sequence[int]], past: Sequence, spell: Spell) -> list[Shape]:
    """The text up to the last pass, in its last six lines; refused drafts stand small above what was written."""
    now, first = past[-1], past[0].place - 1  # the prompt's own pass wrote one token
    accepted = {step.place + i for step in past for i in range(step.accepted)}
    refused = {step.place + step.accepted: step.drafted[step.accepted] for step in past
               if step.accepted < len(step.drafted)}  # fmt: skip
    end = now.place + len(now.written)
    here = next(i for i, row in enumerate(rows) if end - 1 in row)
    top = max(here - _ROWS + 1, 0)
    out: list[Shape] = []
    for line, row in enumerate(rows[top : here + 1]):
        x, y = float(LEFT), _TEXT_Y + _ROW * line
        for i in (i for i in row if i < end):
            wide = _width(pieces[i])
            if i in accepted:
                out.append(Box(x, y - 13, wide, 18, _ACCEPTED, kind="stands", name=str(i)))
                out.append(Line(((x, y + 5), (x + wide, y + 5)), INK, 1.6))
            if i in refused:
                word = visible(spell(refused[i]))
                left, long = min(x, LEFT + WIDE - 7.4 * len(word)), 7.4 * len(word)
                out.append(Words(left + 2, y - 17, word, mono=True, size=12, kind="small"))
                out.append(_stroke(left, y - 16, long + 3, 11))
            colour = "#666666" if i < first else INK
            out.append(Words(x + 1, y, pieces[i], mono=True, size=14, colour=colour, kind="piece"))
            if i >= now.place:
                out.append(Box(x, y - 15, wide, 21, edge=INK, line=2.4, kind="now", name=str(i)))
            x += wide
    return out


def _bars(steps: Sequence, number: int, y: float) -> list[Shape]:
    """Tokens above, passes below, on one scale for the whole text: without drafts both would be equally long."""
    unit = (WIDE - 110) / sum(len(step.written) for step in steps)
    accepted, passes, x = sum(step.accepted for step in steps[: number + 1]), number + 1, LEFT + 110
    return [
        Words(LEFT, y + 13, f"{passes + accepted:,} tokens", size=12, kind="tokens"),
        Box(x, y, passes * unit, 16, "#FFFFFF", INK, kind="own tokens"),
        Box(x + passes * unit, y, accepted * unit, 16, _ACCEPTED, INK, kind="accepted tokens"),
        Words(LEFT, y + 37, f"{passes:,} pass{'es' * (passes > 1)}", size=12, kind="passes"),
        Box(x, y + 24, passes * unit, 16, GREY, INK, kind="passes of the model"),
    ]
