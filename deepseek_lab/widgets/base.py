"""What the widgets share: labelled controls over one picture, SVG while a kernel runs and PNG where none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ipywidgets

from deepseek_lab.plots.sheet import Sheet, png

from .sheet_svg import sheet_svg

# What no ipywidget can set, an image that cannot load sets as soon as it meets the page:
# - JupyterLab's command mode takes letters and arrows from a closed drop-down list: ArrowDown leaves the cell, "x" cuts
#   it (ipywidgets issue 3912). An attribute on the focused element tells it to leave the keys alone.
# - The handle of a slider has no name, and its value is an index: a screen reader is told what stands beside it.
# - The name of a button is what stands on it, a mere 0 or 1: a screen reader is told its tooltip.
# - The buttons of a player have an icon and no name: it is told what the icon shows, play, pause or stop.
# The style gives read-outs their room.
_PAGE_RULES = """<style>.{name} .widget-readout {{ min-width: {readout}px; max-width: none; }}</style>
<img alt="" src="data:," onerror="const box = this.closest('.{name}');
const say = () => box.querySelectorAll('.widget-slider').forEach(slider => {{
    const handle = slider.querySelector('.noUi-handle');
    handle?.setAttribute('aria-label', slider.querySelector('.widget-label').textContent);
    handle?.setAttribute('aria-valuetext', slider.querySelector('.widget-readout').textContent);
}});
const name = () => {{
    box.querySelectorAll('button[title]').forEach(b => b.setAttribute('aria-label', b.title));
    box.querySelectorAll('.widget-play i').forEach(
        icon => icon.parentElement.setAttribute('aria-label', icon.className.split('fa-')[1]));
}};
new MutationObserver(name).observe(box, {{subtree: true, childList: true, attributeFilter: ['title', 'class']}});
name();
box.addEventListener('focusin', event => {{
    event.target.setAttribute('data-lm-suppress-shortcuts', 'true');
    say();
}});
box.addEventListener('keyup', say);">"""


class PictureWidget(ipywidgets.VBox):
    """Labelled controls over one picture; `sheet` is what it shows.

    name: its CSS class. controls: by name, in the order in which the Tab key meets them. plan: makes the sheet from the
    controls' values, given by their names. notes: widgets between controls and picture. readout: room in pixels for the
    text beside a slider.
    """

    sheet: Sheet

    def __init__(
        self,
        name: str,
        controls: Mapping[str, ipywidgets.Widget],
        plan: Callable[..., Sheet],
        notes: tuple[ipywidgets.Widget, ...] = (),
        readout: int = 104,
    ):
        self.controls, self.plan, self.picture = dict(controls), plan, ipywidgets.HTML()
        row = ipywidgets.HBox([*controls.values()], layout={"flex_flow": "row wrap", "max_width": "600px"})
        rules = ipywidgets.HTML(_PAGE_RULES.format(name=name, readout=readout), layout={"display": "none"})
        super().__init__([row, *notes, self.picture, rules])
        self.add_class(name)
        self._changed()
        for control in controls.values():
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

    def _changed(self, _event=None) -> None:
        self.sheet = self.plan(**{name: control.value for name, control in self.controls.items()})
        self.picture.value = sheet_svg(self.sheet, ids=f"picture-{id(self):x}")


def choice(kind: type, description: str, options: list[tuple], value, width: int, words: int, **more):
    """Return a labelled control of this kind: `options` as (text, value), `width` pixels, `words` of them the label."""
    layout, style = {"width": f"{width}px", "margin": "2px 4px"}, {"description_width": f"{words}px"}
    return kind(description=description, options=options, value=value, layout=layout, style=style, **more)


def player(slider: ipywidgets.SelectionSlider) -> ipywidgets.Play:
    """Return buttons that move a slider on by one each second, and a stop button that takes it to its beginning."""
    play = ipywidgets.Play(
        value=slider.index, max=len(slider.options) - 1, interval=1_000, show_repeat=False,
        layout={"margin": "2px 4px", "width": "100px"},
    )  # fmt: skip
    ipywidgets.jslink((play, "value"), (slider, "index"))
    return play
