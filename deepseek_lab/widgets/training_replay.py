"""A training run played again: a step and an expert layer over one picture of that moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ipywidgets import Dropdown, SelectionSlider

from deepseek_lab.plots.replay import check, replay_sheet

from .base import PictureWidget, choice


def training_replay(
    records: Sequence,
    samples: Mapping[int, str],
    losses: Mapping[int, float] | None = None,
    step: int | None = None,
    layer: int = 0,
) -> PictureWidget:
    """Return a widget on a finished training run: choose a step, see what the model could do then.

    records: `StepRecord`s in order. samples: what the model wrote, by step. losses: held-out loss in nats per token, by
    step. step: where to begin, the last sample unless told. layer: which mixture-of-experts layer, from 0 as in
    `plots.load_map`. Raises ValueError without records or samples, for a step without a sample, for an unknown layer.
    """
    records, samples, losses = list(records), dict(sorted(samples.items())), dict(losses or {})
    step = check(records, samples, step, layer)
    count = len(records[0].load)
    layers = [(f"{row + 1} of {count}", row) for row in range(count)] or [("none", 0)]
    controls = {
        "step": choice(SelectionSlider, "step", [(f"{at:,}", at) for at in samples], step, 380, 36),
        "layer": choice(Dropdown, "expert layer", layers, layer, 190, 80, disabled=not count),
    }

    def plan(step: int, layer: int):
        return replay_sheet(records, samples, losses, step, layer)

    return PictureWidget("training-replay", controls, plan, readout=64)
