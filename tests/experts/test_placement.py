"""Experts on devices: DeepSeek's published example, what holds for any load, and bytes that a real FP8 row has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepseek_lab as lab
from deepseek_lab.experts import (
    LayerTraffic,
    Router,
    balanced_packing,
    place,
    replicate_experts,
    trace_routing,
    trace_traffic,
    traffic,
)
from deepseek_lab.precision import quantize_tiles

# The example in the README of the EPLB repository: two layers of twelve experts.
LOAD = torch.tensor(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
V3, TINY = lab.PRESETS["deepseek-v3"], lab.PRESETS["tiny"]


def chosen(config, tokens=2_000, seed=0):
    """What a router without weights chooses from uniform scores."""
    with torch.device("meta"):
        router = Router(config)
    router.e_score_correction_bias = torch.zeros(config.n_routed_experts)
    return router.choose(torch.rand(tokens, config.n_routed_experts, generator=torch.Generator().manual_seed(seed)))


def test_the_published_example_is_placed_as_published():
    placed = place(LOAD, replicas=16, groups=4, nodes=2, gpus=8)
    assert placed.policy == "hierarchical"
    assert placed.experts.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placed.copies.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert placed.gpu_load[0].tolist() == [121.5, 86.5, 125.0, 113.0, 147.5, 131.5, 156.0, 152.0]
    assert placed.gpu_load[1].tolist() == [173.0, 179.5, 120.5, 172.0, 123.0, 152.0, 118.5, 117.5]
    assert placed.max_over_mean.tolist() == pytest.approx([1.20813, 1.24221], abs=1e-5)


def test_where_nodes_do_not_divide_the_groups_both_are_ignored():
    placed = place(LOAD, replicas=16, groups=4, nodes=3, gpus=8)
    assert placed.policy == "global"
    assert placed.experts.tolist() == [
        [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
        [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
    ]
    assert placed.copies.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1]]
    assert placed.gpu_load[0].tolist() == [130.5, 95.5, 130.0, 138.0, 138.5, 134.5, 134.0, 132.0]
    assert placed.gpu_load[1].tolist() == [123.0, 123.0, 125.5, 118.5, 172.0, 157.5, 172.0, 164.5]
    assert placed.max_over_mean.tolist() == pytest.approx([1.07260, 1.19031], abs=1e-5)
    assert torch.equal(placed.experts, place(LOAD, 16, 1, 1, 8).experts)


@st.composite
def problems(draw):
    groups, size, nodes, per_node = (draw(st.sampled_from(s)) for s in ([1, 2, 4, 6], [1, 2, 5], [1, 2, 3], [1, 2, 4]))
    gpus, count = nodes * per_node, groups * size
    replicas = (-(-count // gpus) + draw(st.integers(0, 2))) * gpus
    tokens = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 2**40))
    layers = draw(st.lists(st.lists(tokens, min_size=count, max_size=count), min_size=1, max_size=2))
    return torch.tensor(layers), replicas, groups, nodes, gpus


@settings(max_examples=150, deadline=None)
@given(problems())
def test_any_load_is_placed_whole_and_evenly(problem):
    load, replicas, groups, nodes, gpus = problem
    placed = place(*problem)
    layers, count = load.shape
    assert placed.experts.shape == (layers, replicas) and placed.gpu_load.shape == (layers, gpus)
    assert placed.copies.sum(1).tolist() == [replicas] * layers and placed.copies.min() >= 1
    for holds, copies, slots_of in zip(placed.experts, placed.copies, placed.slots_of, strict=True):
        assert torch.equal(holds.bincount(minlength=count), copies)
        for expert, slots in enumerate(slots_of.tolist()):
            number = copies[expert].item()
            assert slots[:number] == [slot for slot, held in enumerate(holds.tolist()) if held == expert]
            assert slots[number:] == [-1] * (len(slots) - number)
    assert placed.gpu_load.sum(1).tolist() == pytest.approx(load.sum(1).tolist())
    assert placed.policy == ("global" if groups % nodes else "hierarchical")
    if placed.policy == "hierarchical":
        homes = torch.arange(replicas) // (replicas // nodes)
        for holds in placed.experts // (count // groups):
            for group in range(groups):
                assert len(homes[holds == group].unique()) == 1
    assert torch.equal(placed.experts, place(*problem).experts)


def test_copies_go_where_the_load_is():
    load = torch.tensor([[1_000.0, 10, 10, 10, 10, 10, 10, 10]])
    once, twice = place(load, 8, 1, 1, 4), place(load, 12, 1, 1, 4)
    assert twice.copies.tolist() == [[5, 1, 1, 1, 1, 1, 1, 1]]
    assert once.max_over_mean.item() > 3.7 and twice.max_over_mean.item() < 1.6


def test_counts_above_two_to_the_24_keep_their_last_digits():
    assert replicate_experts(torch.tensor([2**24, 2**24 + 1], dtype=torch.float64), 3).tolist() == [0, 1, 1]
    assert place(torch.tensor([[2**24, 2**24 + 1]]), 3, 1, 1, 1).copies.tolist() == [[1, 2]]


def test_the_heaviest_goes_where_there_is_least_and_the_first_of_equals_wins():
    assert balanced_packing(torch.tensor([1.0, 5, 4, 3]), 2).tolist() == [[1, 0], [2, 3]]
    assert balanced_packing(torch.tensor([2.0, 2, 2, 2]), 2).tolist() == [[0, 2], [1, 3]]
    assert balanced_packing(torch.tensor([1.0, 3, 2]), 3).tolist() == [[0], [1], [2]]
    assert replicate_experts(torch.tensor([6.0, 4, 4]), 6).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(replicas=15), "gpus=8 does not divide replicas=15"),
        (dict(replicas=8), "replicas=8 for 12 experts"),
        (dict(groups=5), "groups=5 does not divide experts=12"),
        (dict(groups=24), "groups=24 does not divide experts=12"),
        (dict(nodes=2, gpus=1), "nodes=2 does not divide gpus=1"),
        (dict(gpus=0), "gpus=0"),
        (dict(nodes=2.0), "nodes=2.0"),
    ],
)
def test_devices_that_do_not_divide_are_refused_by_name(sizes, words):
    with pytest.raises(ValueError, match=words):
        place(LOAD, **dict(replicas=16, groups=4, nodes=2, gpus=8) | sizes)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_load_that_is_no_count_is_refused(bad):
    load = LOAD.double()
    load[1, 3] = bad
    with pytest.raises(ValueError, match="negative, infinite or NaN"):
        place(load, 16, 4, 2, 8)


def test_shapes_that_are_not_layers_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"shape \(12,\); expected \[layer, expert\]"):
        place(LOAD[0], 16, 4, 2, 8)
    with pytest.raises(ValueError, match="shape"):
        place(LOAD[:0], 16, 4, 2, 8)
    with pytest.raises(ValueError, match="3 packs for items"):
        balanced_packing(torch.ones(4), 3)
    with pytest.raises(ValueError, match="3 replicas for experts"):
        replicate_experts(torch.ones(4), 3)


@pytest.mark.parametrize("config", [V3, TINY, TINY.replace(hidden_size=200)], ids=["V3", "tiny", "ragged"])
def test_a_copy_is_as_large_as_a_quantised_row_and_the_prediction_agrees(config):
    way = traffic(chosen(config, 50), config)
    row = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(1))
    assert way.copy_bytes == quantize_tiles(row).nbytes and way.answer_bytes == row.bfloat16().nbytes
    for touched, out, back in zip(way.nodes_touched.tolist(), way.dispatched, way.combined, strict=True):
        ledger = lab.accounting.dispatch_bytes(config, touched)
        assert (ledger["dispatch"].total, ledger["combine"].total) == (out, back)
    assert way.total == (way.dispatched + way.combined).sum()


def test_a_token_travels_once_to_a_node_however_many_of_its_experts_live_there():
    config = TINY  # 16 experts on 4 nodes
    way = traffic(torch.tensor([[0, 1, 2, 3], [0, 4, 8, 12], [15, 0, 14, 1]]), config)
    assert way.slots.tolist() == [[4, 0, 0, 0], [1, 1, 1, 1], [2, 0, 0, 2]]
    assert way.nodes_touched.tolist() == [1, 4, 2] and way.tokens.tolist() == [3, 1, 1, 2]
    assert traffic(torch.tensor([[0, 1, 2, 3]]), config, nodes=8).nodes_touched.tolist() == [2]
    assert traffic(torch.zeros(3, 0, dtype=torch.int64), config).tokens.tolist() == [0, 0, 0, 0]
    empty = traffic(torch.zeros(0, 4, dtype=torch.int64), config)
    assert empty.total == 0 and LayerTraffic(1, 2, empty, empty).saved == 0


def test_v3_touches_five_of_eight_nodes_without_its_limit_and_at_most_four_with_it():
    limited, free = traffic(chosen(V3), V3), traffic(chosen(V3.replace(topk_group=8)), V3)
    assert limited.nodes_touched.max() == 4 and free.nodes_touched.max() > 6
    # 2,000 tokens: the mean of a number between 1 and 8 strays by less than 5 * 0.9 / sqrt(2,000) = 0.1
    assert free.nodes_touched.double().mean().item() == pytest.approx(lab.accounting.expected_nodes(256, 8, 8), abs=0.1)
    assert limited.total < free.total


@pytest.mark.parametrize(
    "config",
    [TINY, TINY.replace(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)],
    ids=["limited", "greedy"],
)
def test_a_trace_is_followed_layer_by_layer(config):
    torch.manual_seed(0)
    text = torch.randint(config.vocab_size, (1, 60))
    trace = trace_routing(lab.model.Transformer(config), text)
    ways = trace_traffic(trace, config)
    assert [way.layer for way in ways] == [at.layer for at in trace.layers]
    for way, at in zip(ways, trace.layers, strict=True):
        assert way.limit == (2 if config is TINY else 4)
        assert way.limited.nodes_touched.max() <= way.limit
        for side, experts in ((way.limited, at.chosen), (way.free, at.without_groups)):
            assert [set(row.nonzero().flatten().tolist()) for row in side.sent] == [
                {expert // 4 for expert in row} for row in experts.tolist()
            ]
        assert way.saved == pytest.approx(
            1 - way.limited.nodes_touched.sum().item() / way.free.nodes_touched.sum().item()
        )
    assert all(way.saved > 0 for way in ways) == (config is TINY)


def test_experts_that_the_model_does_not_have_and_nodes_that_do_not_divide_are_refused():
    good = torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(ValueError, match="nodes=3 does not divide n_routed_experts=16"):
        traffic(good, TINY, nodes=3)
    with pytest.raises(ValueError, match="nodes=1 does not divide n_routed_experts=None"):
        traffic(good, lab.PRESETS["llama-3.1-8b"])
    for bad in (-1, 16):
        with pytest.raises(ValueError, match="this model has 0 to 15"):
            traffic(torch.tensor([[bad, 1, 2, 3]]), TINY)
    for wrong in (good[0], good.float()):
        with pytest.raises(ValueError, match=r"expected int64 \[token, choice\]"):
            traffic(wrong, TINY)
