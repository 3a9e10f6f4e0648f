"""The memory timeline follows its controls, can be played, is labelled, and leaves a picture behind."""

import xml.etree.ElementTree as ElementTree

import ipywidgets
import pytest

from deepseek_lab.accounting.measured import PARTS, Moment, Timeline
from deepseek_lab.plots.memory_timeline import timeline_sheet
from deepseek_lab.widgets import memory_timeline

LABELS = ["start", "forward layers.0", "loss", "backward layers.0", "clip", "optimiser", "zero_grad"]


def timeline(peak):
    sizes = [1, 5, 6, peak, 4, 4, 2]
    moments = (
        Moment(label, 0.1 * i, dict.fromkeys(PARTS, 0) | {"activations": size * 10_000})
        for i, (label, size) in enumerate(zip(LABELS, sizes, strict=True))
    )
    return Timeline(tuple(moments), 100, 0.0)


TIMELINES = {("<FP8> & all", False): timeline(30), ("<FP8> & all", True): timeline(12),
             ("FP32", False): timeline(60), ("FP32", True): timeline(20)}  # fmt: skip


def shown(widget):
    label = ElementTree.fromstring(widget.picture.value).get("aria-label")
    assert label == widget.summary()
    return label


def test_it_begins_at_the_peak_and_redraws_once_for_a_change():
    widget, seen = memory_timeline(TIMELINES, "FP32"), []
    assert list(widget.controls) == ["event", "precision", "recompute"]
    assert [c.description for c in widget.controls.values()] == ["moment", "precision", "recomputation"]
    assert [name for name, _ in widget.controls["event"].options] == LABELS
    assert shown(widget) == timeline_sheet(TIMELINES, "FP32", False, 3).label
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["recompute"].value = True
    widget.controls["precision"].value = "<FP8> & all"
    widget.controls["event"].value = 5
    assert len(seen) == 3
    assert shown(widget) == timeline_sheet(TIMELINES, "<FP8> & all", True, 5).label
    assert shown(memory_timeline(TIMELINES, event=1)) == timeline_sheet(TIMELINES, "<FP8> & all", False, 1).label


def test_it_can_be_played_through_the_step():
    widget = memory_timeline(TIMELINES)
    play = next(child for child in widget.children if isinstance(child, ipywidgets.Play))
    assert (play.max, play.value) == (6, 3)


def test_what_was_recorded_in_one_way_only_cannot_be_switched():
    widget = memory_timeline({("FP32", True): timeline(9)}, recompute=True)
    assert widget.controls["recompute"].disabled and widget.controls["recompute"].value
    assert not memory_timeline(TIMELINES).controls["recompute"].disabled


def test_names_are_escaped_and_without_a_kernel_it_is_a_picture_and_a_line():
    widget = memory_timeline(TIMELINES)
    assert "<FP8>" not in widget.picture.value and "&lt;FP8&gt; &amp; all" in widget.picture.value
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "closest('.memory-timeline')" in widget.children[-1].value


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="got no timelines"):
        memory_timeline({})
    some = {key: one for key, one in TIMELINES.items() if key != ("FP32", True)}
    with pytest.raises(ValueError, match=r"no timeline for \('FP32', True\); record every precision in the same ways"):
        memory_timeline(some)
