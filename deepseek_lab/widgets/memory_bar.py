"""The memory bar: six controls, one bar, and the setting before it hatched behind."""

from __future__ import annotations

from html import escape

from ipywidgets import HTML, Dropdown, SelectionSlider, Widget

from deepseek_lab.accounting.memory_state import CACHE_NAMES, GPU_SETS, MODEL_NAMES, WEIGHT_NAMES, MemoryState
from deepseek_lab.plots.memory import memory_sheet
from deepseek_lab.plots.sheet import Sheet

from .base import PictureWidget, choice

_CONTEXTS = tuple(2**power for power in range(10, 18))  # 1K to 128K
_BATCHES = tuple(2**power for power in range(9))  # 1 to 256


def memory_bar(
    model: str = "deepseek-v3",
    weights: str = "fp8",
    cache: str = "latent",
    context: int = 131_072,
    batch: int = 1,
    gpu: str = "8 x H800",
    previous: MemoryState | None = None,
) -> MemoryBar:
    """Return the memory bar as a widget, starting at this setting.

    context: tokens per sequence. previous: a setting to hatch behind the first picture. The other choices are those of
    `MemoryState`: ValueError for a name that does not exist. What a model cannot have is explained in place.
    """
    return MemoryBar(MemoryState(model, weights, cache, context, batch, gpu), previous)


class MemoryBar(PictureWidget):
    """Six labelled controls over one picture; `state` and `previous` are the settings it shows."""

    def __init__(self, state: MemoryState, previous: MemoryState | None = None):
        self.state, self.previous = state, previous
        self.note = HTML(layout={"min_height": "40px"})
        super().__init__("memory-bar", _controls(state), self._plan, (self.note,))

    def _plan(self, **settings) -> Sheet:
        state = MemoryState(**settings)
        if state != self.state:
            self.state, self.previous = state, self.state
        self.note.value = f'<div class="note" style="line-height:20px">{_note(state)}</div>'
        return memory_sheet(self.state, self.previous)


def _controls(state: MemoryState) -> dict[str, Widget]:
    """Return the controls by the name of the field that each sets, in the order in which the Tab key meets them."""
    choices = {
        "model": [(name, key) for key, name in MODEL_NAMES.items()],
        "weights": [(name, key) for key, name in WEIGHT_NAMES.items()],
        "cache": [(name, key) for key, name in CACHE_NAMES.items()],
        "gpu": [(name, name) for name in GPU_SETS],
        "context": [(f"{n:,} tokens", n) for n in sorted({*_CONTEXTS, state.context})],
        "batch": [("1 sequence" if n == 1 else f"{n:,} sequences", n) for n in sorted({*_BATCHES, state.batch})],
    }
    return {
        name: choice(
            SelectionSlider if name in ("context", "batch") else Dropdown, name, options, getattr(state, name), 284, 64
        )
        for name, options in choices.items()
    }


def _note(state: MemoryState) -> str:
    """Return what stands under the controls: why a setting cannot be, or else what one token leaves in the cache."""
    if state.notes:
        return f"<b>Not possible.</b> {escape(' '.join(state.notes))}"
    pieces = ", ".join(f"{line.part} {line.total:,}" for line in state.token_ledger)
    return escape(f"One token leaves {state.token_ledger.total:,} bytes in the cache: {pieces}.")
