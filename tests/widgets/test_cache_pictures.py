"""The three widgets on caches show the sheet of what their controls say, are labelled, and leave a picture behind."""

import xml.etree.ElementTree as ElementTree

import ipywidgets
import pytest
import torch

from deepseek_lab.accounting.cache_race import CacheRace
from deepseek_lab.attention import BlockPool, PagedCache, pool_step
from deepseek_lab.plots.absorption import absorption_sheet
from deepseek_lab.plots.cache_race import race_sheet
from deepseek_lab.plots.paged import paged_sheet
from deepseek_lab.presets import PRESETS
from deepseek_lab.widgets import absorption_explorer, cache_race, paged_cache


def steps():
    config = PRESETS["tiny"]
    pool = BlockPool(config, 6, 4)
    out, cache = [pool_step(pool, "nothing")], PagedCache(pool)
    cache.append(torch.ones(1, 10, config.latent_width))
    out.append(pool_step(pool, "append 10"))
    cache.fork()
    return [*out, pool_step(pool, "fork")]


def shown(widget):
    label = ElementTree.fromstring(widget.picture.value).get("aria-label")
    assert label == widget.summary()
    return label


def test_the_race_begins_before_the_prompt_and_follows_its_controls():
    widget = cache_race(batch=3, prompt=1_000)
    race = CacheRace(batch=3, prompt=1_000)
    assert shown(widget) == race_sheet(race, 0).label
    for tokens, (words, value) in zip(race.steps, widget.controls["tokens"].options, strict=True):
        assert value == tokens and words == (f"1,000 + {tokens - 1_000:,}" if tokens else "nothing read")
        widget.controls["tokens"].value = tokens
        assert shown(widget) == race_sheet(race, tokens).label
    widget.controls["gpu"].value = "16 x H800"
    widget.controls["batch"].value = 64
    assert shown(widget) == race_sheet(CacheRace("deepseek-v3", "16 x H800", 64, 1_000), race.steps[-1]).label


def test_the_race_may_begin_at_any_of_its_steps_and_at_no_other_place():
    assert shown(cache_race(batch=3, tokens=65_536)) == race_sheet(CacheRace(batch=3), 65_536).label
    with pytest.raises(ValueError, match="tokens=5 is no step of this race; choose one of 0, 4096"):
        cache_race(tokens=5)


def test_the_absorption_explorer_follows_its_four_controls():
    widget, config = absorption_explorer(heads=96, latent=500), PRESETS["deepseek-v3"]
    assert 96 in [value for _, value in widget.controls["heads"].options]
    for name, value in {"context": 1, "batch": 8, "heads": 16, "latent": 2_048}.items():
        widget.controls[name].value = value
    shape = config.replace(num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=2_048)
    assert shown(widget) == absorption_sheet(shape, 1, 8).label
    assert widget.controls["context"].label == "1 token" and widget.controls["heads"].label == "16 heads"
    for model in ("llama-3.1-8b", "gpt"):
        with pytest.raises(ValueError, match=f"model='{model}' has no latent attention; choose one of deepseek-v3"):
            absorption_explorer(model)
    for size in ("context", "batch", "heads", "latent"):
        with pytest.raises(ValueError, match="=0"):
            absorption_explorer(**{size: 0})


def test_the_paged_cache_goes_through_its_operations():
    trace = steps()
    widget = paged_cache(trace)
    for number in range(3):
        widget.controls["number"].value = number
        assert shown(widget) == paged_sheet(trace, number).label
    assert "3 of 3: fork" in paged_cache(trace, 2).summary()
    with pytest.raises(ValueError, match="got 0 steps"):
        paged_cache([])


@pytest.mark.parametrize("make", [cache_race, absorption_explorer, lambda: paged_cache(steps())])
def test_controls_are_labelled_and_the_bundle_has_a_picture_and_a_line(make):
    widget = make()
    assert all(control.description for control in widget.controls.values())
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and bundle["image/png"].startswith(b"\x89PNG")


def test_a_player_reaches_every_step():
    for widget, name in ((cache_race(), "tokens"), (paged_cache(steps(), 1), "number")):
        (play,) = (child for child in widget.children if isinstance(child, ipywidgets.Play))
        slider = widget.controls[name]
        assert (play.min, play.max, play.value) == (0, len(slider.options) - 1, slider.index)
