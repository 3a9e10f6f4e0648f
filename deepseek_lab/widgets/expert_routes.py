"""Which experts each letter goes to: two controls over one picture."""

from __future__ import annotations

from collections.abc import Sequence

from ipywidgets import Dropdown, SelectionSlider

from deepseek_lab.plots.routes import check, routes_sheet
from deepseek_lab.plots.routes_words import token_name

from .base import PictureWidget, choice


def expert_routes(trace, pieces: Sequence[str], layer: int | None = None, token: int | None = None) -> PictureWidget:
    """Return a widget on a `RoutingTrace`: choose a token and a layer, see its experts and how they were chosen.

    pieces: the text of each token. layer: index in the model, the last with a router unless told. token: its position,
    the middle of the text unless told. Raises ValueError for pieces that are not one per token, and for a layer or a
    token that the trace does not hold.
    """
    pieces = list(pieces)
    token, at = check(trace, pieces, layer, token)
    tokens = [(token_name(pieces, i).removeprefix("token "), i) for i in range(len(pieces))]
    layers = [(f"layer {at.layer}", at.layer) for at in trace.layers]
    controls = {
        "token": choice(SelectionSlider, "token", tokens, token, 400, 44),
        "layer": choice(Dropdown, "layer", layers, at.layer, 150, 44),
    }
    return PictureWidget("expert-routes", controls, lambda token, layer: routes_sheet(trace, pieces, layer, token))
