"""Where tokens travel: choose a layer and a token, see its nodes and bytes with the limit and without."""

from __future__ import annotations

from collections.abc import Sequence

from ipywidgets import Dropdown, SelectionSlider

from deepseek_lab.plots.routes_words import token_name
from deepseek_lab.plots.traffic import check_traffic, traffic_sheet

from .base import PictureWidget, choice


def traffic_map(
    layers: Sequence, pieces: Sequence[str], layer: int | None = None, token: int | None = None
) -> PictureWidget:
    """Return a widget on what `experts.trace_traffic` returns: the tokens of a text and the nodes to which they travel.

    pieces: the text of each token. layer: index in the model, the last unless told. token: its position, the middle of
    the text unless told. Raises ValueError for pieces that are not one per token, for a layer or a token that is not
    there and for more than 8 nodes.
    """
    layers, pieces = list(layers), list(pieces)
    layer, token = check_traffic(layers, pieces, layer, token)
    tokens = [(token_name(pieces, i).removeprefix("token "), i) for i in range(len(pieces))]
    controls = {
        "token": choice(SelectionSlider, "token", tokens, token, 400, 44),
        "layer": choice(Dropdown, "layer", [(f"layer {at.layer}", at.layer) for at in layers], layer, 150, 44),
    }
    return PictureWidget("traffic-map", controls, lambda token, layer: traffic_sheet(layers, pieces, layer, token))
