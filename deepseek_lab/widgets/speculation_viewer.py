"""A text written with drafts: step or play through the passes of the model, over what each of them accepted."""

from __future__ import annotations

from collections.abc import Callable

from ipywidgets import SelectionSlider

from deepseek_lab.plots.speculation import check_speculation, speculation_sheet

from .base import PictureWidget, choice, player


def speculation_viewer(speculation, spell: Callable[[int], str], step: int = 0) -> PictureWidget:
    """Return a widget on a text and how it was written: drafts accepted and refused, tokens against passes.

    speculation: a `generation.Speculation`. spell: a function from a token's number to its text. step: the pass to
    begin with, counted from 0. Raises ValueError and IndexError as `plots.speculation_viewer`.
    """
    steps = check_speculation(speculation)
    options = [(f"{number + 1} of {len(steps)}", number) for number in range(len(steps))]
    slider = choice(SelectionSlider, "pass", options, range(len(steps))[step], 400, 36)

    def plan(number: int):
        return speculation_sheet(speculation, spell, number)

    return PictureWidget("speculation-viewer", {"number": slider}, plan, (player(slider),))
