"""Biases follow the load, losses are the printed ones, and imbalance is measured as published."""

from types import SimpleNamespace

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.experts import ExpertLayer, Router, balance
from deepseek_lab.experts.balance import LoadHistory
from deepseek_lab.presets import PRESETS


def test_overloaded_goes_down_and_underloaded_goes_up_by_the_same_amount():
    bias = torch.tensor([0.5, -0.25, 0.0, 0.125])
    moved = balance.update_bias(bias, torch.tensor([10, 2, 4, 8]), 0.001) - bias
    torch.testing.assert_close(moved, torch.tensor([-0.001, 0.001, 0.001, -0.001]), rtol=1e-4, atol=0)


def test_an_expert_at_the_mean_and_a_speed_of_zero_move_nothing():
    bias = torch.tensor([0.5, -0.25, 0.75])
    assert balance.update_bias(bias, torch.tensor([4, 2, 3]), 0.001)[2] == 0.75
    assert torch.equal(balance.update_bias(bias, torch.tensor([9, 0, 0]), 0.0), bias)
    assert torch.equal(balance.update_bias(bias, torch.tensor([7, 7, 7]), 0.1), bias)


def test_the_old_bias_is_left_alone():
    bias = torch.zeros(2)
    balance.update_bias(bias, torch.tensor([2, 0]), 1.0)
    assert torch.equal(bias, torch.zeros(2))


def test_huge_loads_keep_their_last_digit():
    moved = balance.update_bias(torch.zeros(2), torch.tensor([2**40, 2**40 + 1]), 1.0)
    assert moved.tolist() == [1.0, -1.0]


def test_max_violation_is_the_busiest_experts_excess():
    assert balance.max_violation(torch.tensor([10, 2, 4, 8])) == pytest.approx(0.6666666666666666)
    assert balance.max_violation(torch.tensor([5, 5, 5])) == 0
    assert balance.max_violation(torch.tensor([12, 0, 0, 0])) == 3


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any))
def test_max_violation_lies_between_perfect_and_all_on_one(load):
    assert 0 <= balance.max_violation(torch.tensor(load)) <= len(load) - 1 + 1e-9


def test_impossible_loads_are_refused():
    with pytest.raises(ValueError, match=r"\(4,\) biases and \(3,\) loads"):
        balance.update_bias(torch.zeros(4), torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="at least one routed token"):
        balance.max_violation(torch.zeros(4))


def test_the_proportional_rule_moves_by_how_many_means_are_missing():
    bias, load = torch.tensor([0.5, -0.25, 0.0, 0.125]), torch.tensor([10, 2, 4, 8])
    moved = balance.update_bias(bias, load, 0.003, "proportional") - bias
    torch.testing.assert_close(moved, 0.003 * torch.tensor([-4, 4, 2, -2]) / 6, rtol=1e-4, atol=0)
    many = balance.update_bias(bias, 1000 * load, 0.003, "proportional")
    assert torch.equal(many, balance.update_bias(bias, load, 0.003, "proportional"))  # whatever the size of the batch
    idle = balance.update_bias(torch.zeros(2), torch.tensor([0, 6]), 0.25, "proportional")
    assert idle.tolist() == [0.25, -0.25]


@pytest.mark.parametrize("rule", balance.RULES)
def test_a_step_without_any_token_moves_no_bias(rule):
    bias = torch.tensor([0.5, -0.25])
    assert torch.equal(balance.update_bias(bias, torch.tensor([0, 0]), 0.1, rule), bias)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='cube'; choose 'sign'"):
        balance.update_bias(torch.zeros(2), torch.ones(2), 0.1, "cube")


# Losses: against their printed equations, one token and one expert at a time in float64 ------------------------------

# DeepSeek-V3 report, equations 17 to 20, on four tokens and four experts, worked out apart from this library.
FOUR = [[0.9, 0.2, 0.4, 0.1], [0.3, 0.8, 0.6, 0.2], [0.7, 0.1, 0.2, 0.9], [0.5, 0.6, 0.3, 0.4]]


def routed(tokens=30, batch=3, method="noaux_tc", scoring="sigmoid", **changes):
    """Scores [batch, token, 16] and experts [batch, token, choice] of a gate with a bias, and its settings."""
    config = PRESETS["tiny"].replace(hidden_size=32, topk_method=method, scoring_func=scoring, **changes)
    gate = references.fill(Router(config))
    x = torch.randn(batch * tokens, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    routing = gate(x)
    return [part.unflatten(0, (batch, tokens)) for part in (routing.scores.detach(), routing.experts)]


V2 = dict(method="group_limited_greedy", scoring="softmax", norm_topk_prob=False)


def by_definition(scores, experts, devices=None, limit=None) -> float:
    """Equations 23 to 31 of the DeepSeek-V2 report for one sequence: the expert, device or communication loss."""
    (tokens, count), choices = scores.shape, experts.shape[1]
    shares = [[s / sum(row) for s in row] for row in scores.tolist()]
    chosen = experts.tolist()
    f = [count / (choices * tokens) * sum(i in row for row in chosen) for i in range(count)]
    p = [sum(row[i] for row in shares) / tokens for i in range(count)]
    if devices is None:
        return sum(a * b for a, b in zip(f, p, strict=True))
    size, total = count // devices, 0.0
    for device in range(devices):
        inside = range(device * size, (device + 1) * size)
        there = sum(f[i] for i in inside) / size
        if limit:
            there = devices / (limit * tokens) * sum(any(i in inside for i in row) for row in chosen)
        total += there * sum(p[i] for i in inside)
    return total


def test_the_sequence_loss_of_the_printed_example():
    scores = torch.tensor([FOUR], dtype=torch.float64)
    assert balance.sequence_loss(scores, 2).item() == pytest.approx(1.0628654970760234, rel=1e-12)


def test_the_sequence_loss_counts_the_best_unbiased_scores_of_every_sequence():
    scores, experts = routed()
    best = scores.topk(4).indices
    assert not torch.equal(best.sort().values, experts.sort().values)  # bias and groups did choose otherwise
    expected = sum(by_definition(*sequence) for sequence in zip(scores, best, strict=True)) / 3
    assert balance.sequence_loss(scores, 4).item() == pytest.approx(expected, rel=1e-5)


LOSSES = {
    "expert": (balance.expert_loss, {}),
    "device": (balance.device_loss, dict(devices=4)),
    "communication": (balance.communication_loss, dict(devices=4, limit=2)),
}


@pytest.mark.parametrize("settings", [{}, V2], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_printed_equations_averaged_over_sequences(name, settings):
    loss, more = LOSSES[name]
    scores, experts = routed(**settings)
    expected = [by_definition(*sequence, **more) for sequence in zip(scores, experts, strict=True)]
    assert loss(scores, experts, **more).item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert loss(scores[0], experts[0], **more).item() == pytest.approx(expected[0], rel=1e-5)
    together = by_definition(scores.flatten(0, 1), experts.flatten(0, 1), **more)
    assert loss(scores.flatten(0, 1), experts.flatten(0, 1), **more).item() == pytest.approx(together, rel=1e-5)
    assert together != pytest.approx(sum(expected) / 3, rel=1e-4)  # a batch is not its sequences


@pytest.mark.parametrize("name", LOSSES)
def test_perfect_balance_costs_one_and_a_crowd_costs_more(name):
    loss, more = LOSSES[name]
    more = {k: v if k == "devices" else 1 for k, v in more.items()}
    even = torch.arange(16).repeat(4)[:, None]
    assert loss(torch.full((64, 16), 0.3), even, **more).item() == pytest.approx(1.0)
    crowd = torch.full((64, 16), 0.1).index_fill(1, torch.tensor([5]), 0.9)
    assert loss(crowd, torch.full((64, 1), 5), **more).item() > 1.5


@pytest.mark.parametrize("name", [*LOSSES, "sequence"])
def test_the_gradient_of_a_loss_takes_from_the_crowded_and_gives_to_the_idle(name):
    scores = torch.full((1, 64, 16), 0.2).index_fill(2, torch.tensor([5]), 0.9).requires_grad_()
    experts = torch.full((1, 64, 1), 5)
    loss = (
        balance.sequence_loss(scores, 1) if name == "sequence" else LOSSES[name][0](scores, experts, **LOSSES[name][1])
    )
    loss.backward()
    assert (scores.grad[..., 5] > 0).all() and (scores.grad[..., 8:] < 0).all()


@pytest.mark.parametrize("name", [*LOSSES, "sequence"])
def test_smaller_scores_for_all_are_no_way_out(name):
    """A sigmoid could lower every score at once; the loss must not fall by that."""
    scores, experts = routed()
    losses = [
        balance.sequence_loss(s, 4).item()
        if name == "sequence"
        else LOSSES[name][0](s, experts, **LOSSES[name][1]).item()
        for s in (scores, 0.01 * scores)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_losses_of_nothing_and_devices_that_do_not_divide_the_experts_are_refused():
    scores, experts = routed()
    for devices in (3, 5, 32, 0):
        with pytest.raises(ValueError, match=f"devices={devices} does not divide 16 experts"):
            balance.device_loss(scores, experts, devices)
        with pytest.raises(ValueError, match=f"devices={devices} does not divide 16 experts"):
            balance.communication_loss(scores, experts, devices, 1)
    for limit in (0, 5):
        with pytest.raises(ValueError, match=f"limit={limit}; a token goes to between 1 and 4 devices"):
            balance.communication_loss(scores, experts, 4, limit)
    for wrong in ((scores[:, :0], experts[:, :0]), (scores, experts[:, 1:]), (scores[0, 0], experts[0, 0])):
        with pytest.raises(ValueError, match="of the same tokens"):
            balance.expert_loss(*wrong)
        with pytest.raises(ValueError, match="of the same tokens"):
            balance.communication_loss(*wrong, 4, 2)


# Measures ------------------------------------------------------------------------------------------------------------


def test_the_violation_of_a_set_is_that_of_its_sum():
    loads = [torch.tensor([8, 0, 4]), torch.tensor([0, 8, 4])]
    assert [balance.max_violation(load) for load in loads] == [1.0, 1.0]
    assert balance.global_violation(loads) == balance.global_violation(torch.stack(loads)) == 0
    assert balance.global_violation([*loads, torch.tensor([12, 0, 0])]) == pytest.approx(20 / 12 - 1)
    with pytest.raises(ValueError, match="at least one routed token"):
        balance.global_violation([])


def records(steps=4, layers=2, experts=3):
    generator = torch.Generator().manual_seed(3)
    return [
        SimpleNamespace(load=torch.randint(0, 3, (layers, experts), generator=generator) + torch.eye(experts)[0].long(),
                        bias=torch.randn(layers, experts, generator=generator))
        for _ in range(steps)
    ]  # fmt: skip


def test_a_history_holds_loads_biases_violations_and_the_dead_of_every_step_and_layer():
    run = records()
    history = LoadHistory.of(iter(run))
    for step, record in enumerate(run):
        assert torch.equal(history.loads[step], record.load) and torch.equal(history.biases[step], record.bias)
        expected = [balance.max_violation(row) for row in record.load]
        assert history.max_violation[step].tolist() == expected
        assert history.dead[step].tolist() == [row.tolist().count(0) for row in record.load]
    assert history.dead.sum() > 0


def test_histories_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no records"):
        LoadHistory.of([])
    with pytest.raises(ValueError, match="records of different models"):
        LoadHistory.of([*records(), *records(experts=4)])
    dense = SimpleNamespace(load=torch.empty(0, 0, dtype=torch.int64), bias=torch.empty(0, 0))
    with pytest.raises(ValueError, match="of a model with experts"):
        LoadHistory.of([dense])
    with pytest.raises(ValueError, match=r"loads \(1, 2, 3\) and biases \(1, 2, 2\)"):
        LoadHistory.of([SimpleNamespace(load=torch.ones(2, 3), bias=torch.zeros(2, 2))])


@pytest.mark.parametrize(("rule", "speed"), [("sign", 0.005), ("proportional", 0.02)])
def test_the_rule_balances_a_router_that_prefers_a_few_experts(rule, speed):
    layer = references.fill(ExpertLayer(PRESETS["tiny"].replace(hidden_size=32)))
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 0.7  # a common part favours some experts
    violations = []
    with torch.no_grad():
        for _ in range(300):
            layer(x)
            violations.append(balance.max_violation(layer.load))
            bias = layer.gate.e_score_correction_bias
            bias.copy_(balance.update_bias(bias, layer.load, speed, rule))
    assert violations[0] > 0.8
    assert max(violations[-10:]) < 0.15
