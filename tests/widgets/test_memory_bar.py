"""The memory bar: lengths are bytes, the setting before stands behind, words say what colours say, nothing raises."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from deepseek_lab.accounting import MemoryState, kv_cache, weights
from deepseek_lab.accounting.memory_state import CACHE_NAMES, GPU_SETS, MODEL_NAMES, WEIGHT_NAMES, summary
from deepseek_lab.plots.memory import LEFT, RIGHT, byte_scale, memory_sheet
from deepseek_lab.widgets import MemoryBar, memory_bar
from deepseek_lab.widgets.sheet_svg import sheet_svg

SVG = "{http://www.w3.org/2000/svg}"
NOW, BEFORE = MemoryState(), MemoryState(cache="expanded")


def drawn(state, previous=None):
    return ElementTree.fromstring(sheet_svg(memory_sheet(state, previous)))


def named(svg, kind):
    return [element for element in svg.iter() if element.get("class") == kind]


def pixels_per_byte(largest):
    _, unit_bytes, scale = byte_scale(largest)
    return (RIGHT - LEFT) / (scale.high * unit_bytes)


def words(svg):
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def states():
    """A spread over all choices: each pair of model and cache, each format and GPU, short and long, few and many."""
    others = itertools.cycle(itertools.product(WEIGHT_NAMES, GPU_SETS, (1_024, 131_072), (1, 256)))
    for model, cache in itertools.product(MODEL_NAMES, CACHE_NAMES):
        dtype, gpu, context, batch = next(itertools.islice(others, 4, None))
        yield MemoryState(model, dtype, cache, context, batch, gpu)


def test_the_bars_are_as_long_as_their_bytes():
    stored = weights(NOW.config, "fp8")
    routed = stored["experts/routed experts"].total
    expected = [routed, stored.total - routed, kv_cache(NOW.config, 131_072).total]
    parts = named(drawn(NOW, BEFORE), "part")
    assert [part.get("data-name") for part in parts] == ["routed experts", "other weights", "cache"]
    for part, size in zip(parts, expected, strict=True):
        assert float(part.get("width")) == pytest.approx(size * pixels_per_byte(BEFORE.total), abs=0.01)
    for left, right in itertools.pairwise(parts):
        assert float(left.get("x")) + float(left.get("width")) == pytest.approx(float(right.get("x")), abs=0.01)


def test_the_setting_before_is_drawn_behind_at_its_own_length_on_the_same_scale():
    (ghost,) = named(drawn(NOW, BEFORE), "ghost")
    now = sum(float(part.get("width")) for part in named(drawn(NOW, BEFORE), "part"))
    assert float(ghost.get("width")) / now == pytest.approx(BEFORE.total / NOW.total, rel=1e-4)
    assert "saves 601.4 GiB" in words(drawn(NOW, BEFORE)) and "1.9x less" in words(drawn(NOW, BEFORE))
    assert named(drawn(NOW), "ghost") == []


def test_the_capacity_stands_where_its_bytes_are_or_is_said_to_lie_beyond():
    (line,) = named(drawn(NOW), "capacity")
    x = float(line.get("d")[1:].split()[0])
    assert x == pytest.approx(LEFT + NOW.capacity * pixels_per_byte(NOW.total), abs=0.01)
    small = drawn(MemoryState("llama-3.1-8b", "bf16", "grouped", 1_024, gpu="16 x H800"))
    assert named(small, "capacity") == []
    assert "16 x H800: 1,280 GB = 1,192.1 GiB, beyond this scale ▶" in words(small)


def test_the_picture_says_in_words_what_it_shows():
    svg = drawn(NOW, BEFORE)
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == summary(NOW, BEFORE)
    text = words(svg)
    for said in ("routed experts", "609.1 GiB", "other weights", "17.8 GiB", "cache", "8.6 GiB", "1,500 GiB",
                 "Too large by 39.5 GiB; needs 9 H800 by memory alone.", "8 x H800: 640 GB = 596.0 GiB"):  # fmt: skip
        assert said in text


@pytest.mark.parametrize("state", list(states()), ids=lambda s: f"{s.model} {s.weights} {s.cache} {s.gpu}")
def test_every_setting_gives_a_well_formed_picture_of_one_size_with_its_words_inside(state):
    svg = drawn(state, NOW)
    assert (svg.get("viewBox"), svg.get("width"), svg.get("height")) == ("0 0 580 226", "580", "226")
    assert svg.find(f"{SVG}rect").get("fill") == "#fff" and svg.get("fill") == "#111111"
    for text in svg.iter(f"{SVG}text"):
        wide = len("".join(text.itertext())) * 7.0
        start = float(text.get("x")) - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
        assert start > -4 and start + wide < 584, "".join(text.itertext())
    used = max(float(rect.get("x")) + float(rect.get("width")) for rect in named(svg, "part") + named(svg, "ghost"))
    assert used <= RIGHT + 0.01


def test_names_of_parts_never_touch():
    for state in states():
        places = [float(name.get("x")) for name in named(drawn(state), "name")]
        assert all(b - a >= 127.9 for a, b in itertools.pairwise(places))


def test_ticks_are_round_and_the_last_one_names_the_unit():
    for size in (1, 999, 15e6, 80e9, 635.5 * 2**30, 2.8e14):
        _, unit_bytes, scale = byte_scale(size)
        assert scale.high * unit_bytes >= size and 2 <= len(scale.ticks()) <= 8
        assert f"{scale.step:.0e}"[0] in "125"
    for state in states():
        first, *_, last = ["".join(tick.itertext()) for tick in named(drawn(state), "tick")]
        assert first == "0" and last.endswith(f" {byte_scale(state.total)[0]}")


def test_the_widget_starts_at_the_setting_that_was_asked_for():
    bar = memory_bar(model="llama-3.1-8b", weights="bf16", cache="expanded", context=4_096, batch=8, gpu="1 x H800")
    assert bar.state == MemoryState("llama-3.1-8b", "bf16", "expanded", 4_096, 8, "1 x H800")
    assert "memory-bar" in bar._dom_classes
    assert memory_bar(context=100_000, batch=3).state.context == 100_000


def test_every_control_is_labelled_and_shows_its_unit():
    controls = memory_bar().controls
    assert [c.description for c in controls.values()] == ["model", "weights", "cache", "gpu", "context", "batch"]
    assert [c.description for c in controls.values()] == list(controls)
    assert controls["context"].label == "131,072 tokens"
    assert [text for text, _ in controls["batch"].options][:2] == ["1 sequence", "2 sequences"]


def test_a_change_redraws_once_and_keeps_the_setting_before():
    bar, seen = memory_bar(), []
    bar.picture.observe(lambda event: seen.append(event["new"]), names="value")
    bar.controls["cache"].value = "expanded"
    assert (bar.state, bar.previous) == (BEFORE, NOW)
    assert len(seen) == 1
    assert ElementTree.fromstring(seen[0]).get("aria-label") == bar.summary() == summary(BEFORE, NOW)
    bar.controls["cache"].value = "expanded"
    bar._changed(None)
    assert len(seen) == 1 and bar.previous == NOW


def test_impossible_settings_are_explained_beside_the_controls_and_never_raise():
    bar = memory_bar()
    assert "One token leaves 70,272 bytes in the cache: latent 62,464, rope key 7,808." in bar.note.value
    bar.controls["cache"].value = "grouped"
    assert "Not possible." in bar.note.value
    assert "DeepSeek-V3 has no grouped heads: shown with latent." in bar.note.value
    assert "no difference" in bar.summary()
    for model, cache in itertools.product(MODEL_NAMES, CACHE_NAMES):
        bar.controls["model"].value, bar.controls["cache"].value = model, cache
        assert ("Not possible." in bar.note.value) == bool(bar.state.notes)


def test_without_a_kernel_the_widget_is_a_picture_and_a_line():
    bar = MemoryBar(NOW, BEFORE)
    bundle = bar._repr_mimebundle_()
    assert bundle["text/plain"] == summary(NOW, BEFORE)
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_the_last_child_keeps_the_keys_and_is_not_seen():
    rules = memory_bar().children[-1]
    assert rules.layout.display == "none"
    assert "closest('.memory-bar')" in rules.value and "data-lm-suppress-shortcuts" in rules.value
