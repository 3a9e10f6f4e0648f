"""Every token gets the weighted answers of its experts, whatever way they are computed."""

import pytest
import references
import torch
import torch.nn.functional as F
from references import difference

from deepseek_lab.experts import ExpertLayer, Routing
from deepseek_lab.experts import layer as module
from deepseek_lab.experts.layer import Dispatch, Permute, grouped_linear
from deepseek_lab.presets import PRESETS

ALIGNED = PRESETS["tiny"].replace(hidden_size=24, moe_intermediate_size=12, n_routed_experts=8)
ODD = ALIGNED.replace(hidden_size=23, moe_intermediate_size=7)
SHARED = ALIGNED.replace(n_shared_experts=3)
ALONE = ALIGNED.replace(n_shared_experts=0)
CONFIGS = {"aligned": ALIGNED, "odd": ODD, "three shared": SHARED, "none shared": ALONE}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=CONFIGS)
def layer(request):
    return references.fill(ExpertLayer(CONFIGS[request.param]))


@torch.no_grad()
def by_definition(layer, x):
    """DeepSeek-V3 report, equation 12, without the residual: one token and one expert at a time, in float64."""
    routing, experts = layer.gate(x.flatten(0, -2)), layer.experts
    rows = []
    for token, chosen, weights in zip(
        x.flatten(0, -2).double(), routing.experts, routing.weights.double(), strict=True
    ):
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = (experts.gate_up_proj[expert].double() @ token).chunk(2)
            row += weight * (experts.down_proj[expert].double() @ (F.silu(gate) * up))
        if layer.shared_experts is not None:
            s = {name: p.double() for name, p in layer.shared_experts.named_parameters()}
            wide = F.silu(s["gate_proj.weight"] @ token) * (s["up_proj.weight"] @ token)
            row += s["down_proj.weight"] @ wide
        rows.append(row)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("shape", [(2, 20), (1, 1), (3, 1), (1, 4), (1, 5), (2, 3, 4)])
def test_a_layer_computes_what_the_equation_says(layer, shape):
    x = draw(*shape, layer.gate.config.hidden_size)
    expected = by_definition(layer, x)
    assert difference(layer(x), expected) < 1e-5  # with gradients: always sorted
    with torch.no_grad():
        assert difference(layer(x), expected) < 1e-5  # without: few tokens take the direct way


@torch.no_grad()
def test_the_direct_way_equals_the_sorted_way(layer, monkeypatch):
    x = draw(4, layer.gate.config.hidden_size)
    direct = layer(x)
    monkeypatch.setattr(ExpertLayer, "FEW", 0)
    assert difference(layer(x), direct) < 1e-6


def test_the_loop_over_experts_equals_the_grouped_product(monkeypatch):
    x, weights = draw(30, 24), draw(5, 12, 24, seed=1)
    ends = torch.tensor([7, 7, 19, 20, 30], dtype=torch.int32)  # one expert without any token
    calls, fused = [], F.grouped_mm
    monkeypatch.setattr(module.F, "grouped_mm", lambda *a, **k: calls.append(1) or fused(*a, **k))
    grouped = grouped_linear(x, weights, ends)
    assert calls
    monkeypatch.delattr(module.F, "grouped_mm")
    looped = grouped_linear(x, weights, ends)
    assert difference(looped, grouped) < 1e-6
    rows = torch.cat([x[a:b] @ w.T for a, b, w in zip([0, 7, 7, 19, 20], ends.tolist(), weights, strict=True)])
    assert difference(grouped, rows) < 1e-6


@pytest.mark.parametrize("width", [23, 24])
@pytest.mark.parametrize("load", [[0, 0, 6], [6, 0, 0], [0, 6, 0], [2, 2, 2], [0, 0, 0]])
def test_empty_experts_are_no_trouble_forwards_or_backwards(load, width):
    x, weights = draw(sum(load), width).requires_grad_(), draw(3, 12, width, seed=1).requires_grad_()
    out = grouped_linear(x, weights, torch.tensor(load).cumsum(0, dtype=torch.int32))
    assert out.shape == (sum(load), 12)
    out.square().sum().backward()
    idle = torch.tensor(load) == 0
    assert (weights.grad[idle] == 0).all() and (weights.grad[~idle].flatten(1).norm(dim=1) > 0).all()


def test_loads_count_the_tokens_of_each_expert(layer):
    x = draw(2, 20, layer.gate.config.hidden_size)
    layer(x)
    chosen = layer.gate(x.flatten(0, 1)).experts.flatten().tolist()
    assert layer.load.tolist() == [chosen.count(expert) for expert in range(8)]
    assert layer.load.sum() == 40 * layer.gate.config.num_experts_per_tok
    assert layer.load.dtype == torch.int64


def test_a_layer_that_has_seen_nothing_has_no_load():
    with pytest.raises(ValueError, match="routed nothing yet"):
        _ = ExpertLayer(ALIGNED).load


@pytest.mark.parametrize("tokens", [3, 500])
def test_no_token_is_dropped_when_all_choose_the_same_experts(layer, tokens):
    layer.gate.e_score_correction_bias[:4] += 100  # two groups of two: all tokens, the same four experts
    x = draw(1, tokens, layer.gate.config.hidden_size)
    expected = by_definition(layer, x)
    with torch.no_grad():
        assert difference(layer(x), expected) < 1e-5
    assert layer.load.tolist() == 4 * [tokens] + 4 * [0]


def test_several_shared_experts_are_one_wider_network():
    layer = references.fill(ExpertLayer(SHARED))
    assert layer.shared_experts.up_proj.weight.shape == (3 * 12, 24)
    assert ExpertLayer(ALONE).shared_experts is None


def test_a_tokens_answer_does_not_depend_on_its_neighbours(layer):
    x = draw(1, 30, layer.gate.config.hidden_size)
    with torch.no_grad():
        whole = layer(x)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
        assert difference(layer(x[:, order]), whole[:, order]) < 1e-5
        assert difference(layer(x[:, :9]), whole[:, :9]) < 1e-5


def slots(tokens, choices, seed=0):
    """A random sorting of tokens * choices slots: (order, its inverse)."""
    order = torch.randperm(tokens * choices, generator=torch.Generator().manual_seed(seed))
    return order, order.argsort()


def test_dispatch_and_permute_move_rows_where_they_say():
    x, (order, back) = draw(5, 3), slots(5, 2)
    sent = Dispatch.apply(x, order, back, 2)
    assert all(torch.equal(sent[i], x[slot // 2]) for i, slot in enumerate(order.tolist()))
    assert torch.equal(Permute.apply(sent, back, order), x.repeat_interleave(2, 0))


@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (4, 3), (5, 2)])
def test_dispatch_and_permute_have_the_right_gradients(tokens, choices):
    order, back = slots(tokens, choices)
    x = draw(tokens, 3, dtype=torch.float64).requires_grad_()
    rows = draw(tokens * choices, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Dispatch.apply(x, order, back, choices), x)
    assert torch.autograd.gradcheck(lambda rows: Permute.apply(rows, back, order), rows)


def test_the_whole_routed_path_has_the_right_gradients():
    # In float64, with the choices held still: at a tie between experts there is no gradient to check.
    layer = references.fill(ExpertLayer(ODD.replace(hidden_size=5, moe_intermediate_size=3))).double()
    x = draw(6, 5, dtype=torch.float64).requires_grad_()
    scores = draw(6, 8, dtype=torch.float64).sigmoid().requires_grad_()
    experts = layer.gate.choose(scores.detach())

    def answer(x, scores, gate_up_proj, down_proj):
        layer.experts.gate_up_proj, layer.experts.down_proj = gate_up_proj, down_proj
        chosen = scores.gather(1, experts)
        return layer._routed(x, Routing(experts, chosen / chosen.sum(-1, keepdim=True), scores))

    weights = layer.experts.gate_up_proj.data, layer.experts.down_proj.data
    del layer.experts.gate_up_proj, layer.experts.down_proj
    assert torch.autograd.gradcheck(answer, (x, scores, *(w.clone().requires_grad_() for w in weights)))
