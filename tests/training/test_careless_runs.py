"""What a careless or unlucky run does not break: the file of its last good step, other people's runs, the balance."""

import copy
import dataclasses
import itertools

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import RECIPE, SMALL, TEXT, batches, fresh

from deepseek_lab.training import Recipe, averaged, evaluate, next_token_loss, train

AHEAD = SMALL.replace(num_nextn_predict_layers=2)


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
    ({"checkpoint_every": 2.5}, r"checkpoint_every=2\.5"), ({"validate_every": "2"}, "validate_every='2'"),
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


def test_gradients_that_somebody_left_or_switched_off_change_nothing():
    plain, model = [r.loss for r in train(fresh(SMALL), batches(), RECIPE)], fresh(SMALL)
    next_token_loss(model, batches()[5]).backward()
    run, losses = train(model, batches(), RECIPE), []
    for step in range(RECIPE.steps):
        with torch.set_grad_enabled(step < 3 or step % 2 == 0):
            losses.append(next(run).loss)
        if step % 3 == 0:
            next_token_loss(model, batches()[5]).backward()
    assert losses == plain


def test_a_model_that_somebody_put_in_evaluation_mode_is_trained_in_training_mode():
    model = fresh(SMALL)
    model.expert_layers()[0].capacity_factor = 1.0
    run, dropped = train(model, batches(), RECIPE), []
    for _ in run:
        dropped.append(model.expert_layers()[0].dropped)
        model.eval()
    assert all(dropped)


def test_a_copy_made_in_the_middle_of_a_run_is_a_model_of_its_own():
    settings = dataclasses.replace(RECIPE, ema_decay=0.9)
    model = fresh(SMALL)
    run = train(model, batches(), settings)
    next(run)
    other = copy.deepcopy(model)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    theirs = [r.loss for r in run]
    assert theirs == [r.loss for r in train(fresh(SMALL), batches(), settings)][1:]
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())
    with averaged(other):
        assert torch.equal(other.norm.weight, before["norm.weight"])  # the mean of one step
    assert len(list(train(other, batches(), settings))) == RECIPE.steps


def test_only_the_prediction_modules_can_be_trained():
    model = fresh(AHEAD).requires_grad_(False)
    model.multi_token.requires_grad_(True)
    own, plain = model.norm.weight.clone(), next_token_loss(model, batches()[0]).item()
    settings = dataclasses.replace(RECIPE, moments="bf16", recompute=("norms", "swiglu"))
    records = list(train(model, batches(), settings))
    assert records[-1].multi_token_losses[0] < records[0].multi_token_losses[0] - 0.3
    assert records[0].loss == plain and torch.equal(model.norm.weight, own)
    moved = sum(p.numel() for p in model.multi_token.parameters())
    assert records[0].bytes["gradients"] == records[0].bytes["moments"] == 4 * moved


@pytest.mark.parametrize(("swap", "words"), [
    (0, "got ModelConfig; expected a Transformer"), (1, "got list; expected a Batches"),
    (2, "got dict; expected a Recipe"),
])  # fmt: skip
def test_arguments_of_another_kind_are_refused_by_name(swap, words):
    arguments = [fresh(SMALL), batches(), RECIPE]
    arguments[swap] = [SMALL, [TEXT], RECIPE.settings()][swap]
    with pytest.raises(TypeError, match=words):
        next(train(*arguments))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_a_text_of_any_whole_type_is_the_same_text(dtype):
    text = TEXT.to(dtype)
    records = list(itertools.islice(train(fresh(SMALL), batches(text), RECIPE, validation=text, validate_every=1), 2))
    same = itertools.islice(train(fresh(SMALL), batches(), RECIPE, validation=TEXT, validate_every=1), 2)
    assert [(r.loss, r.validation_loss) for r in records] == [(r.loss, r.validation_loss) for r in same]


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="all frozen"):
        next(train(fresh(SMALL).requires_grad_(False), batches(), RECIPE))


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
