"""A run that stops and goes on is the run that never stopped, bit for bit; anything else is refused."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import DENSE, RECIPE, SMALL, TEXT, batches, fresh

from deepseek_lab.model import apply_policy
from deepseek_lab.precision import PrecisionPolicy
from deepseek_lab.training import state as state_module
from deepseek_lab.training import train

V3, WIDE = PrecisionPolicy(), PrecisionPolicy(products="fp32")
TESTS = Path(__file__).resolve().parent.parent
CONFIGS = {"v3": SMALL, "llama": DENSE, "tied": DENSE.replace(model_type="qwen2", tie_word_embeddings=True)}


pytestmark = pytest.mark.usefixtures("one_thread")  # sums of several threads are not the same twice


@pytest.fixture(scope="module")
def uninterrupted(one_thread):
    """{config: (the losses, the weights at the end)} of runs that nobody stopped."""
    found = {}
    for name, config in CONFIGS.items():
        model = fresh(config)
        found[name] = ([r.loss for r in train(model, batches(), RECIPE)], model.state_dict())
    return found


def stopped(model, file, after, recipe=RECIPE, **settings):
    """The losses of a run that its reader leaves after so many steps."""
    run, losses = train(model, batches(), recipe, checkpoint=file, **settings), []
    for record in run:
        losses.append(record.loss)
        if len(losses) == after:
            break
    run.close()
    return losses


def equal(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def read(file) -> dict:
    """All that a checkpoint file holds, as bytes that can be compared."""
    return {path.name: path.read_bytes() for path in file.parent.iterdir()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stops", [[1], [5, 6], [11]])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, stops, tmp_path, uninterrupted):
    losses, file = stopped(fresh(CONFIGS[name]), tmp_path / "run.safetensors", stops[0]), tmp_path / "run.safetensors"
    for before, after in itertools.pairwise(stops):
        losses += stopped(fresh(CONFIGS[name], 9), file, after - before, resume=True)
    model = fresh(CONFIGS[name], seed=9)  # other weights: all must come from the file
    torch.rand(100)  # and other random numbers
    losses += [r.loss for r in train(model, batches(), RECIPE, checkpoint=file, resume=True)]
    assert losses == uninterrupted[name][0]
    assert equal(model.state_dict(), uninterrupted[name][1])
    assert list(train(fresh(CONFIGS[name], 9), batches(), RECIPE, checkpoint=file, resume=True)) == []


AHEAD = SMALL.replace(num_nextn_predict_layers=2)
EVERYTHING = dataclasses.replace(
    RECIPE, precision=V3, moments="bf16", ema_decay=0.8, recompute=("norms", "swiglu", "up-projections"),
    batch_ramp=(2, 5), constant_steps=2, tail=((9, 5e-4), (11, 1e-4)), balance_speed=((0, 0.02), (6, 0.005)),
    multi_token_weight=((0, 0.0), (2, 0.3), (7, 0.1)), sequence_loss=1e-2, weight_decay=0.2,
)  # fmt: skip
SETTINGS = {
    "everything": EVERYTHING,
    "fp32 moments": dataclasses.replace(EVERYTHING, moments="fp32", ema_decay=None, recompute=()),
    "no module": dataclasses.replace(EVERYTHING, multi_token_weight=0.0, precision=None),
    "module off later": dataclasses.replace(RECIPE, multi_token_weight=((0, 0.3), (5, 0.0)), ema_decay=0.9),
}


def seen(r) -> tuple:
    """All that a record says and a clock does not."""
    return (r.loss, r.multi_token_losses, r.balance_loss, r.gradient_norm, r.tokens, r.validation_loss, r.learning_rate,
            r.load.tolist(), r.bias.tolist(), r.bytes, r.flops)  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_with_every_setting_goes_on_bit_for_bit_wherever_it_stopped(name, tmp_path):
    settings, file = SETTINGS[name], tmp_path / "run.safetensors"
    more = dict(validation=TEXT[:200], validate_every=5)
    whole = fresh(AHEAD)
    expected = [seen(r) for r in train(whole, batches(), settings, **more)]
    got, model = [], fresh(AHEAD)
    for stop in (1, 2, 4, 7, 8, 11, 12):
        run = train(model, batches(), settings, checkpoint=file, checkpoint_every=3, resume=bool(got), **more)
        got += [seen(next(run)) for _ in range(stop - len(got))]
        run.close()
        model = fresh(AHEAD, seed=stop)  # other weights: all must come from the file
        torch.rand(stop)  # and other random numbers
    assert got == expected
    assert list(train(model, batches(), settings, checkpoint=file, resume=True)) == []
    assert equal(model.state_dict(), whole.state_dict())
    assert (model.average is None) == (settings.ema_decay is None) and equal(model.average or {}, whole.average or {})


def test_moments_that_a_file_lost_are_missed_unless_nothing_was_trained(tmp_path):
    file = tmp_path / "run.safetensors"
    stopped(fresh(AHEAD), file, 2)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    for lost in (["exp_avg.multi_token.0.enorm.weight"], [f"{k}.norm.weight" for k in state_module.MOMENTS]):
        save_file({name: t for name, t in tensors.items() if name not in lost}, file, metadata)
        with pytest.raises(ValueError, match=f"differ in {len(lost)} tensors"):
            next(train(fresh(AHEAD), batches(), RECIPE, checkpoint=file, resume=True))


def test_the_message_about_another_run_names_only_what_differs(tmp_path):
    file = tmp_path / "run.safetensors"
    stopped(fresh(SMALL), file, 1)
    for config, settings, what, then, now in (
        (SMALL, dict(learning_rate=4e-3), "recipe", "{'learning_rate': 0.005}", "{'learning_rate': 0.004}"),
        (SMALL, dict(moments="bf16"), "recipe", "none", "{'moments': 'bf16'}"),
        (SMALL.replace(rms_norm_eps=1e-5), {}, "config", "{'rms_norm_eps': 1e-06}", "{'rms_norm_eps': 1e-05}"),
    ):
        settings = dataclasses.replace(RECIPE, **settings)
        with pytest.raises(ValueError) as caught:
            next(train(fresh(config), batches(), settings, checkpoint=file, resume=True))
        assert str(caught.value) == f"{file} was written by a run with another {what}: {then}; this one has {now}"


def test_numbers_written_in_another_way_are_the_same_recipe(tmp_path):
    file, settings = tmp_path / "run.safetensors", dataclasses.replace(RECIPE, weight_decay=0, clip_norm=1)
    stopped(fresh(SMALL), file, 1, settings)
    same = dataclasses.replace(RECIPE, weight_decay=0.0, clip_norm=1.0)
    assert len(list(train(fresh(SMALL), batches(), same, checkpoint=file, resume=True))) == 11


@pytest.mark.parametrize(
    ("then", "now"),
    [(V3, WIDE), (WIDE, V3), (V3, V3.replace(wide=())), (V3, V3.replace(scale="ue8m0"))],
    ids=["narrow then wide", "wide then narrow", "more places", "other scales"],
)
def test_a_run_by_another_policy_is_refused(then, now, tmp_path):
    file = tmp_path / "run.safetensors"
    stopped(apply_policy(fresh(DENSE), then), file, 1)
    with pytest.raises(ValueError, match="written by a run with another policy"):
        next(train(apply_policy(fresh(DENSE), now), batches(), RECIPE, checkpoint=file, resume=True))
    assert len(stopped(apply_policy(fresh(DENSE), then), file, 1, resume=True)) == 1


def test_a_file_that_says_nothing_of_policies_is_one_of_a_plain_model(tmp_path):
    file = tmp_path / "run.safetensors"
    stopped(fresh(DENSE), file, 1)
    with safe_open(file, framework="pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != "policy"}
    save_file(load_file(file), file, metadata)
    assert len(stopped(fresh(DENSE), file, 1, resume=True)) == 1


def test_checkpoints_are_written_every_few_steps_and_at_the_end(tmp_path, monkeypatch):
    written = []
    save = state_module.save_file
    monkeypatch.setattr(
        state_module, "save_file", lambda t, path, metadata: written.append(metadata["done"]) or save(t, path, metadata)
    )
    list(train(fresh(SMALL), batches(), RECIPE, checkpoint=tmp_path / "new" / "run.safetensors", checkpoint_every=5))
    assert written == ["5", "10", "12"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.safetensors"]


def test_a_run_without_a_file_writes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(train(fresh(SMALL), batches(), RECIPE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(recipe=dataclasses.replace(RECIPE, learning_rate=4e-3)), "another recipe"),
        (dict(recipe=dataclasses.replace(RECIPE, steps=13)), "another recipe"),
        (dict(data=batches(TEXT[1:])), "another batches"),
        (dict(data=batches(seed=1)), "another batches"),
        (dict(data=batches(batch=5)), "another batches"),
        (dict(config=SMALL.replace(routed_scaling_factor=1.0)), "another config"),
        (dict(config=DENSE), "another config"),
    ],
)
def test_the_file_of_another_run_is_refused_before_anything_changes(change, words, tmp_path):
    file = tmp_path / "run.safetensors"
    stopped(fresh(SMALL), file, 4)
    model, before = fresh(change.get("config", SMALL), seed=9), read(file)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        next(train(model, change.get("data", batches()), change.get("recipe", RECIPE), checkpoint=file, resume=True))
    assert "run.safetensors" in str(caught.value)
    assert read(file) == before and equal(model.state_dict(), weights)


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "no header", "lost tensor", "extra tensor", "misshapen moment", "no record"]
)
def test_a_damaged_file_is_refused_before_anything_changes(damage, tmp_path):
    file, name = tmp_path / "run.safetensors", "exp_avg.layers.1.mlp.gate.weight"
    stopped(fresh(SMALL), file, 4)
    content, tensors = file.read_bytes(), load_file(file)
    with state_module.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "no header":
        file.write_bytes(content[8:])
    else:
        changes = {"lost tensor": {name: None}, "extra tensor": {"model.x": torch.ones(1)}, "no record": {}}
        tensors |= changes.get(damage, {name: tensors[name][:-1].clone()})
        kept = {name: t for name, t in tensors.items() if t is not None}
        save_file(kept, file, None if damage == "no record" else metadata)
    model, before = fresh(SMALL, seed=9), read(file)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"run\.safetensors"):
        next(train(model, batches(), RECIPE, checkpoint=file, resume=True))
    assert read(file) == before and equal(model.state_dict(), weights)
