"""Every token gets the weighted answers of its experts, whatever way they are computed."""

import pytest
import references
import torch
import torch.nn.functional as F
from references import difference

from deepseek_lab.experts import ExpertLayer, Routing
from deepseek_lab.experts import layer as module
from deepseek_lab.experts.layer import Combine, Dispatch, grouped_linear, over_capacity
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


@pytest.mark.parametrize("tokens", [2, 300])
def test_all_tokens_may_go_to_one_expert(tokens):
    layer = references.fill(ExpertLayer(ALIGNED.replace(num_experts_per_tok=1, n_group=1, topk_group=1)))
    layer.gate.e_score_correction_bias[5] += 100
    x = draw(1, tokens, 24).requires_grad_()
    out = layer(x)
    assert difference(out, by_definition(layer, x.detach())) < 1e-5
    assert layer.load.tolist() == [0, 0, 0, 0, 0, tokens, 0, 0]
    out.square().sum().backward()
    norms = layer.experts.down_proj.grad.flatten(1).norm(dim=1)
    assert norms[5] > 0 and norms.count_nonzero() == 1 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_an_empty_batch_gives_an_empty_answer(layer, shape, capacity):
    layer.capacity_factor = capacity
    x = torch.empty(*shape, layer.gate.config.hidden_size, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    assert layer.load.tolist() == [0] * 8
    with torch.no_grad():
        assert layer(x).shape == x.shape


@pytest.mark.parametrize("tokens", [2, 60])
def test_a_token_that_is_no_number_stays_alone(layer, tokens):
    x = draw(1, tokens, layer.gate.config.hidden_size)
    with torch.no_grad():
        clean = layer(x)
        x[0, 1] = float("nan")
        got = layer(x)
    assert got[0, 1].isnan().all()
    others = [i for i in range(tokens) if i != 1]
    assert difference(got[:, others], clean[:, others]) < 1e-6


@pytest.mark.parametrize("tokens", [2, 3, 60])
def test_a_bias_that_changes_no_choice_leaves_every_bit_of_the_answer(layer, tokens):
    x, bias = draw(1, tokens, layer.gate.config.hidden_size), layer.gate.e_score_correction_bias
    bias[2] += 5  # all take expert 2 first, however much larger its bias gets
    with torch.no_grad():
        before, chosen = layer(x), layer._chosen
        bias[2] += 7
        bias -= 0.25  # nor does it matter what all have in common
        assert torch.equal(layer(x), before) and torch.equal(layer._chosen, chosen)
        bias[chosen[0, -1]] -= 20  # a bias that does change a choice
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize("method", [{}, dict(norm_topk_prob=False)], ids=["normalised", "plain"])
def test_a_bias_that_only_reorders_the_chosen_leaves_every_bit_of_the_answer(tokens, method):
    layer = references.fill(ExpertLayer(ALIGNED.replace(n_group=1, topk_group=1, num_experts_per_tok=6, **method)))
    x, bias = draw(1, tokens, 24), layer.gate.e_score_correction_bias
    with torch.no_grad():
        orders = []
        for few in ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6, 0.1, 0.5, 0.2, 0.4, 0.3]):
            bias.copy_(torch.tensor([*few, -1.0, -1.0]))  # always the first six
            orders.append((layer.gate(x[0]), layer(x)))
    (one, answer), (other, again) = orders
    assert torch.equal(one.experts.sort().values, other.experts.sort().values)
    assert not torch.equal(one.experts, other.experts)
    assert torch.equal(answer, again)


def test_a_layer_that_is_called_meanwhile_answers_all_the_same(layer, monkeypatch):
    """What a second thread does: its tokens are routed between another's routing and answer."""
    x, others = draw(1, 30, layer.gate.config.hidden_size), draw(1, 50, layer.gate.config.hidden_size, seed=1)
    expected, moving = layer(x), module.moving
    meanwhile = [others]

    def interrupted(rows):
        if meanwhile:
            layer(meanwhile.pop())
        return moving(rows)

    monkeypatch.setattr(module, "moving", interrupted)
    assert torch.equal(layer(x), expected) and not meanwhile


def test_weights_keep_their_float32_in_a_bf16_layer():
    layer = references.fill(ExpertLayer(ALIGNED)).bfloat16()
    x = draw(50, 24).bfloat16()
    one = layer.gate(x)._replace(weights=torch.ones(50, 4))
    slightly = one._replace(weights=torch.full((50, 4), 1 + 2.0**-9))  # which BF16 rounds to 1
    assert not torch.equal(layer._routed(x, one), layer._routed(x, slightly))


def crowded(capacity, tokens=40, config=ALIGNED):
    """A layer in training whose first groups are busier than the others, and what it reads."""
    layer = references.fill(ExpertLayer(config.replace(n_group=4, topk_group=4, num_experts_per_tok=2))).train()
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.3, 0.2, 0.0, 0.1, -0.1, 0.0, -0.2, 0.0]))
    layer.capacity_factor = capacity
    return layer, draw(1, tokens, config.hidden_size)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.2])
def test_a_device_over_its_capacity_drops_the_choices_with_the_lowest_scores(capacity):
    layer, x = crowded(capacity)
    routing = layer.gate(x[0])
    dropped = over_capacity(routing, 4, capacity)
    room = -(-capacity * 80 // 4)
    affinity = routing.scores.gather(1, routing.experts)
    for device in range(4):
        here = routing.experts // 2 == device
        assert (here & ~dropped).sum() == min(here.sum(), room)
        if (here & dropped).any():
            assert affinity[here & dropped].max() <= affinity[here & ~dropped].min()
    assert 0 < dropped.sum() < 80


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("config", [ALIGNED, ODD], ids=["aligned", "odd"])
def test_a_dropped_choice_adds_nothing_and_the_others_count_as_before(config, tokens):
    layer, x = crowded(1.0, tokens, config)
    routing = layer.gate(x[0])
    dropped = over_capacity(routing, 4, 1.0)
    kept = routing._replace(weights=routing.weights.masked_fill(dropped, 0.0))
    whole = layer.shared_experts(x)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            got = layer(x)
            assert layer.dropped == dropped.sum() > 0
            assert layer.load.tolist() == torch.bincount(routing.experts.flatten(), minlength=8).tolist()
            layer.capacity_factor = None
            expected = layer._routed(x[0], kept)[None] + whole
            assert difference(got, expected) < 1e-6
            assert layer.dropped == 0
            layer.capacity_factor = 1.0


def test_a_dropped_choice_has_no_gradient():
    layer, x = crowded(1.0)
    routing = layer.gate(x[0])
    dropped = over_capacity(routing, 4, 1.0)
    weights = routing.weights.detach().clone().requires_grad_()
    layer._routed(x[0], routing._replace(weights=weights)).square().sum().backward()
    assert (weights.grad[dropped] == 0).all() and (weights.grad[~dropped] != 0).all()
    layer.capacity_factor = 1e-9  # room for one choice on each device
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.dropped == 80 - 4
    idle = layer.experts.down_proj.grad.flatten(1).norm(dim=1) == 0
    assert idle.sum() == 4  # one expert of each pair


def test_nothing_is_dropped_outside_training_with_room_for_all_or_by_default():
    layer, x = crowded(None)
    free = layer(x)
    assert layer.dropped == 0
    for plenty in (4.0, 1e308):  # as much room as there are slots, and more
        layer.capacity_factor = plenty
        assert torch.equal(layer(x), free) and layer.dropped == 0
    layer.capacity_factor = 1.0
    assert not torch.equal(layer(x), free) and layer.dropped > 0
    assert torch.equal(layer.eval()(x), free) and layer.dropped == 0


def test_capacities_that_mean_nothing_are_refused():
    layer, x = crowded(0.0)
    with pytest.raises(ValueError, match=r"capacity_factor=0\.0; choose a number above 0"):
        layer(x)
    greedy = ALIGNED.replace(topk_method="greedy", n_group=3)  # a plain choice asks for no groups
    layer = references.fill(ExpertLayer(greedy)).train()
    layer(x)
    layer.capacity_factor = 1.0
    with pytest.raises(ValueError, match="n_group=3 does not divide 8 experts"):
        layer(x)


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


def test_rows_go_to_their_slots_and_come_back_weighted():
    x, (order, back), weights = draw(5, 3), slots(5, 2), draw(5, 2, seed=1)
    sent = Dispatch.apply(x, order, back, 2)
    assert all(torch.equal(sent[i], x[slot // 2]) for i, slot in enumerate(order.tolist()))
    assert torch.equal(Combine.apply(sent, weights, order, back), weights[:, :1] * x + weights[:, 1:] * x)


@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (4, 3), (5, 2)])
def test_moving_rows_has_the_right_gradients_and_those_have_theirs(tokens, choices):
    order, back = slots(tokens, choices)
    x, rows, weights = (
        draw(*shape, dtype=torch.float64).requires_grad_()
        for shape in [(tokens, 3), (tokens * choices, 3), (tokens, choices)]
    )
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: Dispatch.apply(x, order, back, choices), x)
        assert check(lambda rows, weights: Combine.apply(rows, weights, order, back), (rows, weights))


def test_compiled_kernels_move_rows_and_a_gradient_of_a_gradient_is_not_theirs(monkeypatch):
    (order, back), moved = slots(6, 2), {}
    for body in ("reference", "numba"):
        monkeypatch.setenv("LAB_KERNELS", body)
        x, weights = draw(6, 40).requires_grad_(), draw(6, 2, seed=1).requires_grad_()
        assert module.moving(x).__name__.endswith({"reference": ".reference", "numba": ".numba_cpu"}[body])
        assert module.moving(x.double()) is module.moving(x.half()) is module.kernels.reference
        out = Combine.apply(Dispatch.apply(x, order, back, 2).tanh(), weights, order, back)
        first = torch.autograd.grad(out.square().sum(), (x, weights), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (x, weights))
        again = torch.autograd.grad(Combine.apply(x.tanh().repeat(2, 1), weights, order, back).sum(), (x, weights))
        moved[body] = out, *first, *second, *again
    assert all(map(torch.equal, moved["numba"], moved["reference"]))
    assert all(part.abs().sum() > 0 for part in moved["numba"])


def test_every_body_of_the_kernels_trains_the_layer_alike(layer, monkeypatch):
    x, found = draw(2, 20, layer.gate.config.hidden_size), {}
    for body in ("reference", "numba"):
        monkeypatch.setenv("LAB_KERNELS", body)
        layer.zero_grad()
        out = layer(x)
        out.square().sum().backward()
        found[body] = out, *(weight.grad for weight in layer.parameters())
    assert all(map(torch.equal, found["numba"], found["reference"]))


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
