"""The model map follows its lists, offers the blocks that a model has, can be clicked, and leaves a picture behind."""

import xml.etree.ElementTree as ElementTree

import pytest

import deepseek_lab as lab
from deepseek_lab.plots.model_blocks import WHOLE, block_names
from deepseek_lab.plots.model_map import map_sheet
from deepseek_lab.widgets import model_map

V3, TINY, LLAMA = (lab.PRESETS[name] for name in ("deepseek-v3", "tiny", "llama-3.1-8b"))
MODELS = {"V3 <b>": V3, "tiny": TINY, "Llama": LLAMA}


def shown(widget):
    label = ElementTree.fromstring(widget.picture.value).get("aria-label")
    assert label == widget.summary()
    return label


def test_it_starts_where_it_is_told_and_redraws_once_for_a_change():
    widget, seen = model_map(MODELS, "tiny", "attention"), []
    assert [c.description for c in widget.controls.values()] == ["model", "block"]
    assert [text for text, _ in widget.controls["model"].options] == list(MODELS)
    assert shown(widget) == map_sheet(TINY, "attention").label
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["name"].value = "gate"
    assert shown(widget) == map_sheet(TINY, "gate").label
    widget.controls["model"].value = "V3 <b>"
    assert shown(widget) == map_sheet(V3, "gate").label
    assert len(seen) == 2


def test_the_list_offers_the_blocks_of_the_model_and_a_block_it_lacks_gives_way_to_the_whole():
    widget = model_map(MODELS, block="routed experts")
    blocks = widget.controls["name"]
    assert [text for text, _ in blocks.options] == block_names(V3)
    widget.controls["model"].value = "Llama"
    assert [text for text, _ in blocks.options] == block_names(LLAMA) and blocks.value == WHOLE
    assert shown(widget) == map_sheet(LLAMA, WHOLE).label
    blocks.value = "layers"
    widget.controls["model"].value = "tiny"
    assert shown(widget) == map_sheet(TINY, WHOLE).label


def test_every_preset_is_offered_unless_told():
    assert len(model_map().controls["model"].options) == len(lab.PRESETS)
    assert shown(model_map(model="DeepSeek-V3")) == map_sheet(V3).label


def test_what_is_clicked_has_the_name_of_an_option():
    widget = model_map(MODELS)
    drawn = ElementTree.fromstring(widget.picture.value)
    names = {box.get("data-name") for box in drawn.iter() if box.get("class") == "block"}
    assert names == {text for text, _ in widget.controls["name"].options} - {WHOLE}
    clicks = widget.children[1]
    assert clicks.layout.display == "none" and "closest('.model-map')" in clicks.value
    assert '"' not in clicks.value.partition('onerror="')[2].rpartition('"')[0]  # it would end the attribute


def test_without_a_kernel_it_is_a_picture_and_a_line():
    widget = model_map(MODELS)
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "closest('.model-map')" in widget.children[-1].value


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="model='gpt' is not among the models; choose one of V3 <b>, tiny, Llama"):
        model_map(MODELS, "gpt")
    with pytest.raises(ValueError, match="choose one of at least one"):
        model_map({})
    with pytest.raises(ValueError, match="block='gate' is not in this model"):
        model_map(MODELS, "Llama", "gate")
