"""Sheets and the twins drawn from them: the twin's boxes are the widget's boxes, nothing is clipped, nothing warns."""

import pytest
import torch
from matplotlib import pyplot as plt

import deepseek_lab as lab
from deepseek_lab import plots
from deepseek_lab.accounting import MemoryState
from deepseek_lab.plots import arrange
from deepseek_lab.plots import sheet as sheets
from deepseek_lab.plots.bits import bits_sheet
from deepseek_lab.plots.memory import memory_sheet
from deepseek_lab.plots.outliers import outlier_sheet
from deepseek_lab.plots.replay import replay_sheet
from deepseek_lab.plots.routes import routes_sheet
from deepseek_lab.precision import outlier_study, round_number
from deepseek_lab.training import StepRecord

TEXT = "A block with methods, $5_and$ <tags>, defined by a context manager.\n"
LOADS = torch.randint(1, 90, (20, 3, 16), generator=torch.Generator().manual_seed(2))
RECORDS = [StepRecord(i, 5.0 / (i + 1) + 1, 1e-3, 1.0, 64, 0.1, load, {}) for i, load in enumerate(LOADS)]
STUDY = outlier_study(sizes=(3e5,))
NOW, BEFORE = MemoryState(), MemoryState(cache="expanded")
SAMPLES = {0: "\x00\u0780 中 $x_1$", 19: "plain text\n  and more"}


def traced():
    torch.manual_seed(0)
    model = lab.model.Transformer(lab.PRESETS["tiny"])
    for layer in model.expert_layers():
        layer.gate.e_score_correction_bias.normal_(std=0.2)
    return lab.experts.trace_routing(model, lab.data.ByteTokenizer().encode(TEXT)[None])


TRACE = traced()


def named(sheet, kind):
    return [shape for shape in sheet.shapes if shape.kind == kind]


def pictures():
    yield plots.token_router(TRACE, TEXT, 2, 10), routes_sheet(TRACE, TEXT, 2, 10)
    yield plots.training_replay(RECORDS, SAMPLES, {0: 5.9}, 19, 1), replay_sheet(RECORDS, SAMPLES, {0: 5.9}, 19, 1)
    yield plots.memory_bar(NOW, BEFORE), memory_sheet(NOW, BEFORE)
    yield plots.bit_explorer("FP32", number=0.1), bits_sheet(round_number(0.1, "FP32"))
    yield plots.outlier_explorer(STUDY, 3e5, (0, 0)), outlier_sheet(STUDY, 3e5, (0, 0))


def test_the_twin_has_the_boxes_of_the_widget():
    kinds_of_each = (("score", "bias", "token"), ("load", "frame"), ("part", "ghost"), ("bit",), ("spoilt",))
    for (ax, sheet), kinds in zip(pictures(), kinds_of_each, strict=True):
        for kind in kinds:
            patches = [p for p in ax.patches if p.get_label().split(" ")[0] == kind]
            places = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in patches]
            assert places == [(b.x, b.y, b.width, b.height) for b in named(sheet, kind)] != []


def test_the_twin_says_the_words_of_the_widget():
    for ax, sheet in pictures():
        assert [t.get_text() for t in ax.texts] == [s.text for s in sheet.shapes if isinstance(s, sheets.Words)]


def test_no_word_of_the_twin_is_clipped():
    plots.use_style()
    for ax, _ in pictures():
        ax.figure.canvas.draw()
        frame = ax.figure.bbox
        for text in ax.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, text


def test_it_draws_on_the_axes_that_it_is_given():
    _, ax = plt.subplots()
    assert plots.token_router(TRACE, TEXT, ax=ax) is ax
    assert plots.training_replay(RECORDS, SAMPLES, ax=ax) is ax
    assert plots.memory_bar(NOW, ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_characters_that_the_font_lacks_are_replaced_and_do_not_warn():
    assert sheets.drawable("a␣↵中") == "a␣↵\ufffd"
    sheet = replay_sheet(RECORDS, SAMPLES, step=0)
    png = sheets.png(sheet)
    assert png.startswith(b"\x89PNG") and plt.get_fignums() == []
    assert sheets.png(sheet) == png


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.03, 1.04), (0, 0.4), (0, 5.95), (0, 3.7), (0, 0)])
def test_an_axis_holds_its_values_and_ends_on_round_ticks(low, high):
    plan = arrange.scale(low, high, 300, 100)
    assert plan.low <= low and plan.high >= high and 2 <= len(plan.ticks()) <= 8
    assert (plan.pixel(plan.low), plan.pixel(plan.high)) == (300, 100)
    assert f"{plan.step:.0e}"[0] in "125"
    assert plan.ticks()[-1] == pytest.approx(plan.high)


def test_text_is_broken_at_spaces_where_there_are_any():
    assert arrange.wrap("one two three", 8, 5) == ["one two ", "three"]
    assert arrange.wrap("abcdefghij\n\nk", 4, 9) == ["abcd", "efgh", "ij", "", "k"]
    assert arrange.wrap("a\nb\nc", 4, 2) == ["a", "b…"]
    assert arrange.wrap("", 4, 2) == [""]
    assert arrange.flow("ab cde", [1] * 6, 5) == [[0, 1, 2], [3, 4, 5]]
    assert arrange.flow("abcdef", [1] * 6, 4) == [[0, 1, 2, 3], [4, 5]]


def test_labels_move_apart_only_as_far_as_they_must():
    assert arrange.spread([50, 200], 100, 0, 400) == [50, 200]
    assert arrange.spread([50, 60], 100, 0, 400) == [50, 150]
    assert arrange.spread([390, 395], 100, 0, 400) == [250, 350]


def test_the_axis_of_the_routes_says_that_bias_is_on_it_where_it_is():
    assert "score (0 to 1) plus bias" in [t.get_text() for t in plots.token_router(TRACE, TEXT).texts]
    torch.manual_seed(0)
    plain = lab.model.Transformer(lab.PRESETS["tiny"])
    trace = lab.experts.trace_routing(plain, lab.data.ByteTokenizer().encode(TEXT)[None])
    assert "score (0 to 1)" in [t.get_text() for t in plots.token_router(trace, TEXT).texts]
