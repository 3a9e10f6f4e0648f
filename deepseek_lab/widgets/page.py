"""What a widget has to arrange on the page around it: room for its read-outs, and the keys that it needs."""

from __future__ import annotations

import ipywidgets

# JupyterLab's command mode takes letters and arrows from a closed drop-down list: ArrowDown leaves the cell, "x" cuts
# it (ipywidgets issue 3912). An attribute on the focused element tells it to leave the keys alone. No ipywidget can set
# one, so an image that cannot load does it as soon as it meets the page.
_KEEP_KEYS = (
    "this.closest('.{name}').addEventListener('focusin', "
    "event => event.target.setAttribute('data-lm-suppress-shortcuts', 'true'))"
)
_STYLE = ".{name} .widget-readout {{ min-width: {readout}; max-width: none; }}"


def page_rules(name: str, readout: str = "104px") -> ipywidgets.HTML:
    """Return an invisible child for the widget with CSS class `name`: its keys stay its own, its read-outs fit.

    readout: room for the text beside a slider, as a CSS length.
    """
    keys = _KEEP_KEYS.format(name=name)
    html = f'<style>{_STYLE.format(name=name, readout=readout)}</style><img alt="" src="data:," onerror="{keys}">'
    return ipywidgets.HTML(html, layout={"display": "none"})
