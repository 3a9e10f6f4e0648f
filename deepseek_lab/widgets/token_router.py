"""Which experts a typed text goes to: the text and three rules to switch over one picture."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from ipywidgets import HTML, Checkbox, Dropdown, SelectionSlider, Text

from deepseek_lab.plots.routes import check, routes_sheet
from deepseek_lab.plots.routes_words import token_name
from deepseek_lab.plots.sheet import Sheet

from .base import PictureWidget, choice

MOST = 120  # characters that one may type


def token_router(
    read: Callable[[str], tuple], text: str, layer: int | None = None, token: int | None = None
) -> TokenRouter:
    """Return a widget on the experts of a text's tokens: type, choose token and layer, switch the rules off.

    read: takes a text and returns its `RoutingTrace` and the text of each token. text: what stands there at first.
    layer: index in the model, the last with a router unless told. token: its position, the middle of the text unless
    told. Raises what `read` raises, and ValueError for a text that is empty or longer than MOST, for pieces that are
    not one per token and for a layer or a token that is not there. Once it stands, it says beside the text what is
    wrong with one that is typed, and still shows the one before.
    """
    return TokenRouter(read, text, layer, token)


class TokenRouter(PictureWidget):
    """`trace` and `pieces` are those of the last text that could be read."""

    def __init__(self, read: Callable[[str], tuple], text: str, layer: int | None, token: int | None):
        self._read, self._typed, self._busy = read, text, False
        self._read_text(text)
        token, at = check(self.trace, self.pieces, layer, token)
        self.note = HTML(layout={"height": "24px", "margin": "2px 4px"})
        layers = [(f"layer {each.layer}", each.layer) for each in self.trace.layers]
        place = {"layout": {"width": "560px", "margin": "2px 4px"}, "style": {"description_width": "44px"}}
        controls = {
            "text": Text(description="text", value=text, **place),
            "token": choice(SelectionSlider, "token", self._tokens(), token, 400, 44),
            "layer": choice(Dropdown, "layer", layers, at.layer, 150, 44),
            "bias": _switch("bias"),
            "groups": _switch("groups"),
            "shared": _switch("shared expert"),
        }
        super().__init__("token-router", controls, self._plan, (self.note,))

    def _plan(self, text: str, token: int, layer: int, **rules: bool) -> Sheet:
        if text != self._typed:
            token = self._type(text, token)
        return routes_sheet(self.trace, self.pieces, layer, token, **rules)

    def _type(self, text: str, token: int) -> int:
        """Read what was typed, or say what is wrong with it; return the token to show."""
        self._typed, note = text, ""
        try:
            self._read_text(text)
        except Exception as error:  # `read` is the notebook's: whatever it raises, the picture stays
            note = f"<b>{escape(str(error)[:60])}</b> Shown is the text before."
        self.note.value = f'<div class="note" style="line-height:24px;white-space:nowrap">{note}</div>'
        self._busy, slider = True, self.controls["token"]
        slider.options = self._tokens()
        slider.value = token = min(token, len(self.pieces) - 1)
        self._busy = False
        return token

    def _read_text(self, text: str) -> None:
        if not 0 < len(text) <= MOST:
            raise ValueError(f"{len(text)} characters: type 1 to {MOST}.")
        trace, pieces = self._read(text)
        check(trace, list(pieces), None, None)
        self.trace, self.pieces = trace, list(pieces)

    def _tokens(self) -> list[tuple[str, int]]:
        return [(token_name(self.pieces, i).removeprefix("token "), i) for i in range(len(self.pieces))]

    def _changed(self, event=None) -> None:
        if not self._busy:
            super()._changed(event)


def _switch(name: str) -> Checkbox:
    return Checkbox(value=True, description=name, indent=False, layout={"width": "auto", "margin": "2px 12px 2px 4px"})
