"""The balancing rule moves biases by its sign and nothing else."""

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.experts import ExpertLayer, balance
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


def test_the_rule_balances_a_router_that_prefers_a_few_experts():
    layer = references.fill(ExpertLayer(PRESETS["tiny"].replace(hidden_size=32)))
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 0.7  # a common part favours some experts
    violations = []
    with torch.no_grad():
        for _ in range(300):
            layer(x)
            violations.append(balance.max_violation(layer.load))
            bias = layer.gate.e_score_correction_bias
            bias.copy_(balance.update_bias(bias, layer.load, 0.005))
    assert violations[0] > 0.8
    assert max(violations[-10:]) < 0.15
