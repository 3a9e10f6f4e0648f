"""Token router: heights are scores, marks are the choice under the rules, words say what colours say, one size."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import deepseek_lab as lab
from deepseek_lab.plots.routes import BOTTOM, bar_places, colour_of, routes_sheet
from deepseek_lab.plots.routes_words import changes
from deepseek_lab.widgets import token_router
from deepseek_lab.widgets.sheet_svg import sheet_svg

SVG = "{http://www.w3.org/2000/svg}"
TEXT = 'Is <b> & "c" a\n\ttag in "XML"? It is, and it ends with </b>; a model reads it letter by letter, one by one.'
TINY = lab.PRESETS["tiny"]


def model_with_bias(seed=0, **changed):
    torch.manual_seed(seed)
    model = lab.model.Transformer(TINY.replace(**changed))
    for layer in model.expert_layers():
        if hasattr(layer.gate, "e_score_correction_bias"):
            layer.gate.e_score_correction_bias.normal_(std=0.2)
    return model


def traced(shares=True, **changed):
    tokens = torch.cat([torch.tensor([256]), lab.data.ByteTokenizer().encode(TEXT)])
    return lab.experts.trace_routing(model_with_bias(**changed), tokens[None], shares=shares)


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


def test_each_token_has_a_stripe_for_each_expert_as_high_as_its_weight_and_the_main_expert_below():
    at, svg = TRACE.at(1), drawn(layer=1, token=5)
    stripes = named(svg, "stripe")
    shown = sorted({int(stripe.get("data-name")) for stripe in stripes})
    assert len(shown) == len(words(svg, "piece")) == len(words(svg, "main")) > 60 and len(stripes) == 4 * len(shown)
    for i, main in zip(shown, words(svg, "main"), strict=True):
        own = [stripe for stripe in stripes if stripe.get("data-name") == str(i)]
        pairs = sorted(zip(at.chosen[i].tolist(), at.weights[i].tolist(), strict=True))
        assert [stripe.get("fill") for stripe in own] == [colour_of(expert, 16) for expert, _ in pairs]
        heights = [20 * weight / at.weights[i].sum().item() for _, weight in pairs]
        assert [float(stripe.get("height")) for stripe in own] == pytest.approx(heights, abs=0.002)
        assert int(main) == at.chosen[i][at.weights[i].argmax()]
    assert len(named(svg, "token")) == 1
    (chosen,) = (piece for piece in named(svg, "piece") if piece.get("font-weight"))
    assert chosen.text == "b" == PIECES[5]


def test_the_colour_of_an_expert_is_that_of_its_number_and_dark_ink_reads_on_it():
    for count in (1, 8, 16, 64, 256):
        colours = [colour_of(expert, count) for expert in range(count)]
        assert len(set(colours)) > 0.9 * count
        for colour in colours:
            parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [((part + 0.055) / 1.055) ** 2.4 for part in parts]
            assert (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) / 0.0556 > 4.5
    svg = drawn(token=5)
    assert [box.get("fill") for box in named(svg, "colour")] == [colour_of(expert, 16) for expert in range(16)]


@pytest.mark.parametrize(("bias", "groups"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_rule_that_is_off_shows_the_choice_that_the_router_makes_without_it(bias, groups):
    choice, svg = TRACE.at(3).choices[bias, groups], drawn(layer=3, token=30, bias=bias, groups=groups)
    pairs = sorted(zip(choice.chosen[30].tolist(), choice.weights[30].tolist(), strict=True))
    assert [int(bar.get("data-name")) for bar in named(svg, "score") if bar.get("stroke")] == [e for e, _ in pairs]
    assert words(svg, "weight") == [f"{weight:.2f}" for _, weight in pairs]
    assert bool(named(svg, "bias")) == bias and bool(named(svg, "dropped")) == groups
    assert ("no group limit: every expert may be chosen" in words(svg)) == (not groups)
    title = words(svg, "headline")[0]
    assert ("bias off" in title, "groups off" in title) == (not bias, not groups)
    assert svg.get("aria-label").startswith(title)


@pytest.mark.parametrize("shared", [True, False])
def test_the_bar_of_the_output_shows_what_the_shared_expert_brings_or_takes_away(shared):
    shares, svg = TRACE.at(2).choices[True, True].shares[11], drawn(layer=2, token=11, shared=shared)
    own, routed = shares[-1].item(), named(svg, "routed part")[0]
    assert 0.02 < own < 0.98
    assert float(routed.get("width")) == pytest.approx(200 * (1 - own), abs=0.01)
    assert (len(named(svg, "shared part")), len(named(svg, "lost part"))) == (shared, not shared)
    said = f"routed {round(100 * (1 - own))} %, shared expert {round(100 * own)} %" + " lost" * (not shared)
    assert words(svg, "output") == [said]
    assert ("which is lost" in svg.get("aria-label")) == (not shared)
    by_number = sorted(zip(TRACE.at(2).chosen[11].tolist(), shares.tolist(), strict=False))
    assert words(svg, "share") == [f"{round(100 * part)} %".replace("-", "\N{MINUS SIGN}") for _, part in by_number]


def test_a_trace_without_shares_is_drawn_without_them():
    svg = drawn(traced(shares=False), layer=2, token=11)
    assert not named(svg, "routed part") and not "".join(words(svg, "share"))
    assert " of the output" not in svg.get("aria-label") and len(words(svg, "weight")) == 4


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
    expected = f'token 7 "␣", layer 1: experts {experts} with weights {weights}. They bring '
    assert svg.get("role") == "img" and svg.get("aria-label").startswith(expected)


@pytest.mark.parametrize("changed", [{}, *OTHERS.values()], ids=["16 experts", *OTHERS])
def test_every_state_has_one_size_and_its_words_inside(changed):
    trace = traced(**changed)
    for at in trace.layers:
        for token in range(0, len(PIECES), 11):
            svg = drawn(trace, layer=at.layer, token=token)
            assert (svg.get("viewBox"), svg.get("width"), svg.get("height")) == ("0 0 580 548", "580", "548")
            assert svg.find(f"{SVG}rect").get("fill") == "#fff" and svg.get("fill") == "#111111"
            for text in (t for t in svg.iter(f"{SVG}text") if not t.get("transform")):
                wide = len("".join(text.itertext())) * float(text.get("font-size")) * 0.5
                start = float(text.get("x")) - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
                assert start > -8 and start + wide < 588, text.text
            tops = [float(bar.get("y")) for bar in named(svg, "score")]
            assert min(tops) > 245 and max(tops) <= BOTTOM
            places = [float(text.get("x")) for text in named(svg, "weight")]
            room = 63.9 if len(at.groups) > 16 else 35.9
            assert all(b - a > room for a, b in itertools.pairwise(places))


MODEL, TOKENIZER = model_with_bias(), lab.data.ByteTokenizer()


def read(text):
    return lab.experts.trace_routing(MODEL, TOKENIZER.encode(text)[None], shares=True), TOKENIZER.pieces(text)


def test_the_widget_starts_where_it_is_told_and_redraws_once():
    widget, seen = token_router(read, "The with", layer=2, token=3), []
    names = ["text", "token", "layer", "bias", "groups", "shared expert"]
    assert [control.description for control in widget.controls.values()] == names
    assert widget.controls["token"].label == '3 "␣"' and widget.controls["layer"].label == "layer 2"
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    for name, value in (("token", 4), ("layer", 3), ("bias", False), ("groups", False), ("shared", False)):
        widget.controls[name].value = value
    assert len(seen) == 5
    assert ElementTree.fromstring(seen[-1]).get("aria-label") == widget.summary()
    trace, pieces = read("The with")
    assert widget.summary() == routes_sheet(trace, pieces, 3, 4, False, False, False).label
    assert token_router(read, "The with").summary() == routes_sheet(trace, pieces, 3, 4).label


def test_a_typed_text_is_read_and_the_chosen_token_stays_inside_it():
    widget, seen = token_router(read, "The with", layer=2, token=6), []
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["text"].value = "é <b>"
    assert len(seen) == 1 and len(widget.controls["token"].options) == 6
    assert widget.controls["token"].value == 5 and widget.pieces == ["C3", "A9", " ", "<", "b", ">"]
    trace, pieces = read("é <b>")
    assert widget.summary() == routes_sheet(trace, pieces, 2, 5).label
    widget.controls["text"].value = "longer again"
    assert widget.controls["token"].value == 5 and widget.summary().startswith('token 5 "r"')


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "0 characters: type 1 to 120."),
        ("x" * 121, "121 characters: type 1 to 120."),
        ("\ud800", "codec can"),
        ("<b>fail</b>", "&lt;b&gt;fail&lt;/b&gt; is refused"),
    ],
)
def test_what_cannot_be_read_is_explained_and_the_picture_stays(typed, says):
    def refusing(text):
        if "fail" in text:
            raise RuntimeError(f"{text} is refused")
        return read(text)

    widget = token_router(refusing, "The with", token=2)
    before = widget.picture.value.split("aria-label")[1]
    widget.controls["text"].value = typed
    assert says in widget.note.value and "Shown is the text before." in widget.note.value
    assert widget.picture.value.split("aria-label")[1] == before and widget.controls["token"].value == 2
    widget.controls["text"].value = "The without"
    assert "Shown" not in widget.note.value and len(widget.controls["token"].options) == 11


def test_the_longest_text_of_the_widest_letters_fits_the_model():
    widget = token_router(read, "a")
    widget.controls["text"].value = "\N{GRINNING FACE}" * 120
    assert len(widget.pieces) == 480 and "Shown" not in widget.note.value


def test_without_a_kernel_the_widget_is_a_picture_and_a_line():
    widget = token_router(read, "The with")
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "closest('.token-router')" in widget.children[-1].value


def test_what_does_not_fit_the_trace_is_refused():
    with pytest.raises(ValueError, match="got 3 pieces for 8 tokens"):
        token_router(lambda text: (read(text)[0], ["a", "b", "c"]), "The with")
    with pytest.raises(ValueError, match="layer 0 has no router"):
        token_router(read, "The with", layer=0)
    with pytest.raises(ValueError, match="token=500 is not in this text"):
        token_router(read, "The with", token=500)
    with pytest.raises(ValueError, match="0 characters: type 1 to 120"):
        token_router(read, "")
