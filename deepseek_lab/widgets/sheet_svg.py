"""A sheet as an SVG text: what the widgets put on the page."""

from __future__ import annotations

from html import escape

from deepseek_lab.plots.sheet import WIDTH, Box, Line, Sheet, Words
from deepseek_lab.plots.style import INK

_FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
_MONO = "ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace"
_TURNS = {"up": 45, "down": -45}


def sheet_svg(sheet: Sheet, ids: str = "sheet") -> str:
    """Return the sheet as SVG of fixed size; aria-label is its label. ids: the beginning of its patterns' ids."""
    painters = {Box: _box, Line: _line, Words: _words}
    shapes = "".join(painters[type(shape)](shape, ids) for shape in sheet.shapes)
    detail = f"<desc>{escape(sheet.detail)}</desc>" if sheet.detail else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {sheet.height}" width="{WIDTH}" '
        f'height="{sheet.height}" style="max-width:100%;height:auto;display:block" role="img" '
        f'aria-label="{escape(sheet.label, quote=True)}" font-family="{_FONT}" fill="{INK}">{detail}{_patterns(ids)}'
        f'<rect width="{WIDTH}" height="{sheet.height}" rx="4" fill="#fff"/>{shapes}</svg>'
    )


def _patterns(ids: str) -> str:
    made = "".join(
        f'<pattern id="{ids}-{name}" width="5" height="5" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({turn})"><path d="M0 0 V5" stroke="{INK}" stroke-width="2"/></pattern>'
        for name, turn in _TURNS.items()
    )
    return f"<defs>{made}</defs>"


def _box(box: Box, ids: str) -> str:
    place = f'x="{box.x:.2f}" y="{box.y:.2f}" width="{box.width:.2f}" height="{box.height:.2f}"'
    marks = f' class="{box.kind}"' * bool(box.kind) + f' data-name="{escape(box.name)}"' * bool(box.name)
    edge = f'stroke="{box.edge}" stroke-width="{box.line}"' if box.edge != "none" else ""
    if not box.hatch:
        return f'<rect{marks} {place} fill="{box.fill}" {edge}/>'
    return f'<rect {place} fill="{box.fill}"/><rect{marks} {place} fill="url(#{ids}-{box.hatch})" {edge}/>'


def _line(line: Line, _ids: str) -> str:
    path = "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in line.points) + (" Z" if line.fill != "none" else "")
    marks = f' class="{line.kind}"' * bool(line.kind) + f' data-name="{escape(line.name)}"' * bool(line.name)
    dashes = f' stroke-dasharray="{line.dashes[0]} {line.dashes[1]}"' if line.dashes else ""
    return f'<path{marks} d="{path}" fill="{line.fill}" stroke="{line.edge}" stroke-width="{line.line}"{dashes}/>'


def _words(words: Words, _ids: str) -> str:
    look = f'text-anchor="{words.anchor}" font-size="{words.size}"'
    look += ' font-weight="600"' * words.bold + f' fill="{words.colour}"' * (words.colour != INK)
    if words.mono:
        look += f' font-family="{_MONO}"'
    if words.mono and len(words.text) > 1:  # spaces count, and foreign scripts keep the order of their tokens
        look += ' xml:space="preserve" style="white-space:pre;unicode-bidi:bidi-override"'
    if words.turned:
        look += f' transform="rotate(-90 {words.x:.1f} {words.y:.1f})"'
    marks = f' class="{words.kind}"' * bool(words.kind)
    return f'<text{marks} x="{words.x:.1f}" y="{words.y:.1f}" {look}>{escape(words.text)}</text>'
