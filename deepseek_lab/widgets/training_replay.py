"""A training run played again: a step and an expert layer over one picture of that moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets

from deepseek_lab.plots.replay import check, replay_sheet
from deepseek_lab.plots.sheet import Sheet, png

from .page import page_rules
from .sheet_svg import sheet_svg


def training_replay(
    records: Sequence,
    samples: Mapping[int, str],
    losses: Mapping[int, float] | None = None,
    step: int | None = None,
    layer: int = 0,
) -> TrainingReplay:
    """Return a widget on a finished training run: choose a step, see what the model could do then.

    records: `StepRecord`s in order. samples: what the model wrote, by step. losses: held-out loss in nats per token, by
    step. step: where to begin, the last sample unless told. layer: which mixture-of-experts layer, from 0 as in
    `plots.load_map`. Raises ValueError without records or samples, for a step without a sample, for an unknown layer.
    """
    return TrainingReplay(records, samples, losses, step, layer)


class TrainingReplay(ipywidgets.VBox):
    """A slider for the step and a list of expert layers over one picture; `sheet` is what it shows."""

    sheet: Sheet

    def __init__(self, records: Sequence, samples: Mapping[int, str], losses=None, step=None, layer: int = 0):
        self.records, self.samples, self.losses = list(records), dict(sorted(samples.items())), dict(losses or {})
        step = check(self.records, self.samples, step, layer)
        self.sheet = replay_sheet(self.records, self.samples, self.losses, step, layer)
        self.controls = _controls(self.samples, len(self.records[0].load), step, layer)
        self.picture = ipywidgets.HTML()
        row = ipywidgets.HBox([*self.controls.values()], layout={"flex_flow": "row wrap"})
        super().__init__([row, self.picture, page_rules("training-replay", readout="64px")])
        self.add_class("training-replay")
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
        step, layer = (self.controls[name].value for name in ("step", "layer"))
        self.sheet = replay_sheet(self.records, self.samples, self.losses, step, layer)
        self._draw()

    def _draw(self) -> None:
        self.picture.value = sheet_svg(self.sheet, ids=f"replay-{id(self):x}")


def _controls(samples: Mapping[int, str], layers: int, step: int, layer: int) -> dict[str, ipywidgets.Widget]:
    """Return the controls by name, in the order in which the Tab key meets them."""
    steps = [(f"{at:,}", at) for at in samples]
    rows = [(f"{row + 1} of {layers}", row) for row in range(layers)] or [("none", 0)]
    margin = "2px 4px"
    return {
        "step": ipywidgets.SelectionSlider(
            options=steps, value=step, description="step", layout={"width": "380px", "margin": margin},
            style={"description_width": "36px"},
        ),
        "layer": ipywidgets.Dropdown(
            options=rows, value=layer, description="expert layer", disabled=not layers,
            layout={"width": "190px", "margin": margin}, style={"description_width": "80px"},
        ),
    }  # fmt: skip
