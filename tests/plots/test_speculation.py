"""The picture of a text written with drafts shows every draft as it was judged, and counts what the record counts."""

import pytest
import torch
from matplotlib import pyplot as plt

import deepseek_lab as lab
from deepseek_lab import plots
from deepseek_lab.generation import Speculation, SpeculationStep, speculate
from deepseek_lab.plots.sheet import WIDTH, Box, Line, Words
from deepseek_lab.plots.speculation import LEFT, MOST_DRAFTS, WIDE, _checked, check_speculation, speculation_sheet

WORDS = ["The", " cat", " sat", " on", " the", " mat", "\n", " extraordinarily long", "é<&$"]
STEPS = (
    SpeculationStep(3, (2, 7, 4, 8), (2, 3), (1.0, 0.25)),
    SpeculationStep(5, (4, 5), (4, 5, 6), (1.0, 0.5)),
    SpeculationStep(8, (), (0,), ()),
)
RECORD = Speculation(torch.tensor([[0, 1, 4, 2, 3, 4, 5, 6, 0]]), 6, 3, STEPS)
spell = WORDS.__getitem__


def named(sheet, kind):
    return [shape for shape in sheet.shapes if getattr(shape, "kind", "") == kind]


def written(length=200, seed=0) -> tuple[Speculation, lab.data.ByteTokenizer]:
    """A text of a model with two modules that was never trained: drafts of every kind, bytes of every kind."""
    torch.manual_seed(seed)
    model = lab.model.Transformer(
        lab.PRESETS["tiny"].replace(num_hidden_layers=2, hidden_size=32, num_nextn_predict_layers=2)
    )
    tokenizer = lab.data.ByteTokenizer()
    return speculate(model.eval(), tokenizer.encode("a text: ")[None], length, 0.8, seed=seed), tokenizer


def test_every_draft_of_a_pass_is_a_cell_with_its_verdict():
    sheet = speculation_sheet(RECORD, spell, 0)
    assert [w.text for w in named(sheet, "checked")] == ["␣sat", "␣extraordin…", "␣the", "é<&$", "␣on"]
    assert [w.text for w in named(sheet, "verdict")] == [
        "accepted", "odds 1.00", "refused", "odds 0.25", "not looked at", "not looked at", "the model's own",
    ]  # fmt: skip
    kinds = [s.kind for s in sheet.shapes if isinstance(s, Box) and s.kind in ("accepted", "refused", "unseen", "own")]
    assert kinds == ["accepted", "refused", "unseen", "unseen", "own"]
    (cell,), refused = named(sheet, "refused"), named(sheet, "stroke")[0]
    assert all(cell.x < x < cell.x + cell.width and cell.y < y < cell.y + cell.height for x, y in refused.points)
    nothing = speculation_sheet(RECORD, spell, 2)
    assert [w.text for w in named(nothing, "checked")] == ["The"] and named(nothing, "headline")[0].text == (
        "pass 3 of 3: nothing to guess"
    )


def test_the_text_stands_as_far_as_the_pass_with_its_drafts_marked():
    for number, (accepted, now) in enumerate([("3", "34"), ("356", "567"), ("356", "8")]):
        sheet = speculation_sheet(RECORD, spell, number)
        assert [w.text for w in named(sheet, "piece")] == [
            w.replace("\n", "↵") for w in map(spell, RECORD.tokens[0].tolist())
        ][: int(now[-1]) + 1]
        assert "".join(box.name for box in named(sheet, "stands")) == accepted
        assert "".join(box.name for box in named(sheet, "now")) == now
        assert [w.text for w in named(sheet, "small")] == ["␣extraordin…"]
    grey = [w.text for w in named(sheet, "piece") if w.colour != "#111111"]
    assert grey == ["The", " cat"]  # the prompt; its own pass wrote the third


def test_label_and_account_say_what_is_shown():
    assert speculation_sheet(RECORD, spell, 0).label == (
        "pass 1 of 3: “␣sat” accepted, “␣extraordin…” refused, the model writes “␣on”. "
        "2 tokens in 1 pass, 2.00 a pass; 1 of 4 drafts accepted"
    )
    sheet = speculation_sheet(RECORD, spell, 1)
    assert sheet.label == (
        "pass 2 of 3: “␣the” “␣mat” accepted, the model adds “↵”. "
        "5 tokens in 2 passes, 2.50 a pass; 3 of 6 drafts accepted"
    )
    assert sheet.detail == "The cat the sat on the mat\n"
    assert speculation_sheet(RECORD, spell, 2).label.startswith(
        "pass 3 of 3: nothing to guess, the model writes “The”."
    )


def test_the_bars_are_the_records_own_counts_on_one_scale():
    record, tokenizer = written()
    unit = (WIDE - 110) / sum(len(step.written) for step in record.steps)
    sheet = speculation_sheet(record, lambda t: tokenizer.decode([t]), len(record.steps) - 1)
    bars = {kind: named(sheet, kind)[0] for kind in ("own tokens", "accepted tokens", "passes of the model")}
    assert bars["own tokens"].width == bars["passes of the model"].width == pytest.approx(unit * len(record.steps))
    assert bars["accepted tokens"].width == pytest.approx(unit * record.accepted)
    assert bars["accepted tokens"].x + bars["accepted tokens"].width == pytest.approx(LEFT + WIDE)
    assert f"{record.accepted} of {record.drafted} drafts" in sheet.label
    assert f"{record.tokens_per_step:.2f} a pass" in sheet.label


def test_every_pass_has_one_size_the_last_lines_are_shown_and_nothing_is_clipped():
    record, tokenizer = written(300)
    sizes = set()
    for number in range(0, len(record.steps), 17):
        sheet = speculation_sheet(record, lambda t: tokenizer.decode([t]), number)
        sizes.add(sheet.height)
        assert max(box.y for box in named(sheet, "now")) == max(w.y for w in named(sheet, "piece")) - 15
        ax = plots.speculation_viewer(record, lambda t: tokenizer.decode([t]), number)
        ax.figure.canvas.draw()
        frame = ax.figure.bbox
        for text in ax.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, text
        plt.close("all")
    assert len(sizes) == 1


def test_the_most_drafts_still_fit_beside_each_other():
    step = SpeculationStep(3, (1,) * MOST_DRAFTS, (2,), (0.5,))
    assert max(s.x + s.width for s in _checked(step, spell) if isinstance(s, Box)) <= WIDTH - LEFT


def test_the_twin_has_the_boxes_and_words_of_the_sheet():
    ax, sheet = plots.speculation_viewer(RECORD, spell, 1), speculation_sheet(RECORD, spell, 1)
    places = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches if hasattr(p, "get_x")]
    assert places == [(b.x, b.y, b.width, b.height) for b in sheet.shapes if isinstance(b, Box)]
    assert [t.get_text() for t in ax.texts] == [s.text for s in sheet.shapes if isinstance(s, Words)]
    assert len(ax.lines) == sum(isinstance(s, Line) for s in sheet.shapes)
    assert "pass 3 of 3: nothing to guess" in [t.get_text() for t in plots.speculation_viewer(RECORD, spell).texts]


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="got a text without a pass behind its prompt"):
        check_speculation(Speculation(torch.zeros(1, 3), 0, 0, ()))
    many = SpeculationStep(3, (1,) * 5, (2,), (0.5,))
    with pytest.raises(ValueError, match="got 5 drafts in one pass; it draws up to 4"):
        plots.speculation_viewer(Speculation(torch.zeros(1, 4), 5, 0, (many,)), spell)
    with pytest.raises(IndexError):
        plots.speculation_viewer(RECORD, spell, 3)
