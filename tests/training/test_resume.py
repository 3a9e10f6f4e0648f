"""A run that stops and goes on is the run that never stopped, bit for bit; anything else is refused."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
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


def stopped(model, file, after, **settings):
    """The losses of a run that its reader leaves after so many steps."""
    run, losses = train(model, batches(), RECIPE, checkpoint=file, **settings), []
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


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """A shell makes what it starts in the background deaf to Ctrl-C, these tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


INTERRUPTED = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
from training_runs import *
from deepseek_lab.training import train
try:
    for record in train(fresh(SMALL), batches(), dataclasses.replace(RECIPE, steps=100_000), checkpoint=sys.argv[1]):
        print(record.loss.hex(), flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_leaves_a_file_from_which_another_process_goes_on(tmp_path):
    file, recipe = tmp_path / "run.safetensors", dataclasses.replace(RECIPE, steps=100_000)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-c", "import dataclasses\n" + INTERRUPTED, str(file)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True) as child:
        lines = [child.stdout.readline() for _ in range(7)]
        child.send_signal(signal.SIGINT)
        lines += child.stdout.readlines()
    assert lines[-1] == "interrupted\n" and child.returncode == 0
    theirs = [float.fromhex(line) for line in lines[:-1]]
    ours = [r.loss for r, _ in zip(train(fresh(SMALL), batches(), recipe), range(len(theirs) + 3), strict=False)]
    resumed = train(fresh(SMALL, seed=9), batches(), recipe, checkpoint=file, resume=True)
    first = next(resumed)
    # A step whose record was not printed any more may be in the file, a printed one always is.
    assert first.step in (len(theirs), len(theirs) + 1)
    assert [*theirs, first.loss, next(resumed).loss] == ours[: len(theirs)] + ours[first.step : first.step + 2]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_within_a_step_never_leaves_half_a_step(presses, tmp_path, uninterrupted):
    file, model = tmp_path / "run.safetensors", fresh(SMALL)
    run = train(model, batches(), RECIPE, checkpoint=file, checkpoint_every=4)
    losses = [next(run).loss for _ in range(5)]
    hook = model.layers[1].register_forward_hook(
        lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(presses)] and None
    )
    with pytest.raises(KeyboardInterrupt):
        next(run)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    done = 6 if presses == 1 else 4  # a second one does not wait for the step, and the file of step 4 stays
    again = fresh(SMALL, seed=9)
    losses[done:] = [r.loss for r in train(again, batches(), RECIPE, checkpoint=file, resume=True)]
    expected = uninterrupted["v3"][0]
    assert losses == (expected[:5] + expected[6:] if presses == 1 else expected)
    assert equal(again.state_dict(), uninterrupted["v3"][1])


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


def test_a_save_that_fails_leaves_the_last_file(tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    stopped(fresh(SMALL), file, 4)
    before = read(file)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(state_module, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        list(train(fresh(SMALL), batches(), RECIPE, checkpoint=file, resume=True))
    assert read(file) == before
