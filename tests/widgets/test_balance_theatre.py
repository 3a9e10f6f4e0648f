"""The balance theatre follows its controls, can be played, is labelled, and leaves a picture behind."""

import xml.etree.ElementTree as ElementTree

import ipywidgets
import pytest
import torch

from deepseek_lab.experts.balance import LoadHistory
from deepseek_lab.plots.balance import theatre_sheet
from deepseek_lab.widgets import balance_theatre


def history(seed, steps=95, experts=8):
    random = torch.Generator().manual_seed(seed)
    loads = torch.randint(0, 90, (steps, 2, experts), generator=random)
    return LoadHistory(loads, torch.randn(steps, 2, experts, generator=random))


HISTORIES = {"<none> & all": history(0), "speed 0.001": history(1), "speed 0.01": history(2)}


def shown(widget):
    label = ElementTree.fromstring(widget.picture.value).get("aria-label")
    assert label == widget.summary()
    return label


def test_it_begins_where_it_is_told_and_redraws_once_for_a_change():
    widget, seen = balance_theatre(HISTORIES, "speed 0.001", step=17, layer=1), []
    assert list(widget.controls) == ["step", "run", "layer"]
    assert [c.description for c in widget.controls.values()] == ["step", "run", "expert layer"]
    assert shown(widget) == theatre_sheet(HISTORIES, "speed 0.001", 17, 1).label
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["run"].value = "speed 0.01"
    widget.controls["step"].value = 40
    widget.controls["layer"].value = 0
    assert len(seen) == 3
    assert shown(widget) == theatre_sheet(HISTORIES, "speed 0.01", 40, 0).label
    assert shown(balance_theatre(HISTORIES)) == theatre_sheet(HISTORIES, "<none> & all", 94, 0).label


def test_the_slider_stops_at_few_steps_and_always_at_the_first_the_last_and_the_one_asked_for():
    steps = [value for _, value in balance_theatre(HISTORIES, step=17).controls["step"].options]
    assert steps == sorted(steps) and {0, 17, 94} <= set(steps) and len(steps) <= 32
    few = {name: history(3, steps=5) for name in "ab"}
    assert [value for _, value in balance_theatre(few).controls["step"].options] == [0, 1, 2, 3, 4]


def test_it_can_be_played_and_the_player_knows_the_number_of_stops():
    widget = balance_theatre(HISTORIES)
    play = next(child for child in widget.children if isinstance(child, ipywidgets.Play))
    assert play.max == len(widget.controls["step"].options) - 1 == play.value


def test_the_name_of_a_run_is_escaped():
    widget = balance_theatre(HISTORIES)
    assert "<none>" not in widget.picture.value and "&lt;none&gt; &amp; all" in widget.picture.value


def test_without_a_kernel_it_is_a_picture_and_a_line():
    widget = balance_theatre(HISTORIES)
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "closest('.balance-theatre')" in widget.children[-1].value


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="there is no run 'fast'"):
        balance_theatre(HISTORIES, "fast")
    with pytest.raises(ValueError, match="got no histories"):
        balance_theatre({})
