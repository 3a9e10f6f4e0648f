"""The traffic map follows its two controls, is labelled, escapes its text and leaves a picture behind."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch

import deepseek_lab as lab
from deepseek_lab.experts import trace_routing, trace_traffic
from deepseek_lab.plots.traffic import traffic_sheet
from deepseek_lab.widgets import traffic_map

TINY = lab.PRESETS["tiny"]
PIECES = ["", *'Is <b> & "c" a\n\ttag in XML?']


def traced():
    torch.manual_seed(0)
    model = lab.model.Transformer(TINY)
    tokens = torch.cat([torch.tensor([256]), lab.data.ByteTokenizer().encode("".join(PIECES))])
    return trace_traffic(trace_routing(model, tokens[None]), TINY)


LAYERS = traced()


def shown(widget):
    label = ElementTree.fromstring(widget.picture.value).get("aria-label")
    assert label == widget.summary()
    return label


def test_it_starts_where_it_is_told_and_redraws_once_for_a_change():
    widget, seen = traffic_map(LAYERS, PIECES, layer=2, token=3), []
    assert [c.description for c in widget.controls.values()] == ["token", "layer"] == list(widget.controls)
    assert shown(widget) == traffic_sheet(LAYERS, PIECES, 2, 3).label
    assert widget.controls["token"].label == '3 "\N{OPEN BOX}"' and widget.controls["layer"].label == "layer 2"
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["token"].value = 4
    widget.controls["layer"].value = 1
    assert len(seen) == 2
    assert shown(widget) == traffic_sheet(LAYERS, PIECES, 1, 4).label
    assert shown(traffic_map(LAYERS, PIECES)) == traffic_sheet(LAYERS, PIECES, 3, len(PIECES) // 2).label


def test_html_in_the_text_is_escaped_and_a_special_token_is_called_so():
    widget = traffic_map(LAYERS, PIECES, token=0)
    assert "<b>" not in widget.picture.value and "&lt;" in widget.picture.value
    assert shown(widget).startswith("token 0 (special), layer 3: ")


def test_without_a_kernel_it_is_a_picture_and_a_line():
    widget = traffic_map(LAYERS, PIECES)
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=f"got 3 pieces for {len(PIECES)} tokens"):
        traffic_map(LAYERS, "abc")
    with pytest.raises(ValueError, match="layer 7 has no traffic here"):
        traffic_map(LAYERS, PIECES, layer=7)
    with pytest.raises(ValueError, match="token=500 is not in this text"):
        traffic_map(LAYERS, PIECES, token=500)
