"""The memory bar: six controls, one bar, and the setting before it hatched behind."""

from __future__ import annotations

from html import escape

import ipywidgets

from deepseek_lab.accounting.memory_state import CACHE_NAMES, GPU_SETS, MODEL_NAMES, WEIGHT_NAMES, MemoryState, summary

from .memory_bar_svg import picture
from .page import page_rules

__all__ = ["MemoryBar", "MemoryState", "memory_bar", "picture", "summary"]

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


class MemoryBar(ipywidgets.VBox):
    """Six labelled controls over one picture; `state` and `previous` are the settings it shows."""

    def __init__(self, state: MemoryState | None = None, previous: MemoryState | None = None):
        self.state, self.previous = state or MemoryState(), previous
        self.controls = _controls(self.state)
        self.note, self.picture = ipywidgets.HTML(), ipywidgets.HTML()
        self.note.layout.min_height = "40px"
        rows = [
            ipywidgets.HBox([self.controls[name] for name in pair], layout={"flex_flow": "row wrap"})
            for pair in (("model", "weights"), ("cache", "gpu"), ("context", "batch"))
        ]
        super().__init__([*rows, self.note, self.picture, page_rules("memory-bar")])
        self.add_class("memory-bar")
        self._draw()
        for control in self.controls.values():
            control.observe(self._changed, names="value")

    def summary(self) -> str:
        """Return the one-line text alternative of the picture."""
        return summary(self.state, self.previous)

    def png(self) -> bytes:
        """Return the present picture as PNG, for places where no kernel runs."""
        from deepseek_lab.plots.memory import memory_png  # matplotlib loads when a picture is stored, not before

        return memory_png(self.state, self.previous)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        return {**bundle, "image/png": self.png(), "text/plain": self.summary()}

    def _changed(self, _event) -> None:
        state = MemoryState(**{name: control.value for name, control in self.controls.items()})
        if state != self.state:
            self.state, self.previous = state, self.state
            self._draw()

    def _draw(self) -> None:
        self.note.value = _note(self.state)
        self.picture.value = picture(self.state, self.previous, ids=f"bar-{id(self):x}")


def _controls(state: MemoryState) -> dict[str, ipywidgets.Widget]:
    """Return the controls by the name of the field that each sets, in the order in which the Tab key meets them."""
    choices = {
        "model": [(name, key) for key, name in MODEL_NAMES.items()],
        "weights": [(name, key) for key, name in WEIGHT_NAMES.items()],
        "cache": [(name, key) for key, name in CACHE_NAMES.items()],
        "gpu": [(name, name) for name in GPU_SETS],
        "context": [(f"{n:,} tokens", n) for n in sorted({*_CONTEXTS, state.context})],
        "batch": [("1 sequence" if n == 1 else f"{n:,} sequences", n) for n in sorted({*_BATCHES, state.batch})],
    }
    layout = {"width": "284px", "margin": "2px 4px"}
    out = {}
    for name, options in choices.items():
        kind = ipywidgets.SelectionSlider if name in ("context", "batch") else ipywidgets.Dropdown
        out[name] = kind(
            options=options,
            value=getattr(state, name),
            description=name,
            layout=layout,
            style={"description_width": "64px"},
        )
    return out


def _note(state: MemoryState) -> str:
    """Return what stands under the controls: why a setting cannot be, or else what one token leaves in the cache."""
    if state.notes:
        return f'<div class="note" style="line-height:20px"><b>Not possible.</b> {escape(" ".join(state.notes))}</div>'
    token = state.token_ledger
    pieces = ", ".join(f"{line.part} {line.total:,}" for line in token)
    text = f"One token leaves {token.total:,} bytes in the cache: {pieces}."
    return f'<div class="note" style="line-height:20px">{escape(text)}</div>'
