"""A long sum in a short register: three controls over the exact sum, the register's and their difference."""

from __future__ import annotations

from collections.abc import Mapping

from ipywidgets import Dropdown, SelectionSlider

from deepseek_lab.plots.accumulation import accumulator_sheet, choose

from .base import PictureWidget, choice


def accumulator(records: Mapping, data=None, bits=None, every=None) -> PictureWidget:
    """Return a widget on sums that were recorded: choose the data, the register's length and when it is emptied.

    records: as for `plots.accumulator`, one for every combination of the data, bits and intervals that occur. data,
    bits, every: where to begin, the first record unless told. Raises ValueError for a record that is not there.
    """
    data, bits, every = choose(records, data, bits, every)
    kinds, lengths, intervals = (list(dict.fromkeys(values)) for values in zip(*records, strict=True))
    for key in ((kind, length, interval) for kind in kinds for length in lengths for interval in intervals):
        choose(records, *key)
    named = [(f"every {n} products" if n else "never", n) for n in intervals]
    controls = {
        "bits": choice(SelectionSlider, "fraction bits", [(str(n), n) for n in sorted(lengths)], bits, 284, 84),
        "every": choice(Dropdown, "promoted", named, every, 284, 84),
        "data": choice(Dropdown, "data", [(kind, kind) for kind in kinds], data, 284, 84),
    }

    def plan(data: str, bits: int, every: int):
        return accumulator_sheet(records, data, bits, every)

    return PictureWidget("accumulator", controls, plan, readout=40)
