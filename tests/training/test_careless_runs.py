"""What a careless or unlucky run does not break: the file of its last good step, other people's runs, the balance."""

import itertools

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import RECIPE, SMALL, TEXT, batches, fresh

from deepseek_lab.training import Recipe, evaluate, train


def done(file) -> int:
    with safe_open(file, framework="pt") as opened:
        return int(opened.metadata()["done"])


def test_a_run_that_diverges_keeps_the_file_of_an_earlier_step(tmp_path):
    model, file = fresh(SMALL), tmp_path / "run.safetensors"
    with pytest.raises(ValueError, match="the loss of step 7 is nan"):
        for record in train(model, batches(), RECIPE, checkpoint=file, checkpoint_every=5):
            if record.step == 6:
                model.norm.weight.data.fill_(float("nan"))
    assert done(file) == 5
    assert all(torch.isfinite(t).all() for t in load_file(file).values())
    assert len(list(train(fresh(SMALL), batches(), RECIPE, checkpoint=file, resume=True))) == RECIPE.steps - 5


def test_a_forgotten_run_does_not_overwrite_the_file_of_the_one_that_came_after(tmp_path):
    model, file = fresh(SMALL), tmp_path / "run.safetensors"
    forgotten = train(model, batches(), RECIPE, checkpoint=file)
    for _ in range(3):
        next(forgotten)
    list(train(model, batches(), RECIPE, checkpoint=file))
    forgotten.close()
    assert done(file) == RECIPE.steps


def test_an_older_run_cannot_go_on_once_another_has_begun():
    model = fresh(SMALL)
    older = train(model, batches(), RECIPE)
    next(older)
    next(train(model, batches(), RECIPE))
    with pytest.raises(ValueError, match="another train"):
        next(older)


@pytest.mark.parametrize("setting", [
    {"balance_speed": float("nan")}, {"clip_norm": float("inf")}, {"learning_rate": float("inf")},
    {"weight_decay": float("nan")}, {"weight_decay": -5.0}, {"betas": (0.9, float("nan"))}, {"steps": 2.5},
], ids=str)  # fmt: skip
def test_a_recipe_that_is_no_recipe_names_the_setting(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Recipe(**{"steps": 4, **setting})


@pytest.mark.parametrize(("settings", "words"), [
    ({"checkpoint": "."}, "is a directory"), ({"checkpoint_every": 0}, "checkpoint_every=0"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused_before_the_first_step(settings, words):
    model = fresh(SMALL)
    before = model.norm.weight.clone()
    with pytest.raises(ValueError, match=words):
        next(train(model, batches(), RECIPE, **settings))
    assert torch.equal(model.norm.weight, before)


def test_training_without_gradients_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        next(train(fresh(SMALL), batches(), RECIPE))


def test_frozen_weights_stay_and_their_run_can_be_resumed(tmp_path):
    def model():
        frozen = fresh(SMALL)
        frozen.embed_tokens.weight.requires_grad_(False)
        return frozen

    first, file = model(), tmp_path / "run.safetensors"
    list(itertools.islice(train(first, batches(), RECIPE, checkpoint=file), 4))
    assert torch.equal(first.embed_tokens.weight, fresh(SMALL).embed_tokens.weight)
    assert [r.step for r in train(model(), batches(), RECIPE, checkpoint=file, resume=True)] == list(range(4, 12))


@pytest.mark.parametrize("steps", [None, "many", "0", "13"])
def test_a_file_that_does_not_say_how_far_it_got_changes_nothing(steps, tmp_path):
    file = tmp_path / "run.safetensors"
    list(itertools.islice(train(fresh(SMALL), batches(), RECIPE, checkpoint=file), 4))
    with safe_open(file, framework="pt") as opened:
        metadata = {**opened.metadata(), "done": steps}
    save_file(load_file(file), file, metadata={k: v for k, v in metadata.items() if v is not None})
    model = fresh(SMALL, seed=5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="steps"):
        next(train(model, batches(), RECIPE, checkpoint=file, resume=True))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_file_of_another_precision_changes_nothing(tmp_path):
    file = tmp_path / "run.safetensors"
    list(itertools.islice(train(fresh(SMALL), batches(), RECIPE, checkpoint=file), 4))
    model = fresh(SMALL, seed=5).double()
    before = model.norm.weight.clone()
    with pytest.raises(ValueError, match=r"this run needs torch\.float64"):
        next(train(model, batches(), RECIPE, checkpoint=file, resume=True))
    assert torch.equal(model.norm.weight, before)


def test_biases_of_a_bf16_model_still_move_by_a_thousandth():
    model = fresh(SMALL).bfloat16()
    bias = model.expert_layers()[0].gate.e_score_correction_bias
    bias.copy_(torch.linspace(0.5, 1.0, 8))
    before = bias.clone()
    list(train(model, batches(), Recipe(steps=1, balance_speed=0.001)))
    assert bias.dtype == torch.float32
    assert ((bias - before).abs() < 0.0011).all() and not torch.equal(bias, before)


@pytest.mark.parametrize("sizes", [{"length": 0}, {"batch": 0}], ids=str)
def test_evaluating_with_a_size_of_zero_is_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(fresh(SMALL), TEXT, **{"length": 24, **sizes})
