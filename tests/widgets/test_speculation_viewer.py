"""The speculation viewer follows its slider, can be played, is labelled, and leaves a picture behind."""

import xml.etree.ElementTree as ElementTree

import ipywidgets
import pytest
import torch

from deepseek_lab.generation import Speculation, SpeculationStep
from deepseek_lab.plots.speculation import speculation_sheet
from deepseek_lab.widgets import speculation_viewer

WORDS = ["<b>", " & all", "\x00", "plain"]
STEPS = (
    SpeculationStep(2, (1,), (1, 3), (1.0,)),
    SpeculationStep(4, (0,), (2,), (0.0,)),
    SpeculationStep(5, (), (0,), ()),
)
RECORD = Speculation(torch.tensor([[3, 0, 1, 3, 2, 0]]), 2, 1, STEPS)


def shown(widget):
    label = ElementTree.fromstring(widget.picture.value).get("aria-label")
    assert label == widget.summary()
    return label


def test_it_begins_with_the_first_pass_and_redraws_once_for_a_change():
    widget, seen = speculation_viewer(RECORD, WORDS.__getitem__), []
    slider = widget.controls["number"]
    assert slider.description == "pass" and [text for text, _ in slider.options] == ["1 of 3", "2 of 3", "3 of 3"]
    assert shown(widget) == speculation_sheet(RECORD, WORDS.__getitem__, 0).label
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    slider.value = 1
    assert len(seen) == 1
    assert shown(widget) == speculation_sheet(RECORD, WORDS.__getitem__, 1).label
    assert shown(speculation_viewer(RECORD, WORDS.__getitem__, -1)).startswith("pass 3 of 3: nothing to guess")


def test_it_can_be_played_through_the_text():
    widget = speculation_viewer(RECORD, WORDS.__getitem__, 1)
    play = next(child for child in widget.children if isinstance(child, ipywidgets.Play))
    assert (play.max, play.value) == (2, 1)


def test_tokens_are_escaped_and_without_a_kernel_it_is_a_picture_and_a_line():
    widget = speculation_viewer(RECORD, WORDS.__getitem__, 2)
    assert "<b>" not in widget.picture.value and "&lt;b&gt;" in widget.picture.value
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "closest('.speculation-viewer')" in widget.children[-1].value


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="without a pass behind its prompt"):
        speculation_viewer(Speculation(torch.zeros(1, 3), 0, 0, ()), WORDS.__getitem__)
    with pytest.raises(IndexError):
        speculation_viewer(RECORD, WORDS.__getitem__, 3)
