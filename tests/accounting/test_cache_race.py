"""Five caches of one model: bytes per token as published or by their shapes, and the first token that does not fit."""

import pytest

from deepseek_lab import facts
from deepseek_lab.accounting import weights
from deepseek_lab.accounting.cache_race import KINDS, CacheRace
from deepseek_lab.presets import PRESETS


def test_what_a_token_of_v3_leaves_in_each_kind():
    race = CacheRace()
    layers = 61
    assert {kind: race.ledger(kind, 1).total for kind in KINDS} == {
        "MHA": layers * 2 * 128 * 128 * 2,
        "GQA-8": layers * 2 * 8 * 128 * 2,
        "MQA": layers * 2 * 128 * 2,
        "MLA": facts.V3_CACHE_PER_TOKEN.value,
        "MLA-FP8": layers * facts.FP8_LATENT_PER_TOKEN_AND_LAYER.value,
    }


@pytest.mark.parametrize("race", [CacheRace(), CacheRace(batch=77), CacheRace("deepseek-v2-lite", "1 x RTX 4090", 3)])
def test_the_last_token_fits_and_the_next_does_not(race):
    count, name = race.gpu.split(" x ")
    room = int(count) * facts.GPU_MEMORY[name].value - weights(PRESETS[race.model], "fp8").total
    assert race.room == room > 0
    for kind in KINDS:
        last = race.runs_out(kind)
        assert race.ledger(kind, last).total <= room < race.ledger(kind, last + 1).total


def test_gpus_that_the_weights_alone_fill_have_no_room():
    race = CacheRace(gpu="8 x H800")
    assert race.room == 0 and {race.runs_out(kind) for kind in KINDS} == {0}


@pytest.mark.parametrize(("model", "prompt"), [("deepseek-v3", 4_096), ("deepseek-v3", 163_839), ("tiny", 100)])
def test_the_steps_are_the_prompt_then_single_tokens_then_the_rest(model, prompt):
    steps, limit = CacheRace(model, prompt=prompt).steps, PRESETS[model].max_position_embeddings
    assert steps[:2] == (0, prompt) and list(steps) == sorted(set(steps)) and steps[-1] == limit
    assert set(range(prompt, min(prompt + 4, limit))) <= set(steps)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(model="llama-3.1-8b"), "'llama-3.1-8b' has no latent attention"),
        (dict(model="gpt"), "model='gpt' is unknown"),
        (dict(gpu="1 x abacus"), "gpu='1 x abacus' is unknown"),
        (dict(batch=0), "batch=0"),
        (dict(prompt=0), "prompt=0; choose a whole number from 1 to 163,839"),
        (dict(prompt=163_840), "prompt=163840"),
    ],
)
def test_what_cannot_race_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        CacheRace(**settings)
