"""A token's way to its experts: nodes by counting every choice, bytes by the published sizes."""

import itertools

import pytest

from deepseek_lab import facts
from deepseek_lab.accounting import dispatch_bytes, expected_nodes
from deepseek_lab.presets import PRESETS

V3 = PRESETS["deepseek-v3"]


@pytest.mark.parametrize(("experts", "nodes", "choices"), [(8, 4, 3), (12, 3, 4), (9, 9, 2), (6, 2, 6), (6, 1, 2)])
def test_expected_nodes_are_the_mean_over_every_choice(experts, nodes, choices):
    size = experts // nodes
    touched = [len({e // size for e in chosen}) for chosen in itertools.combinations(range(experts), choices)]
    assert expected_nodes(experts, nodes, choices) == pytest.approx(sum(touched) / len(touched))


@pytest.mark.parametrize(("nodes", "choices"), [(12, 1), (9, 3), (48, 1)])
def test_no_more_nodes_than_choices_are_expected_so_that_their_bytes_can_be_asked_for(nodes, choices):
    expected = expected_nodes(nodes, nodes, choices)  # one expert on each
    assert expected == pytest.approx(choices) and expected <= choices
    config = PRESETS["tiny"].replace(n_routed_experts=nodes, n_group=1, topk_group=1, num_experts_per_tok=choices)
    assert dispatch_bytes(config, expected).total == pytest.approx(dispatch_bytes(config, choices).total)


def test_v3_would_touch_5_3_of_its_8_nodes():
    assert expected_nodes(V3.n_routed_experts, facts.V3_EXPERT_NODES.value, V3.num_experts_per_tok) == pytest.approx(
        5.2947, abs=5e-5
    )


def test_the_facts_are_those_of_the_config():
    assert (V3.n_group, V3.topk_group) == (facts.V3_EXPERT_NODES.value, facts.V3_NODE_LIMIT.value)
    on_a_gpu = (V3.n_routed_experts + facts.V3_REDUNDANT_EXPERTS.value) / facts.V3_PREFILL_GPUS.value
    assert on_a_gpu == V3.n_routed_experts / facts.V3_PREFILL_GPUS.value + 1 == 9
    reached = facts.V3_NODE_LIMIT.value * facts.V3_FREE_EXPERTS_PER_NODE.value
    assert int(reached) == 12 and round(reached) == 13  # the report rounds to 13 experts at the price of 8


def test_a_v3_token_costs_21_728_bytes_for_each_node_out_and_back():
    ledger = dispatch_bytes(V3)
    assert ledger["dispatch/codes"].total == 4 * 7_168
    assert ledger["dispatch/scales"].total == 4 * 56 * 4
    assert ledger["combine"].total == 4 * 2 * 7_168
    assert ledger.total == 4 * 21_728 == 86_912
    assert dispatch_bytes(V3, 8).total == 2 * ledger.total
    free = dispatch_bytes(V3, expected_nodes(256, 8, 8)).total
    assert free == pytest.approx(5.2947 * 21_728, rel=1e-4)
    assert "4 nodes × 7,168 × 1 byte" in str(ledger)


@pytest.mark.parametrize(("name", "nodes"), [("deepseek-v2", 3), ("tiny", 2), ("deepseek-v2-lite", 6)])
def test_unless_told_it_is_the_most_that_the_limit_allows(name, nodes):
    config = PRESETS[name]
    assert dispatch_bytes(config).total == dispatch_bytes(config, nodes).total
    assert ("topk_group" in dispatch_bytes(config).rows()[0]["keys"]) and (
        "topk_group" not in dispatch_bytes(config, nodes).rows()[0]["keys"]
    )


def test_a_width_that_128_does_not_divide_has_one_more_scale():
    ledger = dispatch_bytes(PRESETS["tiny"].replace(hidden_size=200), 1)
    assert [row["amount"] for row in ledger.rows()] == [200, 8, 400]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs n_routed_experts"):
        dispatch_bytes(PRESETS["llama-3.1-8b"])
    with pytest.raises(TypeError, match="ModelConfig"):
        dispatch_bytes("deepseek-v3")
    for nodes in (0, -1, 9, float("nan"), True, "4"):
        with pytest.raises(ValueError, match="num_experts_per_tok=8"):
            dispatch_bytes(V3, nodes)
    for sizes in ((256, 7, 8), (8, 4, 9)):
        with pytest.raises(ValueError, match="choose nodes that divide the experts"):
            expected_nodes(*sizes)
    for sizes in ((0, 1, 1), (8, 0, 1), (8, 4, 0), (8, 4, True), (8.0, 4, 2)):
        with pytest.raises(ValueError, match="choose a whole number >= 1"):
            expected_nodes(*sizes)
