"""The picture of absorption: bars in proportion to what is counted, marks where the intensities lie, the crossing."""

import math

import pytest

from deepseek_lab import plots
from deepseek_lab.accounting.decode import LATENT_WAYS, decode_step
from deepseek_lab.plots.absorption import BARS, HEIGHT, RIGHT, absorption_sheet
from deepseek_lab.plots.sheet import WIDTH, Words
from deepseek_lab.presets import PRESETS

V3 = PRESETS["deepseek-v3"]


def with_heads(heads, latent):
    return V3.replace(num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=latent)


CASES = [(V3, 4_096, 1), (V3, 131_072, 32), (with_heads(8, 64), 1, 1), (with_heads(256, 2_048), 131_072, 256)]


def lengths(sheet, name):
    """The summed width of a panel's bars by way."""
    out = dict.fromkeys(LATENT_WAYS, 0.0)
    for box in sheet.shapes:
        if getattr(box, "kind", "") == "bar" and box.name.split()[0] == name:
            out[box.name.split()[1]] += box.width
    return out


@pytest.mark.parametrize(("config", "context", "batch"), CASES)
def test_bars_are_in_proportion_to_what_accounting_counts(config, context, batch):
    sheet = absorption_sheet(config, context, batch)
    steps = {way: decode_step(config, context, way, batch) for way in LATENT_WAYS}
    amounts = {
        "numbers": {way: step.kept for way, step in steps.items()},
        "FLOP": {way: step.flops.total for way, step in steps.items()},
        "bytes": {way: step.reads.total for way, step in steps.items()},
        "least": {way: step.seconds(989.4e12, 3.35e12) for way, step in steps.items()},
    }
    for name, values in amounts.items():
        drawn, largest = lengths(sheet, name), max(values.values())
        for way in LATENT_WAYS:
            assert drawn[way] == pytest.approx((RIGHT - BARS) * values[way] / largest), (name, way)


@pytest.mark.parametrize(("config", "context", "batch"), CASES)
def test_marks_lie_at_the_intensities_and_the_dashed_line_at_the_ridge(config, context, batch):
    sheet = absorption_sheet(config, context, batch)

    def place(value):
        return BARS + (RIGHT - BARS) * (math.log10(value) + 1) / 6

    (ridge,) = (line for line in sheet.shapes if getattr(line, "kind", "") == "ridge")
    assert ridge.points[0][0] == pytest.approx(place(989.4 / 3.35))
    marks = {box.name: box.x + 5 for box in sheet.shapes if getattr(box, "kind", "") == "intensity"}
    said = [word.text for word in sheet.shapes if getattr(word, "kind", "") == "amount" and "bound by" in word.text]
    for way, words in zip(LATENT_WAYS, said, strict=True):
        intensity = decode_step(config, context, way, batch).intensity
        assert marks[way] == pytest.approx(place(intensity))
        assert words.endswith("arithmetic" if intensity > 989.4 / 3.35 else "memory")


def test_the_crossing_is_said_and_where_there_is_none_the_winner():
    assert "absorbed is faster on machines with a ridge above 3.4 FLOP" in absorption_sheet(V3, 131_072).label
    assert "absorbed wins on every machine" in absorption_sheet(with_heads(8, 64), 100).label
    assert "expanded wins on every machine" in absorption_sheet(with_heads(1, 2_048), 100).label


@pytest.mark.parametrize(("config", "context", "batch"), CASES)
def test_words_stay_inside(config, context, batch):
    sheet = absorption_sheet(config, context, batch)
    assert sheet.height == HEIGHT
    for word in (s for s in sheet.shapes if isinstance(s, Words)):
        assert word.x + len(word.text) * (0.6 if word.bold else 0.55) * word.size < WIDTH, word.text


def test_the_static_twin_draws_v3_unless_told_and_refuses_what_has_no_latent():
    assert "128 heads, latent 512: one step of 1 sequence of 4,096 tokens" in [
        text.get_text() for text in plots.absorption_explorer().texts
    ]
    with pytest.raises(ValueError, match="way='expanded' does not go with"):
        plots.absorption_explorer(PRESETS["llama-3.1-8b"])
