"""Ctrl-C at any moment: nothing is lost, and the message says how to go on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_runs import RECIPE, SMALL, TEXT, batches, fresh

from deepseek_lab.training import loop, train
from deepseek_lab.training import state as state_module
from deepseek_lab.training.optimizer import NarrowAdamW

pytestmark = pytest.mark.usefixtures("one_thread")  # sums of several threads are not the same twice
TESTS = Path(__file__).resolve().parent.parent
LONG = dataclasses.replace(RECIPE, ema_decay=0.9, moments="bf16", sequence_loss=1e-3)


@pytest.fixture(scope="module")
def uninterrupted(one_thread):
    """(the losses, the weights at the end, their mean) of a run that nobody stopped"""
    model = fresh(SMALL)
    return [r.loss for r in train(model, batches(), LONG)], model.state_dict(), model.average


def equal(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def done(file) -> int:
    with safe_open(file, framework="pt") as opened:
        return int(opened.metadata()["done"])


def goes_on(file, uninterrupted) -> bool:
    """Whether the run of a file ends as the one that nobody stopped, bit for bit."""
    model, first = fresh(SMALL, seed=9), done(file)
    losses = [r.loss for r in train(model, batches(), LONG, checkpoint=file, resume=True)]
    same = equal(model.state_dict(), uninterrupted[1]) and equal(model.average, uninterrupted[2])
    return losses == uninterrupted[0][first:] and same


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


def press(presses: int):
    """A function that presses Ctrl-C when it is first called, and whatever it is given it answers None."""
    left = [presses]

    def pressing(*_):
        while left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)

    return pressing


def during(what: str, model, monkeypatch, action) -> None:
    """Let an action happen in the middle of a part of the sixth step, the one that the test is about."""
    if what == "forward":
        model.layers[1].register_forward_hook(action)
    elif what == "backward":
        model.layers[1].register_full_backward_hook(action)
    elif what == "optimiser":
        step = NarrowAdamW.step

        def in_two(self):
            groups = self.param_groups
            for self.param_groups in ([group] for group in groups):  # the matrices, the vectors
                step(self)
                action()
            self.param_groups = groups

        monkeypatch.setattr(NarrowAdamW, "step", in_two)
    else:
        name = {"mean": "move_average", "bias": "rebalance", "validation": "evaluate"}.get(what)
        owner, name = (state_module, "save_file") if what == "write" else (loop, name)
        original = getattr(owner, name)

        def pressed(*args, **named):
            action()
            return original(*args, **named)

        monkeypatch.setattr(owner, name, pressed)


PARTS = ("forward", "backward", "optimiser", "mean", "bias", "write", "validation")


@pytest.mark.parametrize("presses", [1, 2, 5])
@pytest.mark.parametrize("what", PARTS)
def test_ctrl_c_loses_no_step(what, presses, tmp_path, monkeypatch, uninterrupted):
    file, model = tmp_path / "run.safetensors", fresh(SMALL)
    run = train(model, batches(), LONG, file, checkpoint_every=2, validation=TEXT[:100], validate_every=6)
    losses = [next(run).loss for _ in range(5)]
    during(what, model, monkeypatch, press(presses))
    early = presses > 1 and what in ("forward", "backward")  # gradients are lost, the step is not taken
    with pytest.raises(KeyboardInterrupt) as caught:
        next(run)
    steps = 5 if early else 6
    assert str(caught.value) == f"stopped after {steps} steps, all in {file}; go on with train(..., resume=True)"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    assert done(file) == steps and losses == uninterrupted[0][:5]
    assert not model.training and all(p.grad is None for p in model.parameters())
    monkeypatch.undo()
    assert goes_on(file, uninterrupted)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_before_the_first_step_is_done_says_so(presses, tmp_path):
    file, model = tmp_path / "run.safetensors", fresh(SMALL)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.layers[0].register_forward_hook(press(presses))
    with pytest.raises(KeyboardInterrupt) as caught:
        next(train(model, batches(), LONG, checkpoint=file))
    if presses == 1:
        assert "stopped after 1 steps, all in" in str(caught.value) and done(file) == 1
    else:
        assert "stopped before the first step was done, nothing has changed" in str(caught.value)
        assert not file.exists() and equal(model.state_dict(), before)


def test_without_a_file_the_message_says_what_the_model_has():
    model = fresh(SMALL)
    run = train(model, batches(), LONG)
    next(run)
    model.layers[0].register_forward_hook(press(1))
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped after 2 steps, which the model keeps; with train\(\.\.\., checkp"
    ):
        next(run)


def test_ctrl_c_while_the_last_file_is_written_waits_for_it(tmp_path, monkeypatch):
    file, model = tmp_path / "run.safetensors", fresh(SMALL)
    run = train(model, batches(), LONG, checkpoint=file)
    for _ in range(3):
        next(run)
    during("write", model, monkeypatch, press(3))
    with pytest.raises(KeyboardInterrupt, match="stopped after 3 steps, all in"):
        run.close()  # as when a loop is left by `break`
    assert done(file) == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_between_two_steps_leaves_a_file(tmp_path, uninterrupted):
    file = tmp_path / "run.safetensors"

    def reader():
        for record in train(fresh(SMALL), batches(), LONG, checkpoint=file):
            if record.step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        reader()
    assert done(file) == 8 and goes_on(file, uninterrupted)


RANDOM = """
import json, os, pathlib, random, signal, sys
import torch
torch.set_num_threads(1)
from training_runs import *
from deepseek_lab.training import train

presses, moments, file = int(sys.argv[1]), random.Random(sys.argv[1]), pathlib.Path(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)

def alarm(*_):
    global left
    if left > 0:
        left -= 1
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-4, 5e-3) if left else 0)
        os.kill(os.getpid(), signal.SIGINT)

def run(model, **more):
    return train(model, batches(), RECIPE, checkpoint=file, checkpoint_every=3, **more)

def weights(model):
    return [t.clone() for t in model.state_dict().values()]

signal.signal(signal.SIGALRM, alarm)
left, model = 0, fresh(SMALL)
losses = [r.loss for r in run(model)]
expected, stops = weights(model), []
for number in range(20):
    model, seen = fresh(SMALL), 0
    file.unlink(missing_ok=True)
    try:
        left = presses
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.15))
        for record in run(model):
            seen = record.step + 1
        left = 0
    except KeyboardInterrupt as error:
        left, words = 0, str(error)
    else:
        words = "not interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and torch.is_grad_enabled()
    done = 0
    if file.exists():
        model = fresh(SMALL, seed=9)
        rest = [r.loss for r in run(model, resume=True)]
        done = 12 - len(rest)
        assert rest == losses[done:] and all(map(torch.equal, weights(model), expected))
    assert seen <= done and (f"after {done} steps" in words or done in (0, 12) or not words), (seen, done, words)
    assert os.listdir(file.parent) in ([file.name], [])
    stops.append(done)
print(json.dumps(stops))
"""


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_ctrl_c_at_random_moments_loses_nothing(presses, tmp_path):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANDOM, str(presses), str(tmp_path / "run.safetensors")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(set(json.loads(found.stdout))) > 3  # interrupted at many places


def test_a_job_that_is_deaf_to_ctrl_c_stays_deaf(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    model = fresh(SMALL)
    model.layers[0].register_forward_hook(press(2))
    assert len(list(train(model, batches(), RECIPE))) == RECIPE.steps
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_in_another_thread_trains_and_hears_no_ctrl_c():
    found = []
    thread = threading.Thread(target=lambda: found.extend(r.loss for r in train(fresh(SMALL), batches(), RECIPE)))
    thread.start()
    thread.join()
    assert found == [r.loss for r in train(fresh(SMALL), batches(), RECIPE)]


def test_an_evaluation_that_is_interrupted_leaves_the_model_as_it_was():
    model = fresh(SMALL).train()
    model.layers[0].register_forward_hook(press(1))
    with pytest.raises(KeyboardInterrupt):
        loop.evaluate(model, TEXT, 24)
    assert model.training
