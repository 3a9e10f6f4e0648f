"""A trace is what the routers computed: the same choice and weights, the choices without each rule, no traces left."""

import functools

import numpy
import pytest
import torch

import deepseek_lab as lab
from deepseek_lab.experts import Router, trace_routing

TINY = lab.PRESETS["tiny"]
V2 = TINY.replace(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
GREEDY = V2.replace(topk_method="greedy")


def model_with_bias(config, seed=0):
    torch.manual_seed(seed)
    model = lab.model.Transformer(config)
    for layer in model.expert_layers():
        if hasattr(layer.gate, "e_score_correction_bias"):
            layer.gate.e_score_correction_bias.normal_(std=0.2)
    return model


def text(config, count=40):
    return torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(1))


@functools.cache
def traced(config):
    return trace_routing(model_with_bias(config), text(config))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("config", [TINY, V2, GREEDY], ids=["v3", "v2", "greedy"])
def test_every_layer_is_traced_as_its_router_computes_it(config):
    model, heard = model_with_bias(config), {}
    for index, layer in enumerate(model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _m, x, out, index=index: heard.update({index: (x[0], out)}))
    trace = trace_routing(model, text(config))
    assert [at.layer for at in trace.layers] == [1, 2, 3] == list(heard)
    for at in trace.layers:
        router, (x, _) = model.layers[at.layer].mlp.gate, heard[at.layer]
        routing = router(x)
        assert torch.equal(at.chosen, routing.experts)
        assert torch.equal(at.weights, routing.weights)
        assert torch.equal(at.scores, routing.scores)
        assert not at.scores.requires_grad


@pytest.mark.parametrize("config", [TINY, V2, GREEDY], ids=["v3", "v2", "greedy"])
def test_the_choices_without_each_rule_are_those_of_a_router_without_it(config):
    for at in traced(config).layers:
        assert torch.equal(Router(config).choose(at.scores), at.without_bias)  # a fresh router's bias is zero
        free = at.selection.topk(config.num_experts_per_tok, dim=-1).indices
        assert torch.equal(at.without_groups, free)
        assert torch.equal(at.selection, at.scores + at.bias)
        assert bool(at.bias.any()) == (config is TINY)
    if config is TINY:
        assert not torch.equal(at.without_bias, at.chosen) and not torch.equal(at.without_groups, at.chosen)


@pytest.mark.parametrize("config", [TINY, V2, GREEDY], ids=["v3", "v2", "greedy"])
def test_every_pair_of_rules_has_the_choice_and_weights_of_such_a_router(config):
    model, tokens = model_with_bias(config), text(config)
    whole = config.replace(topk_group=config.n_group)
    for at in trace_routing(model, tokens).layers:
        for (bias, groups), choice in at.choices.items():
            router = Router(config if groups else whole)
            if bias and config is TINY:
                router.e_score_correction_bias.copy_(at.bias)
            assert torch.equal(router.choose(at.scores), choice.chosen)
            weights = at.scores.gather(1, choice.chosen)
            weights = weights / weights.sum(1, keepdim=True) if config.norm_topk_prob else weights
            torch.testing.assert_close(choice.weights, weights * config.routed_scaling_factor)
            assert choice.kept.all() or groups
            assert choice.kept.gather(1, at.groups[choice.chosen]).all() and choice.shares is None


def test_a_gate_with_a_policy_chooses_by_its_own_scores_whichever_rules_hold():
    model = model_with_bias(TINY)
    lab.model.apply_policy(model, lab.precision.PrecisionPolicy(wide=()))
    for at in trace_routing(model, text(TINY, 200)).layers:
        for (bias, groups), choice in at.choices.items():
            router = Router(TINY if groups else TINY.replace(topk_group=4))
            router.e_score_correction_bias.copy_(at.bias if bias else torch.zeros(16))
            assert torch.equal(router.choose(at.scores), choice.chosen)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, V2, TINY.replace(n_shared_experts=0)], ids=["v3", "v2", "none shared"])
def test_shares_are_what_each_expert_brings_measured_along_the_output(config):
    model, heard = model_with_bias(config), {}
    for index, layer in enumerate(model.layers[1:], 1):
        layer.mlp.register_forward_hook(lambda _m, x, out, index=index: heard.update({index: (x[0][0], out[0])}))
    trace = trace_routing(model, text(config), shares=True)
    for at in trace.layers:
        (x, output), mlp = heard[at.layer], model.layers[at.layer].mlp
        shares = at.choices[True, True].shares
        torch.testing.assert_close(shares.sum(1), torch.ones(40))
        shared = torch.zeros_like(x) if mlp.shared_experts is None else mlp.shared_experts(x)
        torch.testing.assert_close(shares[:, -1], (shared * output).sum(1) / output.square().sum(1))
        for token in (0, 17, 39):
            for place, expert in enumerate(at.chosen[token].tolist()):
                answer = mlp.experts(x[token : token + 1], torch.eye(16, dtype=torch.int64)[expert])[0]
                part = at.weights[token, place] * (answer @ output[token]) / output[token].square().sum()
                torch.testing.assert_close(shares[token, place], part, atol=1e-5, rtol=1e-4)
        assert not torch.equal(at.choices[True, False].shares, shares)


def test_chosen_experts_lie_in_kept_groups_and_the_number_of_kept_groups_is_the_limit():
    for config in (TINY, V2):
        for at in traced(config).layers:
            assert at.groups.tolist() == [expert // 4 for expert in range(16)]
            assert at.kept.sum(1).tolist() == [config.topk_group] * 40
            assert at.kept.gather(1, at.groups[at.chosen]).all()
    (at, *_) = traced(GREEDY).layers
    assert at.kept.shape == (40, 1) and at.kept.all() and not at.groups.any()


def test_a_bias_that_all_experts_share_changes_no_choice():
    at = traced(TINY).at(2)
    assert at.shared_bias == pytest.approx(at.bias.mean().item())
    torch.testing.assert_close(at.centred_selection + at.shared_bias, at.selection)
    assert torch.equal(Router(TINY.replace(topk_group=4)).choose(at.centred_selection), at.without_groups)


def test_the_span_holds_every_score_with_and_without_bias():
    trace = traced(TINY)
    low, high = trace.span
    values = torch.cat([v.flatten() for at in trace.layers for v in (at.scores, at.centred_selection)])
    assert (low, high) == (values.min().item(), values.max().item())


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = model_with_bias(TINY)
    trace_routing(model, text(TINY))
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="outside the vocabulary"):
        trace_routing(model, torch.full((1, 4), TINY.vocab_size))
    assert hooks(model) == 0


def test_the_model_and_the_random_numbers_are_as_before():
    model = model_with_bias(TINY)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, tokens = torch.get_rng_state(), text(TINY)
    trace = trace_routing(model, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    model.layers[1].mlp.gate.e_score_correction_bias.zero_()
    assert trace.at(1).bias.any(), "the trace keeps its own copy"
    assert torch.equal(trace.tokens, tokens[0])


def test_what_cannot_be_traced_is_refused_with_a_way_out():
    model = model_with_bias(TINY)
    with pytest.raises(ValueError, match=r"shape \(2, 5\); expected \[1, token\]"):
        trace_routing(model, torch.zeros(2, 5, dtype=torch.long))
    dense = lab.model.Transformer(TINY.replace(n_routed_experts=None))
    with pytest.raises(ValueError, match="no mixture-of-experts layers"):
        trace_routing(dense, text(TINY))
    with pytest.raises(ValueError, match="layer 0 has no router in this trace; choose one of 1, 2, 3"):
        traced(TINY).at(0)


@pytest.mark.parametrize("wrong", ["a text", [[1, 2]], numpy.ones((1, 2), int)])
def test_what_is_no_tensor_is_refused_with_how_to_make_one(wrong):
    says = (
        rf"trace_routing got {type(wrong).__name__}; expected a tensor \[1, token\]: .* tokenizer\.encode\(text\)\[None"
    )
    with pytest.raises(TypeError, match=says):
        trace_routing(model_with_bias(TINY), wrong)


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_a_model_of_one_expert_per_group_can_be_traced_and_can_write(monkeypatch, kernels):
    monkeypatch.setenv("LAB_KERNELS", kernels)
    for count, chosen in ((1, 1), (4, 2)):
        config = TINY.replace(n_routed_experts=count, n_group=count, topk_group=count, num_experts_per_tok=chosen)
        model = model_with_bias(config)
        (at, *_) = trace_routing(model, text(config)).layers
        assert at.kept.all() and torch.equal(at.chosen, at.without_groups)
        assert lab.generation.generate(model, text(config), 5).shape == (1, 45)
