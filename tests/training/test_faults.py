"""Kill -9, a full disk, numbers that are none: what was good stays, and the message says where and how to go on."""

import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import references
import torch
from safetensors import safe_open
from training_runs import RECIPE, SMALL, TEXT, batches, fresh

from deepseek_lab.data import Batches
from deepseek_lab.model import save_hf
from deepseek_lab.model.files import write_whole
from deepseek_lab.precision import PrecisionPolicy
from deepseek_lab.training import evaluate, loop, train
from deepseek_lab.training import state as state_module

TESTS = Path(__file__).resolve().parent.parent
AHEAD = SMALL.replace(num_nextn_predict_layers=2, num_hidden_layers=3)
NAN, INF = float("nan"), float("inf")


def done(file) -> int:
    with safe_open(file, framework="pt") as opened:
        return int(opened.metadata()["done"])


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def stopped(file, steps: int, config=SMALL, settings=RECIPE):
    run = train(fresh(config), batches(), settings, checkpoint=file)
    for _ in range(steps):
        next(run)
    run.close()


# Kill -9 -----------------------------------------------------------------------------------------------------------

KILLED = """
import json, os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
from training_runs import *
from deepseek_lab.training import make_optimizer, next_token_loss
from deepseek_lab.training.state import load_state, save_state

file, moments = pathlib.Path(sys.argv[1]), random.Random(0)
model, data = fresh(SMALL), batches()
model.average, optimizer = None, make_optimizer(model, RECIPE)
next_token_loss(model, data[0]).backward()
optimizer.step()
save_state(file, model, optimizer, RECIPE, data, 1)
began = time.perf_counter()
save_state(file, model, optimizer, RECIPE, data, 1)
takes = time.perf_counter() - began
seen, cut, most = set(), 0, 0
for number in range(40):
    child = os.fork()
    if not child:
        while True:
            for steps in range(1, 13):
                with torch.no_grad():
                    model.norm.weight.fill_(steps)
                save_state(file, model, optimizer, RECIPE, data, steps)
    time.sleep(moments.uniform(0.0, 4 * takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = len(list(file.parent.iterdir())) - 1
    cut, most = cut + (left > 0), max(most, left)  # a folder
    other = fresh(SMALL, seed=9)
    steps = load_state(file, other, make_optimizer(other, RECIPE), RECIPE, data)
    assert (other.norm.weight == steps).all() or steps == 1
    seen.add(steps)
save_state(file, model, optimizer, RECIPE, data, 2)
print(json.dumps({"takes": takes, "seen": len(seen), "cut": cut, "most": most, "names": os.listdir(file.parent)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_process_killed_while_it_writes_leaves_the_file_whole_and_little_else(tmp_path):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run.safetensors")]
    found = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found["seen"] > 1 and found["cut"] > 5  # many were killed in the middle of writing
    assert found["most"] == 1 and found["names"] == ["run.safetensors"]  # the next write takes away what is left


def test_what_is_left_of_dead_processes_is_swept_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", "import os; print(os.getpid(), end='')"]
    gone = subprocess.run(command, capture_output=True, text=True).stdout
    kept = [f".unfinished.{os.getppid()}.a", f"unfinished.{gone}.a", ".unfinished.x.a", f".other.{gone}.a"]
    for name in (*kept, f".unfinished.{gone}.a", f".unfinished.{gone}.b", f".unfinished.{2**70}.a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.safetensors").write_text("half")
    write_whole(tmp_path, {"run.safetensors": lambda path: path.write_text("whole")})
    assert names(tmp_path) == sorted([*kept, "run.safetensors"])
    assert (tmp_path / "run.safetensors").read_text() == "whole"


# A full disk -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def filling_disk():
    """Yield a function after which no file of this process can grow beyond some bytes, until the block ends."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:  # before the test has a word to write
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 50_000])
def test_a_full_disk_leaves_the_last_file_and_says_how_to_go_on(size, tmp_path):
    file, model, steps = tmp_path / "run.safetensors", fresh(SMALL), []
    with filling_disk() as fill, pytest.raises(OSError) as caught:
        for record in train(model, batches(), RECIPE, checkpoint=file, checkpoint_every=4):
            steps.append(record.step)
            if record.step == 4:
                content = file.read_bytes()
                fill(size)
    words = str(caught.value)
    assert words.startswith(f"{file} could not be written (")
    assert "it holds 4 steps, go on from there with resume=True" in words
    assert "The model keeps the weights of all 8 steps" in words and "save_hf(model, DIRECTORY)" in words
    assert len(steps) == 7 and caught.value.__context__ is caught.value.__cause__
    assert file.read_bytes() == content and names(tmp_path) == ["run.safetensors"]
    whole = fresh(SMALL)
    for _ in zip(range(8), train(whole, batches(), RECIPE), strict=False):
        pass
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not model.training
    rest = train(fresh(SMALL, seed=9), batches(), RECIPE, checkpoint=file, resume=True)
    assert [r.step for r in rest] == list(range(4, 12))


def test_a_disk_that_was_full_from_the_start_leaves_nothing(tmp_path):
    file, words = (
        tmp_path / "new" / "run.safetensors",
        r"run\.safetensors could not be written .*start anew\. The model .* 12",
    )
    with filling_disk() as fill, pytest.raises(OSError, match=words):
        fill(1000)
        list(train(fresh(SMALL), batches(), RECIPE, checkpoint=file))
    assert names(tmp_path / "new") == []


def test_a_full_disk_at_the_end_of_an_interrupted_loop_is_told(tmp_path):
    file, run = tmp_path / "run.safetensors", train(fresh(SMALL), batches(), RECIPE, tmp_path / "run.safetensors", 4)
    for _ in range(6):
        next(run)
    with filling_disk() as fill, pytest.raises(OSError, match=r"holds 4 steps.*of all 6 steps"):
        fill(1000)
        run.close()
    assert done(file) == 4


def test_a_model_that_finds_no_room_leaves_the_published_files_of_before(tmp_path):
    save_hf(fresh(SMALL), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with filling_disk() as fill, pytest.raises(OSError, match=r"model\.safetensors could not be written"):
        fill(2000)
        save_hf(fresh(SMALL, seed=5), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_where_no_folder_can_be_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "a file").write_text("")
    model = fresh(SMALL)
    before = model.norm.weight.clone()
    with pytest.raises(OSError, match="a file"):
        next(train(model, batches(), RECIPE, checkpoint=tmp_path / "a file" / "run.safetensors"))
    assert torch.equal(model.norm.weight, before)


def test_memory_that_runs_out_within_a_step_loses_no_earlier_one(tmp_path, monkeypatch):
    file, model = tmp_path / "run.safetensors", fresh(SMALL)
    run = train(model, batches(), RECIPE, checkpoint=file, checkpoint_every=4)
    for _ in range(6):
        next(run)
    hook = model.layers[1].register_forward_hook(lambda *_: exec("raise MemoryError"))
    with pytest.raises(MemoryError):
        next(run)
    hook.remove()
    assert done(file) == 6  # the weights are those of six steps, and the file too
    run = train(fresh(SMALL), batches(), RECIPE, checkpoint=file, checkpoint_every=4, resume=True)
    next(run)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a: [step(*a), exec("raise MemoryError")])
    with pytest.raises(MemoryError):
        next(run)
    assert done(file) == 6  # in the middle of the update: the weights are of no step at all


# Numbers that are none ---------------------------------------------------------------------------------------------


def poisoned(model, module: str, value: float = NAN):
    """Make one module answer with a NaN in one place."""

    def hook(_module, _inputs, output):
        first = output[-1] if isinstance(output, tuple) else output
        first = first.clone()
        first.view(-1)[-1] = value
        return output._replace(scores=first) if isinstance(output, tuple) else first

    return model.get_submodule(module).register_forward_hook(hook)


@pytest.mark.parametrize("settings", [
    {}, dict(precision=PrecisionPolicy()), dict(recompute=("norms", "swiglu", "up-projections")),
    dict(precision=PrecisionPolicy(), recompute=("norms", "swiglu"), moments="bf16", sequence_loss=0.1),
], ids=["plain", "fp8", "recomputed", "all"])  # fmt: skip
@pytest.mark.parametrize("module", [
    "embed_tokens", "layers.2.input_layernorm", "layers.2.self_attn.kv_a_proj_with_mqa", "layers.2.mlp.experts", "norm",
    "layers.2.mlp.shared_experts.up_proj", "lm_head", "multi_token.0.eh_proj", "multi_token.1.mlp.experts",
    "multi_token.1.self_attn.o_proj",
])  # fmt: skip
def test_the_module_whose_output_is_no_number_is_named(module, settings):
    model = references.fill(fresh(AHEAD))
    run = train(model, batches(), dataclasses.replace(RECIPE, **settings))
    next(run)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    poisoned(model, module)
    words = (
        rf"the loss of step 1 is nan: the output of {module} is the first with nan; the weights are left as they were"
    )
    with pytest.raises(ValueError, match=words):
        next(run)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [
    "embed_tokens.weight", "layers.2.mlp.experts.down_proj", "layers.1.mlp.gate.weight",
    "multi_token.1.enorm.weight", "lm_head.weight",
])  # fmt: skip
@pytest.mark.parametrize("policy", [None, PrecisionPolicy()], ids=["fp32", "fp8"])
def test_the_weight_that_is_no_number_is_named(name, policy):
    model = references.fill(fresh(AHEAD))
    run = train(model, batches(), dataclasses.replace(RECIPE, precision=policy))
    next(run)
    model.get_parameter(name).data.fill_(NAN)  # all of it: a single expert might not be asked
    with pytest.raises(ValueError, match=f"the loss of step 1 is nan: the weight {name} holds nan"):
        next(run)


def test_a_loss_that_is_no_number_by_itself_is_named(monkeypatch):
    words = "step 0 is inf: all weights and outputs are finite, so it is the balance loss itself"
    with pytest.raises(ValueError, match=words):
        next(train(references.fill(fresh(AHEAD)), batches(), dataclasses.replace(RECIPE, sequence_loss=1e39)))
    original = loop.multi_token_loss

    def odd(model, batch):
        main, (first, second) = original(model, batch)
        return main, (first, second * INF)

    monkeypatch.setattr(loop, "multi_token_loss", odd)
    with pytest.raises(ValueError, match=r"step 0 is inf: .* finite, so it is the loss of multi_token\.1 itself"):
        next(train(references.fill(fresh(AHEAD)), batches(), RECIPE))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", [
    "layers.0.mlp.down_proj.weight", "layers.2.mlp.gate.weight", "norm.weight", "multi_token.0.eh_proj.weight",
])  # fmt: skip
def test_the_gradient_that_is_no_number_is_named(name, value):
    model = references.fill(fresh(AHEAD))
    run = train(model, batches(), RECIPE)
    next(run)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.get_parameter(name).register_hook(lambda g: torch.full_like(g, value))
    word = "nan" if value != value else "inf"
    with pytest.raises(ValueError, match=f"norm of step 1 is {word}: the gradient of {name} is the first with {word}"):
        next(run)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_norm_that_overflows_is_told_from_a_gradient_that_does():
    model = references.fill(fresh(SMALL))
    model.norm.weight.register_hook(lambda g: torch.full_like(g, 3e38))
    with pytest.raises(ValueError, match="norm of step 0 is inf: every gradient is finite, their norm is not"):
        next(train(model, batches(), RECIPE))


def test_a_run_that_diverges_with_weights_still_finite_keeps_the_earlier_file(tmp_path):
    model, file = fresh(SMALL), tmp_path / "run.safetensors"
    run = train(model, batches(), RECIPE, checkpoint=file, checkpoint_every=5)
    for _ in range(7):
        next(run)
    model.norm.weight.register_hook(lambda g: g * INF)
    with pytest.raises(ValueError, match="gradient norm of step 7"):
        next(run)
    assert done(file) == 5


def test_a_run_that_breaks_before_its_first_file_spoils_no_older_one(tmp_path):
    file = tmp_path / "run.safetensors"
    stopped(file, 5)
    model, content = fresh(SMALL), file.read_bytes()
    run = train(model, batches(), RECIPE, checkpoint=file)
    next(run)
    model.norm.weight.data.fill_(NAN)
    with pytest.raises(ValueError, match=r"the weight norm\.weight holds nan"):
        next(run)
    assert file.read_bytes() == content


# Tokens that are none ----------------------------------------------------------------------------------------------


ODD_TEXTS = [
    (TEXT.float().index_fill(0, torch.tensor(77), NAN), "got token nan at place 77"),
    (TEXT.float(), "got tokens of torch.float32; expected whole numbers"),
    (TEXT.index_fill(0, torch.tensor([70, 9]), -4), "got token -4 at place 9"),
    (TEXT > 100, "got tokens of torch.bool"),
    (TEXT[:24], r"shape \(24,\); expected \[token\] with at least length \+ 1 = 25"),
    (TEXT[None], "expected \\[token\\]"),
    (TEXT[:0], "expected \\[token\\]"),
]


@pytest.mark.parametrize(
    ("tokens", "words"), ODD_TEXTS, ids=["nan", "floats", "negative", "bool", "short", "2d", "empty"]
)
def test_a_text_that_is_none_is_refused_before_the_first_step(tokens, words):
    with pytest.raises(ValueError, match=f"Batches got .*{words.removeprefix('got ')}"):
        Batches(tokens, 4, 24)
    with pytest.raises(ValueError, match=f"evaluate got .*{words.removeprefix('got ')}"):
        evaluate(fresh(SMALL), tokens, 24)
    model = fresh(SMALL)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"validation got .*{words.removeprefix('got ')}"):
        next(train(model, batches(), RECIPE, validation=tokens))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_token_that_the_model_does_not_know_is_refused_before_the_first_step():
    model, text = fresh(SMALL), TEXT.clone()
    text[-1] = 260  # read by few batches
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for data, more, who in ((batches(text), {}, "batches"), (batches(), {"validation": text}, "validation")):
        with pytest.raises(ValueError, match=rf"{who} has token 260, outside the vocabulary 0\.\.259"):
            next(train(model, data, RECIPE, **more))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_model_that_its_file_could_not_hold_is_refused_before_the_first_step(tmp_path):
    model = fresh(SMALL)
    model.probe = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="probe"):
        next(train(model, batches(), RECIPE, checkpoint=tmp_path / "run.safetensors"))


def test_a_refused_file_leaves_the_mean_that_a_model_has(tmp_path):
    file, settings = tmp_path / "run.safetensors", dataclasses.replace(RECIPE, ema_decay=0.9)
    stopped(file, 2)
    model = fresh(SMALL)
    list(train(model, batches(), settings))
    mean = copy.copy(model.average)
    with pytest.raises(ValueError, match=r"another recipe: none; this one has \{'ema_decay': 0\.9\}"):
        next(train(model, batches(), settings, checkpoint=file, resume=True))
    assert model.average == mean


def test_a_save_that_fails_leaves_the_last_file_and_is_not_tried_again(tmp_path, monkeypatch):
    file, tries = tmp_path / "run.safetensors", []
    stopped(file, 4)
    before = file.read_bytes()

    def no_room(tensors, path, metadata):
        tries.append(path.write_bytes(b"half"))
        raise OSError("no space left on device")

    monkeypatch.setattr(state_module, "save_file", no_room)
    with pytest.raises(OSError, match="no space"):
        list(train(fresh(SMALL), batches(), RECIPE, checkpoint=file, checkpoint_every=6, resume=True))
    assert file.read_bytes() == before and names(tmp_path) == ["run.safetensors"] and len(tries) == 1
