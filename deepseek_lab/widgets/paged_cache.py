"""A paged cache step by step: which operation, over its blocks and what they take."""

from __future__ import annotations

from collections.abc import Sequence

from ipywidgets import SelectionSlider

from deepseek_lab.plots.paged import check_trace, paged_sheet

from .base import PictureWidget, choice, player


def paged_cache(trace: Sequence, step: int = 0) -> PictureWidget:
    """Return a widget on a paged cache: step or play through its operations, see blocks filled, shared and freed.

    trace: `attention.PoolStep`s in order, one after each operation. step: where to begin, counted from 0.
    Raises ValueError for no steps, blocks of different size, and pools of more than 64 blocks.
    """
    trace = check_trace(trace)
    options = [(f"{number + 1} of {len(trace)}", number) for number in range(len(trace))]
    slider = choice(SelectionSlider, "operation", options, range(len(trace))[step], 400, 64)
    return PictureWidget(
        "paged-cache", {"number": slider}, lambda number: paged_sheet(trace, number), (player(slider),)
    )
