"""What a recipe does for the balance: losses that reach the gate, biases that follow the load, files that know it."""

import dataclasses

import numpy
import pytest
import references
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import DENSE, RECIPE, SMALL, batches, fresh

from deepseek_lab.experts import balance
from deepseek_lab.experts.balance import LoadHistory
from deepseek_lab.training import Recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")  # sums of several threads are not the same twice

LOSSES = dict(sequence_loss=0.3, expert_loss=0.2, device_loss=0.1, communication_loss=0.4)
TWO = SMALL.replace(num_hidden_layers=3, n_routed_experts=16, num_experts_per_tok=3)  # two layers with experts
V2 = TWO.replace(topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False)
BEFORE = TWO.replace(topk_method="greedy", scoring_func="softmax", topk_group=1)


def recipe(**settings) -> Recipe:
    return dataclasses.replace(RECIPE, **settings)


def first_step(config, **settings):
    """The record of one step and the gradients of the gates in it, before they are clipped."""
    model, gradients = references.fill(fresh(config)), []
    for layer in model.expert_layers():
        layer.gate.weight.register_hook(gradients.append)
    record = next(train(model, batches(), recipe(**settings)))
    return record, gradients[::-1]  # the last layer hears of it first


def by_hand(config, **factors):
    """Cross-entropy, what is added to it, and the gradients of the gates, written out."""
    model, heard, batch = references.fill(fresh(config)), [], batches()[0]
    layers = model.expert_layers()
    for layer in layers:
        layer.gate.register_forward_hook(lambda _gate, _x, routing: heard.append(routing))
    entropy = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    limit = 4 if config.topk_method == "greedy" else config.topk_group
    added = torch.zeros(())
    for routing in heard:
        for text in range(4):
            scores, experts = (part[24 * text : 24 * (text + 1)] for part in (routing.scores, routing.experts))
            losses = dict(
                sequence_loss=balance.sequence_loss(scores[None], 3), expert_loss=balance.expert_loss(scores, experts),
                device_loss=balance.device_loss(scores, experts, 4),
                communication_loss=balance.communication_loss(scores, experts, 4, limit),
            )  # fmt: skip
            added = added + sum(factors.get(name, 0) * loss for name, loss in losses.items()) / 4
    (entropy + added).backward()
    return entropy.item(), added.item(), [layer.gate.weight.grad for layer in layers]


@pytest.mark.parametrize("name", [*LOSSES, "all"])
@pytest.mark.parametrize("config", [TWO, V2, BEFORE], ids=["v3", "v2", "before"])
def test_a_loss_is_added_and_its_gradient_reaches_the_gates_of_all_layers(config, name):
    factors = LOSSES if name == "all" else {name: LOSSES[name]}
    record, gradients = first_step(config, **factors)
    entropy, added, expected = by_hand(config, **factors)
    assert record.loss == pytest.approx(entropy, rel=1e-6)  # the loss stays the cross-entropy
    assert record.balance_loss == pytest.approx(added, rel=1e-5) and added > 0
    plain, without = first_step(config)
    assert plain.loss == record.loss and plain.balance_loss == 0.0
    for got, right, less in zip(gradients, expected, without, strict=True):
        assert references.difference(got, right) < 1e-4
        assert references.difference(less, right) > 1e-2  # computed but never added, it would look like this


def test_a_run_without_losses_listens_to_no_router(monkeypatch):
    model = fresh(TWO)
    gate = model.expert_layers()[0].gate
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append(len(gate._forward_hooks)))
    run = train(model, batches(), recipe())
    next(run)
    run = train(model, batches(), recipe(expert_loss=0.1))
    next(run)
    assert seen == [0, 1] and not gate._forward_hooks  # and nobody after the step


def test_a_step_that_fails_leaves_no_listener_behind():
    model = fresh(TWO)
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss of step 0 is nan"):
        next(train(model, batches(), recipe(expert_loss=0.1)))
    assert not any(layer.gate._forward_hooks for layer in model.expert_layers())


@pytest.mark.parametrize("rule", balance.RULES)
def test_records_hold_the_biases_after_the_step(rule):
    model = references.fill(fresh(TWO))
    bias = torch.stack([layer.gate.e_score_correction_bias for layer in model.expert_layers()])
    for record in train(model, batches(), recipe(balance_rule=rule, balance_speed=0.02)):
        moved = [balance.update_bias(*row, 0.02, rule) for row in zip(bias, record.load, strict=True)]
        bias = torch.stack(moved)
        assert torch.equal(record.bias, bias)
    live = torch.stack([layer.gate.e_score_correction_bias for layer in model.expert_layers()])
    assert torch.equal(live, bias) and record.bias.data_ptr() != live.data_ptr()


@pytest.mark.parametrize(("config", "shape"), [(V2, (2, 16)), (BEFORE, (2, 16)), (DENSE, (0, 0))])
def test_a_router_without_a_bias_has_zeros_in_its_records(config, shape):
    record = next(train(fresh(config), batches(), recipe()))
    assert record.bias.shape == shape == record.load.shape and not record.bias.any()


def test_nothing_set_is_no_balancing():
    model = references.fill(fresh(TWO))
    before = [layer.gate.e_score_correction_bias.clone() for layer in model.expert_layers()]
    records = list(train(model, batches(), recipe(balance_speed=0.0)))
    for layer, bias in zip(model.expert_layers(), before, strict=True):
        assert torch.equal(layer.gate.e_score_correction_bias, bias)
    assert all(r.balance_loss == 0.0 for r in records)


def crowded(config):
    """A model whose gates prefer a few experts, with biases of zero."""
    model = references.fill(fresh(config), seed=4)
    for layer in model.expert_layers():
        if config.topk_method == "noaux_tc":
            layer.gate.e_score_correction_bias.zero_()
    return model


@pytest.mark.parametrize("config", [SMALL, BEFORE], ids=["v3", "before"])
@pytest.mark.parametrize("name", ["sequence_loss", "expert_loss"])
def test_a_loss_lowers_the_worst_violation(config, name):
    worst = {}
    for factor in (0.0, 0.3):
        settings = recipe(steps=60, learning_rate=3e-3, balance_speed=0.0, **{name: factor})
        history = LoadHistory.of(train(crowded(config), batches(batch=8), settings))
        worst[factor] = history.max_violation[-10:].amax(1).mean()
    assert worst[0.3] < 0.6 * worst[0.0]


def test_a_history_of_a_run_is_that_of_its_records():
    records = list(train(crowded(TWO), batches(), recipe()))
    history = LoadHistory.of(records)
    assert history.loads.shape == history.biases.shape == (12, 2, 16)
    assert history.max_violation.amax(1).tolist() == [r.max_violation for r in records]
    assert torch.equal(LoadHistory.of(train(crowded(TWO), batches(), recipe())).loads, history.loads)  # reproducible


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(balance_rule="cube"), "balance_rule='cube'; choose one of sign, proportional"),
        (dict(sequence_loss=-1e-4), "sequence_loss=-0.0001"),
        (dict(expert_loss=-1.0), "expert_loss=-1.0"),
        (dict(device_loss=float("nan")), "device_loss=nan"),
        (dict(communication_loss=float("inf")), "communication_loss=inf"),
    ],
)
def test_impossible_balancing_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        recipe(**settings)


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (DENSE, dict(expert_loss=0.1), "expert_loss=0.1, but this model has no experts"),
        (TWO.replace(n_group=1, topk_group=1), dict(device_loss=0.1), "device_loss=0.1, but n_group=1"),
        (TWO.replace(n_group=1, topk_group=1), dict(communication_loss=0.1), "communication_loss=0.1, but n_group=1"),
    ],
)
def test_a_loss_that_can_pull_at_nothing_is_refused_before_the_first_step(config, settings, words):
    with pytest.raises(ValueError, match=words):
        next(train(fresh(config), batches(), recipe(**settings)))


def holding(factor, seed=0):
    """A model whose experts hold so many times their fair share."""
    model = fresh(TWO, seed)
    for layer in model.expert_layers():
        layer.capacity_factor = factor
    return model


def four_steps(file, capacity=None, **settings):
    """The losses of a run of twelve steps, left after four and taken up again."""
    run, losses = train(holding(capacity), batches(), recipe(**settings), checkpoint=file), []
    for _ in range(4):
        losses.append(next(run).loss)
    run.close()
    rest = train(holding(capacity, seed=9), batches(), recipe(**settings), checkpoint=file, resume=True)
    return losses + [r.loss for r in rest]


@pytest.mark.parametrize("settings", [
    dict(balance_rule="proportional"), dict(sequence_loss=0.1, balance_speed=0.02), dict(LOSSES, balance_speed=0.0),
    dict(capacity=1.0),
], ids=str)  # fmt: skip
def test_a_balanced_run_goes_on_as_if_it_had_not_stopped(settings, tmp_path):
    model = holding(settings.get("capacity"))
    whole = [r.loss for r in train(model, batches(), recipe(**{k: v for k, v in settings.items() if k != "capacity"}))]
    assert four_steps(tmp_path / "run.safetensors", **settings) == whole


@pytest.mark.parametrize("change", [dict(balance_rule="proportional"), dict(expert_loss=0.1), dict(sequence_loss=1e-4)])
def test_the_file_of_a_run_with_other_balancing_is_refused(change, tmp_path):
    file = tmp_path / "run.safetensors"
    for then, now in ((change, {}), ({}, change)):
        four_steps(file, **then)
        with pytest.raises(ValueError, match="another recipe"):
            next(train(fresh(TWO), batches(), recipe(**now), checkpoint=file, resume=True))


def test_the_file_of_a_run_with_another_capacity_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    four_steps(file, capacity=1.0)
    with pytest.raises(ValueError, match=r"another capacity: \[1\.0, 1\.0\]; this one has none"):
        next(train(fresh(TWO), batches(), recipe(), checkpoint=file, resume=True))


@pytest.mark.parametrize("factor", [1, numpy.float32(1)])
def test_a_capacity_is_the_same_number_in_whatever_type(factor, tmp_path):
    file = tmp_path / "run.safetensors"
    assert four_steps(file, capacity=factor) == four_steps(file, capacity=1.0)
    with pytest.raises(ValueError, match=r"another capacity: \[1\.0, 1\.0\]; this one has \[2\.0, 2\.0\]"):
        next(train(holding(2), batches(), recipe(), checkpoint=file, resume=True))
    four_steps(file)
    with pytest.raises(ValueError, match="another capacity: none; this one has"):
        next(train(holding(1.0), batches(), recipe(), checkpoint=file, resume=True))


def test_a_file_from_before_these_settings_goes_on(tmp_path):
    file, old = tmp_path / "run.safetensors", '{"balance_speed": 0.01, "betas": [0.9, 0.95], "clip_norm": 1.0, '
    old += '"final_learning_rate": 0.0005, "learning_rate": 0.005, "steps": 12, "warmup_steps": 3, "weight_decay": 0.1}'
    run = train(fresh(TWO), batches(), recipe(), checkpoint=file)
    next(run)
    run.close()
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["capacity"]
    save_file(load_file(file), file, {**metadata, "recipe": old})  # as version 0.2 wrote it
    assert [r.step for r in train(fresh(TWO), batches(), recipe(), checkpoint=file, resume=True)] == list(range(1, 12))
