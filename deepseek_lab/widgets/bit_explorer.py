"""The bits of a number: a format, a number to type and a button for each bit over one picture."""

from __future__ import annotations

from html import escape

from ipywidgets import HTML, Dropdown, HBox, Text, ToggleButton

from deepseek_lab.plots.bits import bits_sheet, exact
from deepseek_lab.plots.formats import FIELDS
from deepseek_lab.plots.sheet import Sheet
from deepseek_lab.precision import FORMATS, Code, FloatFormat, find_format, round_number

from .base import PictureWidget, choice

_LOOK = (
    ".bit-explorer button.bit { border: 1px solid #111; padding: 0; font: 14px/24px monospace; box-shadow: none }"
    ".bit-explorer button.bit:focus-visible { outline: 3px solid #111 !important; outline-offset: 1px; z-index: 1 }"
)
_LOOK += "".join(f".bit-explorer button.{n} {{ background: {b}; color: {c} }}" for n, (b, c) in FIELDS.items())


def bit_explorer(fmt: str | FloatFormat = "E4M3", number: float = 0.1) -> BitExplorer:
    """Return a widget on the bits of a number in a format: type a number, or press a bit, and the rest follows.

    fmt: a name, or a format, which is offered beside those with names. Raises ValueError for names of none. What is
    typed and is no number is explained beside it.
    """
    return BitExplorer(find_format(fmt), float(number))


class BitExplorer(PictureWidget):
    """`format`, `number` and `code` are what it shows; `bits` are the buttons in use, the highest bit first."""

    def __init__(self, fmt: FloatFormat, number: float):
        self.formats = FORMATS | {fmt.name: fmt}
        self.format, self.number, self.code = fmt, number, fmt.code(number)
        self._pressed = self._busy = False  # whether buttons have set the code; whether controls are being set here
        most = {"sign": 1, "exponent": max(f.exponent_bits for f in self.formats.values()),
                "mantissa": max(f.mantissa_bits for f in self.formats.values())}  # fmt: skip
        self._pool = {name: [_button(name, self._flip) for _ in range(count)] for name, count in most.items()}
        self.note = HTML(layout={"height": "24px", "margin": "2px 4px"})
        self.rows = tuple(
            HBox(layout={"height": "30px", "max_width": "580px", "align_items": "center"}) for _ in range(2)
        )
        layout, style = {"width": "290px", "margin": "2px 4px"}, {"description_width": "56px"}
        controls = {
            "fmt": choice(Dropdown, "format", [(name, name) for name in self.formats], fmt.name, 150, 50),
            "number": Text(description="number", value=repr(number), layout=layout, style=style),
        }
        super().__init__("bit-explorer", controls, self._plan, (self.note, *self.rows))

    @property
    def bits(self) -> list[ToggleButton]:
        fmt = self.format
        return [*self._pool["sign"], *self._pool["exponent"][: fmt.exponent_bits],
                *self._pool["mantissa"][: fmt.mantissa_bits]]  # fmt: skip

    def _plan(self, fmt: str, number: str) -> Sheet:
        """Show what the controls say, or the code that buttons have set since they were changed."""
        note = "Type a number, or press a bit."
        if not self._pressed:
            self.format = self.formats[fmt]
            try:
                self.number = float(number)
            except ValueError:
                note = f"<b>“{escape(number)}” is not a number.</b> Write 0.1, -3e-5, inf or nan; shown is still "
                note += f"{exact(self.number)}."
            self.code = self.format.code(self.number)
        self.note.value = f'<style>{_LOOK}</style><div class="note" style="line-height:24px">{note}</div>'
        self._show_bits()
        return bits_sheet(Code(self.format, self.code) if self._pressed else round_number(self.number, self.format))

    def _changed(self, event=None) -> None:
        if not self._busy:
            self._pressed = False
            super()._changed(event)

    def _flip(self, event) -> None:
        """A button was pressed: its bit changes, and with it the number."""
        if self._busy:
            return
        self.code ^= 1 << (self.format.bits - 1 - self.bits.index(event["owner"]))
        self.number, self._pressed, self._busy = self.format.value(self.code), True, True
        self.controls["number"].value = repr(self.number)
        self._busy = False
        super()._changed(event)

    def _show_bits(self) -> None:
        """Set the buttons to the code's bits; those that this format does not have are not there."""
        self._busy, bits = True, self.bits
        for number, (button, bit) in enumerate(zip(bits, f"{self.code:0{len(bits)}b}", strict=True)):
            button.value, button.description = bit == "1", bit
            button.tooltip = f"bit {len(bits) - 1 - number}, {button.field}, is {bit}"
        self._busy = False
        upper = 1 + self.format.exponent_bits
        rows = (
            [_label("sign", 34), bits[0], _label("exponent", 68), *bits[1:upper]],
            [_label("mantissa", 68), *bits[upper:]],
        )
        for row, children in zip(self.rows, rows, strict=True):
            if len(row.children) != len(children):
                row.children = children


def _button(field: str, pressed) -> ToggleButton:
    button = ToggleButton(
        layout={"height": "26px", "margin": "0", "min_width": "0", "max_width": "32px", "flex": "1 1 0"}
    )
    button.field = field
    button.add_class("bit").add_class(field)
    button.observe(pressed, names="value")
    return button


def _label(text: str, width: int) -> HTML:
    return HTML(text, layout={"width": f"{width}px", "margin": "0 4px", "flex": "0 0 auto"})
