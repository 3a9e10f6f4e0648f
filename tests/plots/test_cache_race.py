"""The picture of the cache race: bars as long as their bytes, both phases apart, and when each kind runs out."""

import pytest

from deepseek_lab import plots
from deepseek_lab.accounting.cache_race import KINDS, CacheRace
from deepseek_lab.plots.cache_race import HEIGHT, LEFT, RIGHT, race_sheet
from deepseek_lab.plots.sheet import WIDTH, Words

RACES = [CacheRace(), CacheRace(gpu="16 x H800", batch=64), CacheRace("deepseek-v2-lite", "1 x A100", 256, prompt=500)]


def boxes(sheet, kind):
    return {box.name: box for box in sheet.shapes if getattr(box, "kind", "") == kind}


@pytest.mark.parametrize("race", RACES)
def test_bars_are_as_long_as_their_bytes_until_the_room_ends(race):
    for tokens in race.steps:
        sheet = race_sheet(race, tokens)
        read, written, full = (boxes(sheet, kind) for kind in ("read", "written", "full"))
        for kind in KINDS:
            first = race.ledger(kind, min(tokens, race.prompt)).total
            total = race.ledger(kind, tokens).total
            assert read[kind].width == pytest.approx((RIGHT - LEFT) * min(first / race.room, 1))
            assert read[kind].width + written[kind].width == pytest.approx((RIGHT - LEFT) * min(total / race.room, 1))
            assert written[kind].hatch and not read[kind].hatch and read[kind].fill != written[kind].fill
            assert (kind in full) == (total > race.room) == (f"{kind} " in out_of_memory(sheet))


def out_of_memory(sheet):
    return " ".join(said + " " for said in sheet.label.split("; ") if "out of memory" in said or "no room" in said)


@pytest.mark.parametrize("race", RACES)
def test_the_context_at_which_each_runs_out_stands_on_its_bar(race):
    for tokens in (0, race.steps[-1]):
        ends = [s.text for s in race_sheet(race, tokens).shapes if getattr(s, "kind", "") == "end"]
        for kind, said in zip(KINDS, ends, strict=True):
            limit = race.runs_out(kind)
            assert said == (f"out of memory after {limit:,} tokens" if tokens > limit else f"room for {limit:,} tokens")


def test_the_frame_stands_around_the_present_phase():
    race = CacheRace()
    for tokens, framed in ((0, []), (race.prompt, [True, False]), (race.prompt + 1, [False, True])):
        phases = [box for box in race_sheet(race, tokens).shapes if getattr(box, "kind", "") == "phase"]
        assert [box.line > 2 for box in phases] == (framed or [False, False])


def test_without_room_the_picture_says_that_the_weights_take_it():
    sheet = race_sheet(CacheRace(gpu="8 x H800"), 4_096)
    assert "8 x H800: no room, the weights alone take 626.9 GiB" in sheet.label
    assert not any(box.width for box in boxes(sheet, "read").values()) and len(boxes(sheet, "full")) == 5


@pytest.mark.parametrize("race", [*RACES, CacheRace(batch=256), CacheRace(gpu="8 x H800", batch=256)])
def test_words_stay_inside_and_the_height_never_changes(race):
    for tokens in race.steps:
        sheet = race_sheet(race, tokens)
        assert sheet.height == HEIGHT
        for word in (s for s in sheet.shapes if isinstance(s, Words)):
            start, end = {"start": (0, 1), "middle": (-0.5, 0.5), "end": (-1, 0)}[word.anchor]
            width = len(word.text) * 0.6 * word.size
            assert word.x + start * width > 0 and word.x + end * width < WIDTH, word.text


def test_the_static_twin_draws_the_last_step_unless_told():
    said = [text.get_text() for text in plots.cache_race(batch=2).texts]
    assert "DeepSeek-V3, 2 sequences of 163,840 tokens" in said
    assert "DeepSeek-V3, 1 sequence of 4,096 tokens" in [t.get_text() for t in plots.cache_race(4_096).texts]
    with pytest.raises(ValueError, match="a race and also batch"):
        plots.cache_race(race=CacheRace(), batch=2)
    with pytest.raises(ValueError, match="tokens=-1"):
        plots.cache_race(-1)
