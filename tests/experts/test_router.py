"""Who is chosen, and how much each counts: the published rules on scores made to tell them apart."""

import pytest
import references
import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deepseek_lab.experts import Router
from deepseek_lab.experts.router import largest
from deepseek_lab.presets import PRESETS

TINY = PRESETS["tiny"]
# Oracles computed from the released gate code: DeepSeek-V3 inference/model.py.
NEGATIVE_BIAS = dict(
    scores=[0.9, 0.8, 0.1, 0.2, 0.7, 0.4, 0.3, 0.6], biased=[0.4, -0.1, -0.5, -0.6, 0.3, -0.2, -0.3, -0.4],
    experts=[0, 4, 1], weights=[0.9375, 0.7291667, 0.8333334],
)  # fmt: skip
CASE_16 = dict(
    scores=[0.11, 0.52, 0.43, 0.24, 0.95, 0.16, 0.07, 0.38, 0.29, 0.6, 0.61, 0.12, 0.83, 0.14, 0.45, 0.56],
    bias=[0, 0.05, 0, 0, -0.4, 0, 0, 0, 0.1, 0, 0, 0, 0, 0, 0, 0],
    experts=[12, 10, 9, 15], weights=[0.7980769, 0.5865384, 0.5769231, 0.5384615],
    unbiased_experts=[4, 12, 15, 14], unbiased_weights=[0.8512545, 0.7437276, 0.5017921, 0.4032258],
)  # fmt: skip


def router(experts, choices, groups, kept, **changes) -> Router:
    """A gate on as many hidden values as experts, whose weight is the identity: x holds the logits."""
    config = TINY.replace(hidden_size=experts, n_routed_experts=experts, num_experts_per_tok=choices, n_group=groups,
                          topk_group=kept, **changes)  # fmt: skip
    gate = Router(config)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(experts))
    return gate


def logits(scores) -> torch.Tensor:
    """What the sigmoid turns into these scores, [1, expert]."""
    return torch.tensor([scores]).logit()


def route(gate, scores, bias=None):
    if bias is not None:
        gate.e_score_correction_bias.copy_(torch.as_tensor(bias))
    return gate(logits(scores))


def random_x(gate, tokens=64, seed=0):
    return torch.randn(tokens, gate.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def test_experts_of_a_dropped_group_lose_against_negative_scores():
    case = NEGATIVE_BIAS
    bias = torch.tensor(case["biased"]) - torch.tensor(case["scores"])
    routing = route(router(8, 3, 4, 2), case["scores"], bias)
    assert routing.experts.tolist() == [case["experts"]]
    torch.testing.assert_close(routing.weights, torch.tensor([case["weights"]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(routing.scores, torch.tensor([case["scores"]]))


@pytest.mark.parametrize("biased", [True, False])
def test_the_bias_decides_groups_and_experts_while_weights_stay_unbiased(biased):
    kind = "" if biased else "unbiased_"
    routing = route(router(16, 4, 4, 2), CASE_16["scores"], CASE_16["bias"] if biased else [0.0] * 16)
    assert routing.experts.tolist() == [CASE_16[kind + "experts"]]
    torch.testing.assert_close(routing.weights, torch.tensor([CASE_16[kind + "weights"]]), rtol=1e-5, atol=0)


def published_router(kind, config, bias=None):
    """The router of `transformers` with these settings and our weights: x -> {expert: weight} per token."""
    config_class, router_class = {
        "v3": (transformers.DeepseekV3Config, DeepseekV3TopkRouter),
        "v2": (transformers.DeepseekV2Config, DeepseekV2TopkRouter),
    }[kind]
    names = "hidden_size n_routed_experts num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor"
    settings = {name: getattr(config, name) for name in names.split()}
    heads = dict(num_attention_heads=2, num_key_value_heads=2)  # of the whole model, refused if they do not divide it
    router = router_class(config_class(**settings, **heads, topk_method=config.topk_method))
    if bias is not None:
        router.e_score_correction_bias.copy_(bias)
    return router


def by_expert(experts, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The same choices in the order of the experts: what is compared as a set."""
    experts, order = experts.sort(dim=-1)
    return experts, weights.gather(1, order)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("experts, choices, groups, kept", [(16, 4, 4, 2), (32, 6, 8, 3), (24, 8, 4, 4), (12, 2, 1, 1)])
@pytest.mark.parametrize("kind", ["v3", "v3 unnormalised", "v2", "v2-lite"])
def test_routing_is_the_published_one_also_where_biased_scores_are_negative(kind, experts, choices, groups, kept, seed):
    generator = torch.Generator().manual_seed(seed)
    changes = {
        "v3": dict(norm_topk_prob=True),
        "v3 unnormalised": dict(norm_topk_prob=False),
        "v2": dict(topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False),
        "v2-lite": dict(topk_method="greedy", scoring_func="softmax", norm_topk_prob=False),
    }[kind]
    gate, bias = router(experts, choices, groups, kept, **changes, routed_scaling_factor=2.5), None
    gate.weight.data = torch.randn(experts, experts, generator=generator) / experts**0.5
    if kind.startswith("v3"):
        bias = 0.25 * torch.randn(experts, generator=generator) - 0.9
        gate.e_score_correction_bias.copy_(bias)
    published = published_router(kind[:2], gate.config, bias)
    published.weight.data = gate.weight.data
    x = torch.randn(500, experts, generator=generator)
    routing = gate(x)
    if bias is not None:  # the case that a fill of zero gets wrong
        assert ((routing.scores + bias).gather(1, routing.experts) < 0).any(dim=1).float().mean() > 0.2
    _, their_weights, their_experts = published(x)
    ours, theirs = by_expert(routing.experts, routing.weights), by_expert(their_experts, their_weights)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)


def in_order(values, count):
    """The definition: the highest first, and of equals the lower index."""
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:count] for row in values.tolist()]


@pytest.mark.parametrize("rows", [1, 5, 400])  # few are sorted, many are searched
@pytest.mark.parametrize("width, count", [(16, 4), (16, 16), (40, 8), (3, 1)])
def test_of_equal_scores_the_lower_index_wins(rows, width, count):
    draw = torch.rand(rows, width, generator=torch.Generator().manual_seed(rows))
    for values in (draw, (4 * draw).round() / 4, (4 * draw).round() / 4 - 2, torch.zeros(rows, width)):
        assert largest(values, count).tolist() == in_order(values, count)
        assert torch.equal(largest(values[None], count)[0], largest(values, count))
    values = draw.where(draw > 0.5, -torch.inf)
    values[:, :count] = 0.25 * torch.rand(rows, count)  # always enough that are finite
    assert largest(values, count).tolist() == in_order(values, count)


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy", "greedy"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_a_router_that_knows_nothing_takes_the_first_experts_of_the_first_groups(method, tokens):
    gate = Router(TINY.replace(topk_method=method))
    torch.nn.init.zeros_(gate.weight)
    x = torch.randn(tokens, TINY.hidden_size)
    assert gate(x).experts.tolist() == tokens * [[0, 1, 2, 3]]


@pytest.mark.parametrize("tokens", [1, 4, 200])
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_a_score_that_is_no_number_makes_its_token_none_and_touches_no_other(kind, tokens):
    v2 = dict(topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False)
    gate = references.fill(Router(TINY.replace(hidden_size=16, **(v2 if kind == "v2" else {}))))
    gate.weight.data = torch.eye(16)  # x holds the logits
    x = random_x(gate, tokens)
    clean = gate(x)
    x[0, 7] = float("nan")
    routing = gate(x)
    assert routing.weights[0].isnan().any() and routing.experts.min() >= 0 and routing.experts.max() < 16
    assert all(len(set(row)) == 4 for row in routing.experts.tolist())
    assert torch.equal(routing.weights[1:], clean.weights[1:]) and torch.equal(routing.experts[1:], clean.experts[1:])


def test_no_token_at_all_is_routed_nowhere():
    routing = references.fill(Router(TINY))(torch.empty(0, TINY.hidden_size))
    assert [tuple(part.shape) for part in routing] == [(0, 4), (0, 4), (0, 16)]


def test_more_choices_than_the_kept_groups_hold_are_refused():
    with pytest.raises(ValueError, match="topk_group=2 groups of 4 experts cannot supply num_experts_per_tok=9"):
        TINY.replace(num_experts_per_tok=9)
    assert TINY.replace(num_experts_per_tok=8, topk_group=2)  # exactly all that are left
    gate = references.fill(Router(TINY.replace(num_experts_per_tok=8)))
    experts = gate(random_x(gate)).experts
    assert all(len(set(row)) == 8 and len({expert // 4 for expert in row}) == 2 for row in experts.tolist())


@pytest.mark.parametrize("normalised", [True, False])
def test_the_router_of_before_is_a_softmax_with_a_plain_choice(normalised):
    before = dict(topk_method="greedy", scoring_func="softmax", norm_topk_prob=normalised, routed_scaling_factor=1.0)
    gate = references.fill(Router(TINY.replace(**before)))
    x = random_x(gate)
    chances, routing = (x @ gate.weight.T).softmax(-1), gate(x)
    kept = chances.topk(4)
    assert torch.equal(routing.experts, kept.indices)
    expected = kept.values / kept.values.sum(-1, keepdim=True) if normalised else kept.values
    torch.testing.assert_close(routing.weights, expected)
    assert type(gate.config).from_hf(gate.config.to_hf()) == gate.config


def test_v3_ranks_groups_by_their_two_best_and_v2_by_the_best():
    #         group 0     group 1     group 2
    scores = [0.70, 0.05, 0.50, 0.45, 0.40, 0.39]
    v3 = route(router(6, 2, 3, 1), scores)
    assert v3.experts.tolist() == [[2, 3]]  # 0.95 beats 0.79 and 0.75
    v2 = router(6, 2, 3, 1, topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False)
    assert v2(torch.tensor([scores]).log()).experts.tolist() == [[0, 1]]  # 0.70 is the best of all


def test_v2_weights_are_softmax_scores_times_the_scaling_factor():
    gate = router(6, 2, 3, 2, topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False,
                  routed_scaling_factor=16.0)  # fmt: skip
    x = random_x(gate)
    routing = gate(x)
    torch.testing.assert_close(routing.weights, 16 * x.softmax(-1).gather(1, routing.experts))
    assert not hasattr(gate, "e_score_correction_bias")


def test_v3_weights_sum_to_the_scaling_factor():
    gate = references.fill(Router(TINY))
    assert torch.allclose(gate(random_x(gate)).weights.sum(-1), torch.tensor(2.5))
    plain = references.fill(Router(TINY.replace(norm_topk_prob=False, routed_scaling_factor=3.0)))
    routing = plain(random_x(plain))
    torch.testing.assert_close(routing.weights, 3 * routing.scores.gather(1, routing.experts))


def test_greedy_ignores_groups():
    gate = router(8, 3, 4, 1, topk_method="greedy")
    x = random_x(gate)
    assert torch.equal(gate(x).experts, x.topk(3).indices)


def test_keeping_all_groups_restricts_nothing():
    gate = router(8, 3, 4, 4)
    gate.e_score_correction_bias.copy_(0.2 * random_x(gate, 1)[0])
    x = random_x(gate)
    assert torch.equal(gate(x).experts, (x.sigmoid() + gate.e_score_correction_bias).topk(3).indices)


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy"])
def test_no_token_leaves_its_groups_and_the_best_come_first(method):
    gate = references.fill(Router(TINY.replace(topk_method=method)))
    scores = gate(random_x(gate)).scores
    experts = gate.choose(scores)
    assert all(len(set((row // 4).tolist())) <= TINY.topk_group for row in experts)
    assert all(len(set(row.tolist())) == TINY.num_experts_per_tok for row in experts)
    ranked = scores + gate.e_score_correction_bias if method == "noaux_tc" else scores
    assert (ranked.gather(1, experts).diff(dim=-1) <= 0).all()


def test_a_bias_that_changes_no_choice_changes_no_weight():
    gate = references.fill(Router(TINY))
    x = random_x(gate)
    before = gate(x)
    gate.e_score_correction_bias += 0.75  # the same for all: no order changes
    after = gate(x)
    assert torch.equal(before.experts, after.experts)
    assert torch.equal(before.weights, after.weights)
    gate.e_score_correction_bias[3] += 5
    assert (gate(x).experts == 3).any(dim=1).all()  # now everyone takes expert 3 ...
    assert torch.allclose(gate(x).weights.sum(-1), torch.tensor(2.5))
    assert torch.equal(gate(x).scores, before.scores)  # ... at its own score


def test_the_gate_learns_from_its_weights_and_the_bias_has_no_gradient():
    gate = references.fill(Router(TINY))
    target = torch.randn(64, TINY.num_experts_per_tok, generator=torch.Generator().manual_seed(1))
    (gate(random_x(gate)).weights * target).sum().backward()
    assert gate.weight.grad.abs().max() > 0
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    assert not gate.e_score_correction_bias.requires_grad


def test_scores_are_float32_in_a_bf16_model():
    gate = references.fill(Router(TINY))
    x = random_x(gate).bfloat16()
    rounded = gate.weight.detach().bfloat16().float()
    gate.weight.data = gate.weight.data.bfloat16()
    routing = gate(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.scores, (x.float() @ rounded.T).sigmoid())


def test_autocast_takes_no_bits_of_the_scores():
    gate = references.fill(Router(TINY))
    x = random_x(gate)
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x)
    assert all(map(torch.equal, routing, gate(x))) and routing.weights.dtype == torch.float32
