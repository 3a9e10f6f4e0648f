"""Balance as a play: choose a run, move through its steps, see loads, biases and MaxVio."""

from __future__ import annotations

from collections.abc import Mapping

from ipywidgets import Dropdown, SelectionSlider

from deepseek_lab.plots.balance import check_histories, theatre_sheet

from .base import PictureWidget, choice, player

MOMENTS = 30  # steps that the slider stops at, at most


def balance_theatre(
    histories: Mapping[str, object], run: str | None = None, step: int | None = None, layer: int = 0
) -> PictureWidget:
    """Return a widget on runs that were recorded: choose one, play its steps, see how busy every expert was.

    histories: `LoadHistory`s of the same model and the same steps, by the name of the run, such as its update speed;
    the slider has them in this order. run: the first unless told. step: counted from 0, the last unless told. layer:
    which expert layer, from 0 as in `plots.load_map`. Raises ValueError as `plots.balance_theatre`.
    """
    histories = dict(histories)
    run, step, layer = check_histories(histories, run, step, layer)
    steps, layers, _ = histories[run].loads.shape
    moments = sorted({*range(0, steps, -(-steps // MOMENTS)), steps - 1, step})
    at = choice(SelectionSlider, "step", [(f"{moment:,}", moment) for moment in moments], step, 400, 36)
    rows = [(f"{row + 1} of {layers}", row) for row in range(layers)]
    controls = {
        "step": at,
        "run": choice(SelectionSlider, "run", [(name, name) for name in histories], run, 380, 36),
        "layer": choice(Dropdown, "expert layer", rows, layer, 180, 80),
    }

    def plan(step: int, run: str, layer: int):
        return theatre_sheet(histories, run, step, layer)

    return PictureWidget("balance-theatre", controls, plan, (player(at),), readout=120)
