"""The memory of a training step: move through it, switch recomputation and precision, see what takes the bytes."""

from __future__ import annotations

from collections.abc import Mapping

from ipywidgets import Checkbox, Dropdown, SelectionSlider

from deepseek_lab.plots.memory_timeline import check_timelines, timeline_sheet

from .base import PictureWidget, choice, player


def memory_timeline(
    timelines: Mapping[tuple[str, bool], object],
    precision: str | None = None,
    recompute: bool = False,
    event: int | None = None,
) -> PictureWidget:
    """Return a widget on steps that were recorded: scrub or play through one, and switch to the others.

    timelines: `accounting.measured.Timeline`s of the same step by (precision, recomputed), every precision in the same
    ways. precision: the first unless told. event: where to begin, the stretch with the peak unless told. Raises
    ValueError as `plots.memory_timeline`, and for a precision of which only some ways were recorded.
    """
    timelines = dict(timelines)
    precision, recompute, event = check_timelines(timelines, precision, recompute, event)
    names, ways = (sorted({key[i] for key in timelines}, key=[key[i] for key in timelines].index) for i in (0, 1))
    missing = [(name, way) for name in names for way in ways if (name, way) not in timelines]
    if missing:
        raise ValueError(f"memory_timeline has no timeline for {missing[0]}; record every precision in the same ways")
    labels = [one.label for one in timelines[precision, recompute].events]
    at = choice(SelectionSlider, "moment", [(label, i) for i, label in enumerate(labels)], event, 420, 56)
    controls = {
        "event": at,
        "precision": choice(Dropdown, "precision", [(name, name) for name in names], precision, 190, 64),
        "recompute": Checkbox(value=recompute, description="recomputation", indent=False, disabled=len(ways) == 1,
                              layout={"width": "auto", "margin": "2px 12px 2px 4px"}),
    }  # fmt: skip

    def plan(event: int, precision: str, recompute: bool):
        return timeline_sheet(timelines, precision, recompute, event)

    return PictureWidget("memory-timeline", controls, plan, (player(at),), readout=150)
