"""The model map: choose a model and a block, by list or by clicking it, and see the tensors of that block."""

from __future__ import annotations

from collections.abc import Mapping

from ipywidgets import HTML, Dropdown

from deepseek_lab.accounting.memory_state import MODEL_NAMES
from deepseek_lab.config import ModelConfig
from deepseek_lab.plots.model_blocks import WHOLE, block, block_names
from deepseek_lab.plots.model_map import map_sheet
from deepseek_lab.plots.sheet import Sheet
from deepseek_lab.presets import PRESETS

from .base import PictureWidget, choice

# A click on a block sets the list to its name, as a hand would, and leaves the focus there for the arrow keys.
_CLICKS = """<style>.model-map svg rect.block { pointer-events: all; cursor: pointer }
.model-map svg text { pointer-events: none } .model-map svg rect.block:hover { stroke: #111; stroke-width: 2 }</style>
<img alt="" src="data:," onerror="const box = this.closest('.model-map');
box.addEventListener('click', event => {
    const name = event.target.closest('rect.block')?.dataset.name;
    const list = [...box.querySelectorAll('select')].find(s => [...s.options].some(o => o.value === name));
    if (!list) return;
    list.value = name;
    list.dispatchEvent(new Event('change', {bubbles: true}));
    list.focus();
});">"""


def model_map(
    models: Mapping[str, ModelConfig] | None = None, model: str | None = None, block: str = WHOLE
) -> ModelMap:
    """Return a widget on the tensors of models: choose a block in the list, or click it in the picture.

    models: configs by the name that the list shows, all presets unless told. model: the name to begin with, the first
    unless told. Raises ValueError for no models, a model that is not among them, and a block that it does not have.
    """
    models = {MODEL_NAMES[name]: config for name, config in PRESETS.items()} if models is None else dict(models)
    return ModelMap(models, model, block)


class ModelMap(PictureWidget):
    """`models` are what it can show; a model without the block that was chosen is shown as a whole."""

    def __init__(self, models: dict[str, ModelConfig], model: str | None, name: str):
        if not models or model not in (None, *models):
            raise ValueError(
                f"model={model!r} is not among the models; choose one of {', '.join(models) or 'at least one'}"
            )
        self.models, self._busy = models, False
        model = model or next(iter(models))
        block(models[model], name)
        controls = {
            "model": choice(Dropdown, "model", [(text, text) for text in models], model, 240, 48),
            "name": choice(Dropdown, "block", self._blocks(model), name, 300, 48),
        }
        super().__init__("model-map", controls, self._plan, (HTML(_CLICKS, layout={"display": "none"}),))

    def _plan(self, model: str, name: str) -> Sheet:
        blocks = self.controls["name"]
        if [text for text, _ in blocks.options] != block_names(self.models[model]):
            name = name if name in block_names(self.models[model]) else WHOLE
            self._busy, blocks.options = True, self._blocks(model)
            blocks.value, self._busy = name, False
        return map_sheet(self.models[model], name)

    def _blocks(self, model: str) -> list[tuple[str, str]]:
        return [(name, name) for name in block_names(self.models[model])]

    def _changed(self, event=None) -> None:
        if not self._busy:
            super()._changed(event)
