"""A sheet as an SVG text: what the widgets put on the page."""

from __future__ import annotations

from html import escape

from deepseek_lab.plots.sheet import WIDTH, Box, Line, Shape, Sheet, Words
from deepseek_lab.plots.style import GREY, INK

_FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
_MONO = "ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace"
#: The textures of `plots.sheet.HATCHES`: the side of a square that repeats, how far it is turned, what is in it.
_PATTERNS = {
    "up": (5, 45, f'<path d="M0 0 V5" stroke="{INK}" stroke-width="2"/>'),
    "down": (5, -45, f'<path d="M0 0 V5" stroke="{INK}" stroke-width="2"/>'),
    "before": (7, 45, f'<path d="M0 0 V7" stroke="{GREY}" stroke-width="2.4"/>'),
    "dots": (6, 0, '<circle cx="3" cy="3" r="1.2" fill="#fff"/>'),
}


def sheet_svg(sheet: Sheet, ids: str = "sheet") -> str:
    """Return the sheet as SVG of fixed size; aria-label is its label. ids: the beginning of its patterns' ids."""
    painters = {Box: _box, Line: _line, Words: _words}
    shapes = "".join(painters[type(shape)](shape, ids) for shape in sheet.shapes)
    detail = f"<desc>{escape(sheet.detail)}</desc>" if sheet.detail else ""
    patterns = "".join(
        f'<pattern id="{ids}-{name}" width="{side}" height="{side}" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({turn})">{content}</pattern>'
        for name, (side, turn, content) in _PATTERNS.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {sheet.height}" width="{WIDTH}" '
        f'height="{sheet.height}" style="max-width:100%;height:auto;display:block" role="img" '
        f'aria-label="{escape(sheet.label)}" font-family="{_FONT}" fill="{INK}">{detail}<defs>{patterns}</defs>'
        f'<rect width="{WIDTH}" height="{sheet.height}" rx="4" fill="#fff"/>{shapes}</svg>'
    )


def _marks(shape: Shape) -> str:
    """Return what tests find a shape by."""
    name = getattr(shape, "name", "")
    return f' class="{shape.kind}"' * bool(shape.kind) + f' data-name="{escape(name)}"' * bool(name)


def _box(box: Box, ids: str) -> str:
    place = f'x="{box.x:.3f}" y="{box.y:.3f}" width="{box.width:.3f}" height="{box.height:.3f}"'
    edge = f' stroke="{box.edge}" stroke-width="{box.line}"' if box.edge != "none" else ""
    if not box.hatch:
        return f'<rect{_marks(box)} {place} fill="{box.fill}"{edge}/>'
    return f'<rect {place} fill="{box.fill}"/><rect{_marks(box)} {place} fill="url(#{ids}-{box.hatch})"{edge}/>'


def _line(line: Line, _ids: str) -> str:
    path = "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in line.points) + (" Z" if line.fill != "none" else "")
    look = f'fill="{line.fill}" stroke="{line.edge}" stroke-width="{line.line}"'
    dashes = f' stroke-dasharray="{line.dashes[0]} {line.dashes[1]}"' if line.dashes else ""
    return f'<path{_marks(line)} d="{path}" {look}{dashes}/>'


def _words(words: Words, _ids: str) -> str:
    look = f'text-anchor="{words.anchor}" font-size="{words.size}"'
    look += ' font-weight="600"' * words.bold + f' fill="{words.colour}"' * (words.colour != INK)
    if words.mono:
        look += f' font-family="{_MONO}"'
    if words.mono and len(words.text) > 1:  # spaces count, and foreign scripts keep the order of their tokens
        look += ' xml:space="preserve" style="white-space:pre;unicode-bidi:bidi-override"'
    if words.turned:
        look += f' transform="rotate(-90 {words.x:.1f} {words.y:.1f})"'
    return f'<text{_marks(words)} x="{words.x:.1f}" y="{words.y:.1f}" {look}>{escape(words.text)}</text>'
