"""Which experts each letter goes to: two controls over one picture."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets

from deepseek_lab.plots.routes import routes_sheet
from deepseek_lab.plots.routes_words import token_name
from deepseek_lab.plots.sheet import Sheet, png

from .page import page_rules
from .sheet_svg import sheet_svg


def expert_routes(trace, pieces: Sequence[str], layer: int | None = None, token: int | None = None) -> ExpertRoutes:
    """Return a widget on a `RoutingTrace`: choose a token and a layer, see its experts and how they were chosen.

    pieces: the text of each token. layer: index in the model, the last with a router unless told. token: its position,
    the middle of the text unless told. Raises ValueError for pieces that are not one per token, and for a layer or a
    token that the trace does not hold.
    """
    return ExpertRoutes(trace, pieces, layer, token)


class ExpertRoutes(ipywidgets.VBox):
    """A slider for the token and a list of layers over one picture; `sheet` is what it shows."""

    sheet: Sheet

    def __init__(self, trace, pieces: Sequence[str], layer: int | None = None, token: int | None = None):
        self.trace, self.pieces = trace, list(pieces)
        layer = trace.layers[-1].layer if layer is None else layer
        token = len(self.pieces) // 2 if token is None else token
        self.sheet = routes_sheet(trace, self.pieces, layer, token)
        self.controls = _controls(trace, self.pieces, layer, token)
        self.picture = ipywidgets.HTML()
        row = ipywidgets.HBox([*self.controls.values()], layout={"flex_flow": "row wrap"})
        super().__init__([row, self.picture, page_rules("expert-routes")])
        self.add_class("expert-routes")
        self._draw()
        for control in self.controls.values():
            control.observe(self._changed, names="value")

    def summary(self) -> str:
        """Return the one-line text alternative of the picture."""
        return self.sheet.label

    def png(self) -> bytes:
        """Return the present picture as PNG, for places where no kernel runs."""
        return png(self.sheet)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        return {**bundle, "image/png": self.png(), "text/plain": self.summary()}

    def _changed(self, _event) -> None:
        self.sheet = routes_sheet(self.trace, self.pieces, self.controls["layer"].value, self.controls["token"].value)
        self._draw()

    def _draw(self) -> None:
        self.picture.value = sheet_svg(self.sheet, ids=f"routes-{id(self):x}")


def _controls(trace, pieces: list[str], layer: int, token: int) -> dict[str, ipywidgets.Widget]:
    """Return the controls by name, in the order in which the Tab key meets them."""
    tokens = [(token_name(pieces, i).removeprefix("token "), i) for i in range(len(pieces))]
    layers = [(f"layer {at.layer}", at.layer) for at in trace.layers]
    style = {"description_width": "44px"}
    return {
        "token": ipywidgets.SelectionSlider(
            options=tokens,
            value=token,
            description="token",
            layout={"width": "400px", "margin": "2px 4px"},
            style=style,
        ),
        "layer": ipywidgets.Dropdown(
            options=layers,
            value=layer,
            description="layer",
            layout={"width": "150px", "margin": "2px 4px"},
            style=style,
        ),
    }
