"""Expert routes: heights are scores, marks are the trace's choice, words say what colours say, one size always."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import deepseek_lab as lab
from deepseek_lab.plots.routes import BOTTOM, bar_places, routes_sheet
from deepseek_lab.plots.routes_words import changes
from deepseek_lab.widgets import expert_routes
from deepseek_lab.widgets.sheet_svg import sheet_svg

SVG = "{http://www.w3.org/2000/svg}"
TEXT = 'Is <b> & "c" a\n\ttag in "XML"? It is, and it ends with </b>; a model reads it letter by letter, one by one.'
TINY = lab.PRESETS["tiny"]


def traced(seed=0, **changed):
    torch.manual_seed(seed)
    model = lab.model.Transformer(TINY.replace(**changed))
    for layer in model.expert_layers():
        if hasattr(layer.gate, "e_score_correction_bias"):
            layer.gate.e_score_correction_bias.normal_(std=0.2)
    tokens = torch.cat([torch.tensor([256]), lab.data.ByteTokenizer().encode(TEXT)])
    return lab.experts.trace_routing(model, tokens[None])


PIECES = ["", *TEXT]
TRACE = traced()
OTHERS = {
    "8 experts, no groups, no bias": dict(
        n_routed_experts=8, num_experts_per_tok=2, scoring_func="softmax", topk_method="greedy"
    ),
    "32 experts": dict(n_routed_experts=32),
    "64 experts in 8 groups": dict(n_routed_experts=64, n_group=8, topk_group=4, num_experts_per_tok=8),
    "64 experts in 16 groups": dict(n_routed_experts=64, n_group=16, topk_group=4, num_experts_per_tok=6),
}


def drawn(trace=TRACE, **choice):
    return ElementTree.fromstring(sheet_svg(routes_sheet(trace, PIECES, **choice)))


def named(svg, kind):
    return [element for element in svg.iter() if element.get("class") == kind]


def words(svg, kind=None):
    return ["".join(t.itertext()) for t in svg.iter(f"{SVG}text") if kind in (None, t.get("class"))]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_bars_are_as_high_as_the_scores_and_pieces_as_the_bias(layer):
    at, svg = TRACE.at(layer), drawn(layer=layer, token=20)
    scale = bar_places(at.groups.tolist(), TRACE.span).scale
    pixels, zero = (scale.start - scale.end) / (scale.high - scale.low), scale.pixel(0)
    bars, pieces = named(svg, "score"), named(svg, "bias")
    assert [int(bar.get("data-name")) for bar in bars] == list(range(16))
    for bar, score in zip(bars, at.scores[20].tolist(), strict=True):
        assert float(bar.get("height")) == pytest.approx(score * pixels, abs=0.011)
        assert float(bar.get("y")) + float(bar.get("height")) == pytest.approx(zero, abs=0.02)
    for piece, bias in zip(pieces, (at.bias - at.bias.mean()).tolist(), strict=True):
        assert float(piece.get("height")) == pytest.approx(abs(bias) * pixels, abs=0.011)
        assert piece.get("fill").endswith("-up)" if bias > 0 else "-down)")
    ends = [float(line.get("d")[1:].split()[1]) for line in named(svg, "sum")]
    assert ends == pytest.approx([scale.pixel(value) for value in at.centred_selection[20].tolist()], abs=0.011)


@pytest.mark.parametrize("token", [0, 12, len(PIECES) - 1])
def test_marks_and_weights_are_those_of_the_trace(token):
    at, svg = TRACE.at(2), drawn(layer=2, token=token)
    chosen = sorted(at.chosen[token].tolist())
    weight = dict(zip(at.chosen[token].tolist(), at.weights[token].tolist(), strict=True))
    assert [int(bar.get("data-name")) for bar in named(svg, "score") if bar.get("stroke")] == chosen
    assert [int(line.get("data-name")) for line in named(svg, "leader")] == chosen
    assert words(svg, "weight") == [f"{weight[expert]:.2f}" for expert in chosen]
    assert len(named(svg, "tick")) == 4
    assert [t.text for t in named(svg, "number") if t.get("font-weight")] == [str(expert) for expert in chosen]


def test_groups_that_were_not_kept_are_grey_and_say_so():
    for token in range(0, len(PIECES), 9):
        at, svg = TRACE.at(3), drawn(layer=3, token=token)
        kept = at.kept[token].tolist()
        assert words(svg, "group") == [
            f"group {g}: {'kept' if inside else 'not kept'}" for g, inside in enumerate(kept)
        ]
        assert [int(box.get("data-name")) for box in named(svg, "dropped")] == [g for g in range(4) if not kept[g]]
        grey = {bar.get("data-name") for bar in named(svg, "score") if bar.get("fill") == "#BDBDBD"}
        assert grey == {str(expert) for expert in range(16) if not kept[expert // 4]}


def test_the_sentences_say_what_the_bias_and_the_group_limit_changed():
    at = TRACE.at(3)
    seen = set()
    for token in range(len(PIECES)):
        chosen = set(at.chosen[token].tolist())
        for sentence, other in zip(changes(at, token), (at.without_bias, at.without_groups), strict=True):
            new = sorted(set(other[token].tolist()) - chosen)
            assert ("the same experts" in sentence) == (not new)
            assert not new or f" {', '.join(map(str, new))} in place of " in sentence
            seen.add(bool(new))
    assert seen == {True, False}
    plain = traced(**OTHERS["8 experts, no groups, no bias"])
    assert all("this layer has none" in sentence for sentence in changes(plain.at(1), 3))


def test_where_most_experts_would_change_they_are_listed_once():
    at = traced(**OTHERS["64 experts in 8 groups"]).at(3)
    lines = [line for token in range(len(PIECES)) for line in changes(at, token)]
    assert max(map(len, lines)) < 90
    assert any(" of 8 would change, to " in line for line in lines)


def test_the_text_marks_its_token_and_underlines_those_that_share_its_main_expert():
    at, svg = TRACE.at(1), drawn(layer=1, token=5)
    main = at.chosen[5][at.weights[5].argmax()].item()
    shared = [i for i in range(len(PIECES)) if i != 5 and main in at.chosen[i].tolist()]
    marked = [int(line.get("data-name")) for line in named(svg, "shared")]
    assert marked == [i for i in shared if i <= marked[-1]] and len(marked) > 3
    assert len(named(svg, "token")) == 1
    (chosen,) = (piece for piece in named(svg, "piece") if piece.get("fill"))
    assert chosen.text == "b" == PIECES[5]
    assert f"expert {main}, the one with the largest weight here" in " ".join(words(svg))


def test_html_in_the_text_is_escaped_and_blanks_are_visible():
    markup = sheet_svg(routes_sheet(TRACE, PIECES, token=4))
    assert "<b>" not in markup and "&lt;" in markup
    pieces = words(drawn(token=4), "piece")
    assert "".join(pieces[:16]) == '▯Is␣<b>␣&␣"c"␣a↵'
    assert drawn(token=1 + TEXT.index("\t")).get("aria-label").startswith('token 16 "⇥", layer 3')
    assert drawn(token=0).get("aria-label").startswith("token 0 (special), layer 3")


def test_the_summary_has_the_experts_and_their_weights():
    svg, at = drawn(layer=1, token=7), TRACE.at(1)
    pairs = sorted(zip(at.chosen[7].tolist(), at.weights[7].tolist(), strict=True))
    experts, weights = ", ".join(str(e) for e, _ in pairs), ", ".join(f"{w:.2f}" for _, w in pairs)
    expected = f'token 7 "␣", layer 1: experts {experts} with weights {weights}. Without the bias: '
    assert svg.get("role") == "img" and svg.get("aria-label").startswith(expected)


@pytest.mark.parametrize("changed", [{}, *OTHERS.values()], ids=["16 experts", *OTHERS])
def test_every_state_has_one_size_and_its_words_inside(changed):
    trace = traced(**changed)
    for at in trace.layers:
        for token in range(0, len(PIECES), 11):
            svg = drawn(trace, layer=at.layer, token=token)
            assert (svg.get("viewBox"), svg.get("width"), svg.get("height")) == ("0 0 580 450", "580", "450")
            assert svg.find(f"{SVG}rect").get("fill") == "#fff" and svg.get("fill") == "#111111"
            for text in (t for t in svg.iter(f"{SVG}text") if not t.get("transform")):
                wide = len("".join(text.itertext())) * float(text.get("font-size")) * 0.5
                start = float(text.get("x")) - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
                assert start > -8 and start + wide < 588, text.text
            tops = [float(bar.get("y")) for bar in named(svg, "score")]
            assert min(tops) > 160 and max(tops) <= BOTTOM
            places = [float(text.get("x")) for text in named(svg, "weight")]
            room = 63.9 if len(at.groups) > 16 else 35.9
            assert all(b - a > room for a, b in itertools.pairwise(places))


def test_the_widget_starts_where_it_is_told_and_redraws_once():
    widget, seen = expert_routes(TRACE, PIECES, layer=2, token=3), []
    assert [c.description for c in widget.controls.values()] == ["token", "layer"] == list(widget.controls)
    assert widget.controls["token"].label == '3 "␣"' and widget.controls["layer"].label == "layer 2"
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["token"].value = 4
    widget.controls["layer"].value = 3
    assert len(seen) == 2
    assert ElementTree.fromstring(seen[-1]).get("aria-label") == widget.summary()
    assert widget.summary() == routes_sheet(TRACE, PIECES, 3, 4).label
    assert expert_routes(TRACE, PIECES).summary() == routes_sheet(TRACE, PIECES, 3, len(PIECES) // 2).label


def test_without_a_kernel_the_widget_is_a_picture_and_a_line():
    widget = expert_routes(TRACE, PIECES)
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "closest('.expert-routes')" in widget.children[-1].value


def test_what_does_not_fit_the_trace_is_refused():
    with pytest.raises(ValueError, match=f"got 3 pieces for {len(PIECES)} tokens"):
        expert_routes(TRACE, ["a", "b", "c"])
    with pytest.raises(ValueError, match="layer 0 has no router"):
        expert_routes(TRACE, PIECES, layer=0)
    with pytest.raises(ValueError, match="token=500 is not in this text"):
        expert_routes(TRACE, PIECES, token=500)
