"""How a ledger looks in a notebook: a table whose numbers open.

Colours are inherited and lines are half-transparent grey, so the table reads on light and on dark pages alike.
"""

from __future__ import annotations

from html import escape

from .ledger import Ledger, Line, _amount_text, _spoken

_RULE = "1px solid rgba(128,128,128,.35)"
_CELL = "vertical-align:top;background:transparent;padding:3px 14px 3px 0"
_PART = f"text-align:left;{_CELL}"
_NUMBER = f"text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;{_CELL}"
# As wide as it reads well, yet without width for the column: opening a number moves nothing sideways.
_INSIDE = (
    "float:right;width:25em;margin:4px 0 8px -25em;text-align:left;white-space:normal;line-height:1.5;font-weight:400"
)


def ledger_html(ledger: Ledger) -> str:
    """Return the ledger as an HTML table: part, amount (opens to formula, keys and source), amount as one says it."""
    rows = [_row(ledger, 0), *(_row(line, depth) for _, depth, line in ledger._walk())]
    note = f'<p style="margin:6px 0 0;max-width:48em;font-size:13px">{escape(ledger.note)}</p>' if ledger.note else ""
    return (
        '<div class="ledger" style="overflow-x:auto;color:inherit">'
        '<table style="border-collapse:collapse;font-size:13px;color:inherit;min-width:36em">'
        f'<thead><tr style="border-bottom:{_RULE};background:transparent">'
        f'<th scope="col" style="{_PART}">part</th>'
        f'<th scope="col" style="{_NUMBER}">{escape(ledger.unit)}</th>'
        f'<th scope="col" style="{_NUMBER}">in short</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>{note}</div>"
    )


def _row(entry: Line | Ledger, depth: int) -> str:
    group = isinstance(entry, Ledger)
    weight = f"font-weight:{600 if group else 400}"
    rule = f"border-top:{_RULE};" if group and depth <= 1 else ""
    return (
        f'<tr style="{weight};{rule}background:transparent">'
        f'<th scope="row" style="{_PART};{weight};padding-left:{depth * 18}px">{escape(entry.part)}</th>'
        f'<td style="{_NUMBER}">{_details(entry)}</td>'
        f'<td style="{_NUMBER}">{escape(_spoken(entry))}</td></tr>'
    )


def _details(entry: Line | Ledger) -> str:
    number = escape(_amount_text(entry.total))
    if isinstance(entry, Ledger):
        return number
    facts = [
        ("formula", escape(entry.formula)),
        ("config keys", ", ".join(f"<code>{escape(key)}</code>" for key in entry.keys)),
        ("source", escape(entry.source)),
    ]
    inside = "<br>".join(f"<b>{name}</b>: {text}" for name, text in facts if text)
    if not inside:
        return number
    return f'<details><summary style="cursor:pointer">{number}</summary><div style="{_INSIDE}">{inside}</div></details>'
