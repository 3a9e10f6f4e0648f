"""The memory bar as an SVG text: one state, and the one before it hatched behind."""

from __future__ import annotations

from html import escape

from deepseek_lab.accounting.memory_state import MemoryState, summary
from deepseek_lab.plots import bar_layout as at
from deepseek_lab.plots.bar_layout import BarLayout, Words, bar_layout
from deepseek_lab.plots.style import GREY, INK, PALETTE

_FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


def picture(state: MemoryState, previous: MemoryState | None = None, ids: str = "bar") -> str:
    """Return the bar of `state` as SVG of fixed size, with `previous` hatched behind it on the same scale.

    Its text alternative (aria-label) is `summary(state, previous)`. ids: the beginning of the pattern's ids, one per
    picture on a page.
    """
    plan = bar_layout(state, previous)
    label = escape(summary(state, previous), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {at.WIDTH} {at.HEIGHT}" width="{at.WIDTH}" '
        f'height="{at.HEIGHT}" '
        f'style="max-width:100%;height:auto;display:block" role="img" aria-label="{label}" '
        f'font-family="{_FONT}" font-size="13" fill="{INK}">{_patterns(ids)}'
        f'<rect width="{at.WIDTH}" height="{at.HEIGHT}" rx="4" fill="#fff"/>'
        f"{_bars(plan, ids)}{_marks(plan)}{_axis(plan)}{''.join(map(_text, plan.words))}</svg>"
    )


def _patterns(ids: str) -> str:
    """Return the two textures: hatching for the setting before, dots for the cache."""
    return (
        f'<defs><pattern id="{ids}-before" width="7" height="7" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="7" height="7" fill="#fff"/>'
        f'<path d="M0 0 V7" stroke="{GREY}" stroke-width="2.4"/></pattern>'
        f'<pattern id="{ids}-cache" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<rect width="6" height="6" fill="{PALETTE["cache"]}"/><circle cx="3" cy="3" r="1.2" fill="#fff"/></pattern>'
        "</defs>"
    )


def _bars(plan: BarLayout, ids: str) -> str:
    out = []
    if plan.ghost is not None:
        out.append(
            f'<rect class="ghost" x="{at.LEFT}" y="{at.GHOST_Y}" width="{plan.ghost:.3f}" height="{at.GHOST_HEIGHT}" '
            f'fill="url(#{ids}-before)" stroke="{INK}"/>'
        )
    for part, left, right in zip(plan.parts, plan.edges, plan.edges[1:], strict=False):
        fill = f"url(#{ids}-cache)" if part.role == "cache" else PALETTE[part.role]
        out.append(
            f'<rect class="part" data-part="{part.name}" x="{left:.3f}" y="{at.BAR_Y}" width="{right - left:.3f}" '
            f'height="{at.BAR_HEIGHT}" fill="{fill}"/>'
        )
    return "".join(out)


def _marks(plan: BarLayout) -> str:
    """Return the seams between parts (neighbours stay apart in greyscale), the lines to the names, and the capacity."""
    out = [f'<path d="M{edge:.3f} {at.BAR_Y} v{at.BAR_HEIGHT}" stroke="#fff"/>' for edge in plan.edges[1:-1]]
    out += [
        f'<path d="M{centre:.1f} {at.BAR_Y} v-9 L{place:.1f} {at.NAME_Y}" fill="none" stroke="{INK}"/>'
        for centre, place in plan.leaders
    ]
    if plan.capacity is not None:
        out.append(
            f'<path class="capacity" d="M{plan.capacity:.3f} {at.LINE_TOP} V{at.AXIS_Y}" stroke="{INK}" '
            f'stroke-width="2.4" stroke-dasharray="6 3"/>'
            f'<path d="M{plan.capacity:.1f} {at.AXIS_Y + 24} l5 7 h-10 z" fill="{INK}"/>'
        )
    return "".join(out)


def _axis(plan: BarLayout) -> str:
    places = [at.LEFT + plan.axis.pixels(tick) for tick in plan.axis.ticks]
    marks = "".join(f"M{x:.1f} {at.AXIS_Y} v5 " for x in places)
    texts = [
        _text(Words(x, at.AXIS_Y + 19, text, "middle")) for x, text in zip(places, plan.axis.labels(), strict=True)
    ]
    return f'<path d="M{at.LEFT} {at.AXIS_Y} h{at.PLOT} {marks}" fill="none" stroke="{INK}"/>{"".join(texts)}'


def _text(words: Words) -> str:
    back, left = "", words.x - words.back / 2
    if words.back:
        back = f'<rect x="{left:.1f}" y="{words.y - 15:.1f}" width="{words.back:.1f}" height="21" fill="#fff"/>'
    look = f'text-anchor="{words.anchor}"' + (' font-weight="600"' if words.bold else "")
    return f'{back}<text x="{words.x:.1f}" y="{words.y:.1f}" {look}>{escape(words.text)}</text>'
