"""Measured memory: counted by hand where that can be done, by torch's allocator where not; every storage once."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.optim import optimizer
from torch.profiler import ProfilerActivity, profile

import deepseek_lab as lab
from deepseek_lab.accounting.measured import PARTS, measure, record_step
from deepseek_lab.precision import PrecisionPolicy

TINY = lab.PRESETS["tiny"]
SMALL = TINY.replace(num_hidden_layers=2, hidden_size=128, vocab_size=64)
ALL = {"norms", "up-projections", "swiglu"}
TOKENS = torch.randint(0, 60, (5_000,), generator=torch.Generator().manual_seed(1))


def toy():
    """3 -> 4 -> 2, without biases: 12 and 8 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))


def toy_step(model, optimizer, x):
    def step():
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training(config=SMALL, products="fp32", recompute=(), batch=2, length=64):
    """A model and the steps of its training, the first of them done: moments exist, position tables too."""
    torch.manual_seed(0)
    model = lab.model.Transformer(config)
    if products != "fp32":
        lab.model.apply_policy(model, PrecisionPolicy(products=products))
    model.recompute = recompute
    steps = lab.training.train(model, lab.data.Batches(TOKENS, batch, length), lab.training.Recipe(steps=9))
    next(steps)
    return model, lambda: next(steps)


def at(timeline, label):
    return next(event for event in timeline.events if event.label == label)


def test_a_toy_of_two_layers_takes_the_bytes_counted_by_hand():
    model, x = toy(), torch.randn(5, 3)
    timeline = record_step(model, toy_step(model, torch.optim.AdamW(model.parameters()), x))
    labels = [event.label for event in timeline.events]
    names = ["0", "1", "2"]
    forward, backward = [f"forward {n}" for n in names], [f"backward {n}" for n in reversed(names)]
    assert labels == ["start", *forward, "loss", "backward loss", *backward, "clip", "optimiser", "zero_grad"]
    # x is not of the step's making. ReLU saves its output [5, 4], which the second layer saves too: one storage of 80
    # bytes. The square saves the output [5, 2], 40 bytes.
    assert [at(timeline, label).end.bytes["activations"] for label in [*forward, "loss"]] == [0, 80, 80, 120]
    assert [at(timeline, label).end.bytes["workspace"] for label in forward] == [
        80,
        80,
        40,
    ]  # nn.Sequential holds its last input
    assert timeline.largest("weights") == timeline.largest("gradients") == (12 + 8) * 4
    assert timeline.largest("moments") == 2 * (12 + 8) * 4
    assert at(timeline, "backward 2").end.bytes["gradients"] == 8 * 4
    assert at(timeline, "clip").end.bytes["activations"] == 0
    # What is left: moments, and AdamW's step counters, one number each.
    start, end = timeline.moments[0].bytes, timeline.moments[-1].bytes
    assert start == dict.fromkeys(PARTS, 0) | {"weights": 80}
    assert end == start | {"moments": 160, "workspace": 2 * 4}
    assert timeline.parameters == 20


def test_from_the_second_step_on_memory_ends_where_it_began():
    model, x = toy(), torch.randn(5, 3)
    step = toy_step(model, torch.optim.AdamW(model.parameters()), x)
    step()
    timeline = record_step(model, step)
    assert timeline.moments[0].bytes == timeline.moments[-1].bytes == dict.fromkeys(PARTS, 0) | {
        "weights": 80, "moments": 160,
    }  # fmt: skip


def test_a_storage_that_two_tensors_share_counts_once():
    model = nn.Linear(4, 4, bias=False)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            y = self.inner(x)  # [8, 4]: two halves of it are saved, and it as a whole
            return y[:4] * y[4:] + y.sum() * y.sigmoid()[:4]

    twice = Twice()
    timeline = record_step(twice, lambda: twice(torch.randn(8, 4)).sum().backward())
    # y: 128 bytes, once. Then x, born in the step: 128, the sum: 4, and sigmoid(y) [8, 4]: 128.
    assert timeline.largest("activations") == 128 + 128 + 4 + 128


def test_tied_weights_and_views_count_once():
    config = SMALL.replace(tie_word_embeddings=True)
    model = lab.model.Transformer(config)
    untied = lab.model.Transformer(SMALL)
    ledger = measure(model)
    assert ledger["weights"].total == measure(untied)["weights"].total - 64 * 128 * 4
    assert ledger["weights"].total == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    model.tied = model.embed_tokens.weight.view(-1)
    assert measure(model) == ledger


def test_the_ledger_counts_what_is_alive():
    model, _ = training()
    parameters = sum(p.numel() for p in model.parameters())
    adam = lab.training.optimizer.make_optimizer(model, lab.training.Recipe(steps=1))
    assert measure(model, adam)["moments"].total == 0
    lab.training.loop.next_token_loss(model, TOKENS[None, :33]).backward()
    assert measure(model)["gradients"].total == 4 * parameters
    adam.step()
    adam.zero_grad(set_to_none=True)
    ledger = measure(model, adam)
    assert (ledger["gradients"].total, ledger["moments"].total) == (0, 8 * parameters)
    assert ledger.total == sum(line.total for line in ledger)


@pytest.mark.parametrize("layout", ["latent", "latent_fp8", "expanded", "paged"])
def test_caches_count_with_their_whole_buffers(layout):
    model = lab.model.Transformer(SMALL)
    caches = model.new_caches(2, 40, layout)
    with torch.inference_mode():
        model(TOKENS[:20].view(2, 10), caches)
    pools = {id(c.pool): c.pool.storage.nbytes for c in caches if layout == "paged"}
    expected = sum(pools.values()) if pools else sum(c.allocated_nbytes for c in caches)
    assert measure(model, caches=caches)["cache"].total == expected > 0
    fork = caches[0]
    assert measure(model, caches=[fork, fork]) == measure(model, caches=[fork])


@pytest.mark.parametrize("products", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("recompute", [(), ALL], ids=["kept", "recomputed"])
def test_parts_add_up_and_the_step_leaves_only_the_routers_choices(products, recompute):
    model, step = training(products=products, recompute=recompute)
    timeline = record_step(model, step)
    parameters = timeline.parameters
    for moment in timeline.moments:
        assert moment.total == sum(moment.bytes.values()) and min(moment.bytes.values()) >= 0
        assert tuple(moment.bytes) == PARTS
    assert (timeline.largest("gradients"), timeline.largest("moments")) == (4 * parameters, 8 * parameters)
    chosen = sum(layer._chosen.nbytes for layer in model.expert_layers())
    start, end = timeline.moments[0].bytes, timeline.moments[-1].bytes
    left = {part: end[part] - start[part] for part in PARTS if end[part] != start[part]}
    assert set(left) == {"workspace"} and chosen <= left["workspace"] <= chosen + 4096
    assert timeline.peak.total == max(event.fullest.total for event in timeline.events)
    seconds = [moment.seconds for moment in timeline.moments]
    assert seconds == sorted(seconds) and sum(event.seconds for event in timeline.events) == pytest.approx(seconds[-1])


def test_narrow_weights_are_the_codes_and_scales_of_every_linear_layer():
    model, step = training(products="fp8")
    linear = [p for n, p in model.named_parameters() if "_proj" in n]
    sides = [p.flatten(0, -2).shape for p in linear]  # an expert's rows fill whole blocks
    scales = sum(-(-rows // 128) * -(-columns // 128) for rows, columns in sides)
    assert record_step(model, step).largest("narrow weights") == sum(p.numel() for p in linear) + 4 * scales
    model, step = training(products="bf16")
    assert record_step(model, step).largest("narrow weights") == 2 * sum(p.numel() for p in linear)
    model, step = training()
    assert record_step(model, step).largest("narrow weights") == 0


def test_the_allocator_counts_the_same(monkeypatch):
    """Torch's profiler hears every allocation. With kernels in torch, none is numpy's."""
    monkeypatch.setenv("LAB_KERNELS", "reference")
    model, step = training()
    standing = 12 * sum(p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    timeline = record_step(model, step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert len(events) > 1_000
    assert timeline.peak.total == pytest.approx(standing + peak, rel=0.002)


def test_the_parts_of_the_step_come_in_order_with_one_event_each():
    model, step = training()
    labels = [event.label for event in record_step(model, step).events]
    places = ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
    assert labels == ["start", *(f"forward {p}" for p in places), "loss", "backward loss",
                      *(f"backward {p}" for p in reversed(places)), "clip", "optimiser", "zero_grad"]  # fmt: skip


def hooks_of(model):
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    parameters = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    optimisers = len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks)
    return modules, parameters, *optimisers


def test_an_interrupted_measurement_leaves_no_hooks():
    model, step = training()
    before = hooks_of(model)
    plain = [p.detach().clone() for p in model.parameters()]

    def interrupted():
        lab.training.loop.next_token_loss(model, TOKENS[None, :33])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_step(model, interrupted)
    assert hooks_of(model) == before == (0, 0, 0, 0)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert all(torch.equal(a, b) for a, b in zip(plain, model.parameters(), strict=True))
    gc.collect()
    assert record_step(model, step).moments[-1].bytes["activations"] == 0


def test_a_measured_step_is_the_step():
    runs = []
    for measured in (False, True):
        model, step = training(products="fp8")
        record_step(model, step) if measured else step()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_that_stand_before_the_step_are_counted_from_its_start():
    model = toy()
    model(torch.randn(5, 3)).sum().backward()
    timeline = record_step(model, lambda: model(torch.randn(5, 3)).sum().backward())
    assert timeline.moments[0].bytes["gradients"] == timeline.moments[-1].bytes["gradients"] == 80


def test_gradients_set_by_hand_are_gradients():
    model, x = toy(), torch.randn(5, 3)

    def step():
        found = torch.autograd.grad(model(x).square().mean(), [*model.parameters()])
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient

    assert record_step(model, step).moments[-1].bytes == dict.fromkeys(PARTS, 0) | {"weights": 80, "gradients": 80}


def test_a_storage_that_grows_counts_as_it_is():
    def step():
        x = torch.empty(0)
        torch.mul(torch.ones(100), 2, out=x)
        return x + 1

    peak = record_step(toy(), step).peak
    assert peak.bytes["workspace"] == 2 * 400


def test_caches_that_grow_within_the_step_stay_caches():
    model = lab.model.Transformer(SMALL)
    caches = model.new_caches(1, 4)
    step = torch.inference_mode()(lambda: model(TOKENS[:20].view(1, 20), caches))
    timeline = record_step(model, step, caches)
    start, end = (timeline.moments[i].bytes["cache"] for i in (0, -1))
    assert start < end == measure(model, caches=caches)["cache"].total


def test_the_mean_of_the_weights_is_not_counted_from_its_first_step_on():
    model = lab.model.Transformer(SMALL)
    run = lab.training.train(model, lab.data.Batches(TOKENS, 2, 32), lab.training.Recipe(steps=9, ema_decay=0.9))
    first, second = (record_step(model, lambda: next(run)) for _ in range(2))
    assert len(model.average) > 10
    left = {p: first.moments[-1].bytes[p] - second.moments[0].bytes[p] for p in PARTS}
    assert {part for part in left if left[part]} == {"workspace"}  # tables of positions, step counters, choices
    assert left["workspace"] < 0.02 * first.largest("weights")


def test_the_optimiser_of_another_model_in_the_same_step_has_no_moments_here():
    model, other, x = toy(), toy(), torch.randn(5, 3)
    own, others = (toy_step(m, torch.optim.AdamW(m.parameters()), x) for m in (model, other))
    for _ in range(2):
        assert record_step(model, lambda: (own(), others())).moments[-1].bytes["moments"] == 160


def test_another_model_beside_it_is_not_counted():
    model, step = training()
    alone = record_step(model, step).peak.total
    other = copy.deepcopy(model)
    other(TOKENS[None, :33]).sum().backward()
    assert record_step(model, step).peak.total == pytest.approx(alone, rel=0.001)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the allocator's figures stay empty")
def test_the_allocator_of_a_gpu_reports_beside():
    model = toy().cuda()
    x = torch.randn(5, 3, device="cuda")
    timeline = record_step(model, toy_step(model, torch.optim.AdamW(model.parameters()), x))
    assert timeline.allocator["peak"] - timeline.allocator["before"] > 0
    assert timeline.allocator["reserved"] >= timeline.allocator["peak"] >= timeline.peak.total


def test_without_a_gpu_the_allocator_has_no_figures():
    model = toy()
    timeline = record_step(model, lambda: model(torch.randn(5, 3)).sum().backward())
    assert bool(timeline.allocator) == torch.cuda.is_available()
