"""A recipe's schedules are the published ones, what makes no recipe is refused by name, and JSON keeps all of it."""

import dataclasses
import itertools
import json

import numpy
import pytest
import torch

from deepseek_lab.precision import E5M2, PrecisionPolicy
from deepseek_lab.training import Recipe

TOKENS_PER_STEP = 15_360 * 4096  # DeepSeek-V3, section 4.2
V3 = Recipe(
    steps=round(14.8e12 / TOKENS_PER_STEP), learning_rate=2.2e-4, final_learning_rate=2.2e-5, warmup_steps=2000,
    constant_steps=round(10e12 / TOKENS_PER_STEP) - 2000,
    tail=((round(14.3e12 / TOKENS_PER_STEP), 2.2e-5), (round(14.633e12 / TOKENS_PER_STEP), 7.3e-6)),
    multi_token_weight=((0, 0.3), (round(10e12 / TOKENS_PER_STEP), 0.1)),
    balance_speed=((0, 0.001), (round(14.3e12 / TOKENS_PER_STEP), 0.0)),
)  # fmt: skip
EVERYTHING = dict(
    steps=40, learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=4, constant_steps=6,
    tail=((30, 1e-3), (35, 3e-4)), batch_ramp=(2, 5), betas=(0.8, 0.9), weight_decay=0.2, clip_norm=0.7, moments="bf16",
    recompute=("swiglu", "norms"),
    precision=PrecisionPolicy(gradients="block", gradient_format=E5M2, wide=("head", "gate")), ema_decay=0.9,
    multi_token_weight=((0, 0.3), (12, 0.1)), balance_speed=((0, 0.02), (30, 0.0)), balance_rule="proportional",
    sequence_loss=1e-4, expert_loss=0.1, device_loss=0.2, communication_loss=0.3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("trillions", "rate"),
    [(5, 2.2e-4), (10, 2.2e-4), (11, 1.94732e-4), (12, 1.31828e-4), (12.15, 1.21e-4), (13, 6.33960e-5),
     (14, 2.43685e-5), (14.5, 2.2e-5), (14.7, 7.3e-6)],
)  # fmt: skip
def test_the_published_learning_rate_comes_out(trillions, rate):
    got = V3.learning_rate_at(round(trillions * 1e12 / TOKENS_PER_STEP))
    assert got == pytest.approx(rate, rel=5e-5)  # a step more or less moves it by 6e-5 at 13 trillion


def test_every_stretch_of_the_learning_rate_begins_where_the_one_before_ends():
    recipe = Recipe(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, constant_steps=10,
                    tail=((54, 0.1), (80, 0.02)))  # fmt: skip
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:15] == [1.0] * 11  # the cosine begins at 1
    assert all(a > b for a, b in itertools.pairwise(rates[14:54]))
    assert rates[34] == pytest.approx(0.55) and rates[53] == pytest.approx(0.1, rel=0.02)
    assert rates[54:80] == [0.1] * 26 and rates[80:] == [0.02] * 20


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1e-4), (4, 5e-4), (9, 1e-3), (10, 1e-3), (60, 5.5e-4), (35, 8.681980515339464e-4), (110, 1e-4), (500, 1e-4)],
)
def test_the_learning_rate_warms_up_and_falls_along_a_cosine(step, rate):
    recipe = Recipe(steps=110, learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=10)
    assert recipe.learning_rate_at(step) == pytest.approx(rate)


def test_a_run_shorter_than_its_warm_up_and_one_without_are_runs():
    assert Recipe(steps=1, warmup_steps=0).learning_rate_at(0) == pytest.approx(3e-3)
    assert Recipe(steps=2, warmup_steps=10).learning_rate_at(1) == pytest.approx(6e-4)
    assert Recipe(steps=5, warmup_steps=0, constant_steps=9).learning_rate_at(4) == pytest.approx(3e-3)


@pytest.mark.parametrize("name", ["balance_speed", "multi_token_weight"])
def test_a_schedule_holds_each_value_from_its_step_on(name):
    recipe, at = Recipe(steps=9, **{name: ((0, 0.3), (3, 0.0), (7, 0.1))}), f"{name}_at"
    assert [getattr(recipe, at)(step) for step in range(9)] == [0.3] * 3 + [0.0] * 4 + [0.1] * 2
    assert getattr(Recipe(steps=9, **{name: 0.25}), at)(8) == 0.25
    second = round(10e12 / TOKENS_PER_STEP)
    assert [V3.multi_token_weight_at(second - 1), V3.multi_token_weight_at(second)] == [0.3, 0.1]
    assert [V3.balance_speed_at(second), V3.balance_speed_at(V3.steps - 1)] == [0.001, 0.0]


def test_a_batch_grows_evenly_from_its_first_size_to_the_whole():
    recipe = Recipe(steps=20, batch_ramp=(2, 6))
    assert [recipe.batch_at(step, 8) for step in range(9)] == [2, 3, 4, 5, 6, 7, 8, 8, 8]
    assert [Recipe(steps=20).batch_at(step, 8) for step in (0, 19)] == [8, 8]
    assert [Recipe(steps=20, batch_ramp=(3, 1)).batch_at(step, 8) for step in range(3)] == [3, 8, 8]
    v3 = Recipe(steps=V3.steps, batch_ramp=(3072, round(469e9 / TOKENS_PER_STEP)))
    assert (v3.batch_at(0, 15_360), v3.batch_at(8000, 15_360)) == (3072, 15_360)


def test_settings_survive_json():
    for recipe in (
        V3,
        Recipe(steps=3),
        Recipe(**EVERYTHING),
        Recipe(steps=3, recompute=(), precision=PrecisionPolicy()),
    ):
        text = json.dumps(recipe.settings())
        assert Recipe(**json.loads(text)) == recipe
        assert json.dumps(Recipe(**json.loads(text)).settings()) == text


def test_every_setting_that_is_not_the_default_is_among_the_settings():
    assert set(EVERYTHING) == {field.name for field in dataclasses.fields(Recipe)}
    assert set(Recipe(**EVERYTHING).settings()) == set(EVERYTHING)
    oldest = {"steps", "learning_rate", "final_learning_rate", "warmup_steps", "betas", "weight_decay", "clip_norm",
              "balance_speed"}  # fmt: skip
    assert set(Recipe(steps=3).settings()) == oldest  # the text of older files


def test_lists_and_numbers_of_numpy_are_what_they_say():
    given = Recipe(steps=numpy.int64(40), learning_rate=numpy.float32(0.5), betas=[0.9, 0.95], balance_speed=[[0, 1]],
                   tail=[[30, 0.1], (35, 0.01)], warmup_steps=3, batch_ramp=[2, numpy.int32(4)], recompute={"norms"}
                   )  # fmt: skip
    plain = Recipe(steps=40, learning_rate=0.5, tail=((30, 0.1), (35, 0.01)), warmup_steps=3, batch_ramp=(2, 4),
                   recompute=("norms",), balance_speed=((0, 1),))  # fmt: skip
    assert given == plain and hash(given) == hash(plain)
    assert json.dumps(given.settings()) == json.dumps(plain.settings())


NUMBERS = (
    "steps", "learning_rate", "final_learning_rate", "warmup_steps", "constant_steps", "weight_decay", "clip_norm",
    "multi_token_weight", "balance_speed", "sequence_loss", "expert_loss", "device_loss", "communication_loss",
)  # fmt: skip


@pytest.mark.parametrize("value", ["0.1", None, True, float("nan"), -1, [1.0], torch.tensor(0.5)], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_possible_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        Recipe(**{"steps": 60, name: value})


@pytest.mark.parametrize("settings", [
    dict(steps=0), dict(steps=2.5), dict(warmup_steps=2.5), dict(constant_steps=1.0), dict(final_learning_rate=1.0),
    dict(clip_norm=0.0), dict(balance_speed=-0.1), dict(moments="fp8"), dict(balance_rule=["sign"]),
    dict(ema_decay=1.0), dict(ema_decay=0.0), dict(ema_decay="0.9"), dict(ema_decay=(0.9,)), dict(betas=0.9),
    dict(betas=(0.9,)), dict(betas=(0.9, 1.0)), dict(betas="ab"), dict(betas=(1, 2, 3)), dict(betas=((0.9,), 0)),
    dict(batch_ramp=4), dict(batch_ramp=(0, 5)), dict(batch_ramp=(2, 0)), dict(batch_ramp=(2, 2.5)),
    dict(batch_ramp=(1, 2, 3)), dict(batch_ramp="12"), dict(batch_ramp=((1, 2), 3)),
], ids=str)  # fmt: skip
def test_impossible_recipes_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Recipe(**{"steps": 60, **settings})


@pytest.mark.parametrize("value", [
    ((1, 0.3),), ((0, 0.3), (5, -0.1)), ((0, 0.3), (0, 0.1)), ((0, 0.3), (9, 0.1), (5, 0.0)), ((0, 0.3, 1),), (0, 0.3),
    (), ((0.0, 0.3),), ((0, "a"),), ((0, None),), ((0, float("inf")),), ((0, (1, 2)),), (("0", 0.3),), {0: 0.3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["balance_speed", "multi_token_weight"])
def test_what_is_no_schedule_is_refused(name, value):
    with pytest.raises(ValueError, match=f"Recipe got {name}="):
        Recipe(steps=60, **{name: value})


@pytest.mark.parametrize("tail", [
    ((60, 1e-4),), ((55, 1e-4), (60, 1e-5)), ((7, 1e-4),), ((20, 1e-4), (15, 1e-5)), ((20, -1e-4),), 20, ((20,),),
], ids=str)  # fmt: skip
def test_a_tail_that_never_comes_or_comes_too_early_is_refused(tail):
    with pytest.raises(ValueError, match="Recipe got tail="):
        Recipe(steps=60, warmup_steps=3, constant_steps=5, tail=tail)
    assert Recipe(steps=60, warmup_steps=3, constant_steps=5, tail=((8, 1e-4),)).learning_rate_at(8) == 1e-4


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(TypeError, match="Recipe got 'fp8'; pass a PrecisionPolicy"):
        Recipe(steps=3, precision="fp8")
    with pytest.raises(ValueError, match="products='fp9'"):
        Recipe(steps=3, precision={"products": "fp9"})
    with pytest.raises(TypeError, match="recompute='norms'"):
        Recipe(steps=3, recompute="norms")
    with pytest.raises(ValueError, match="recompute has 'norm'"):
        Recipe(steps=3, recompute=["norm"])
