"""Mistakes of real projects: for each the check that catches it, passed by this library and failed by the mistake.

Each wrong variant below is what somebody shipped. A check that a wrong variant passes is no check.
"""

import dataclasses

import pytest
import references
import torch
import training_runs
from references import LATENT, LLAMA, cached_logits, difference, published_logits, token_ids

from deepseek_lab import precision
from deepseek_lab.attention import GroupedCache, LatentAttention, LatentCache, grouped, latent
from deepseek_lab.attention.layouts import new_cache
from deepseek_lab.experts import Router, Routing
from deepseek_lab.model import Transformer
from deepseek_lab.presets import PRESETS
from deepseek_lab.training import loop

V3 = PRESETS["deepseek-v3"]
TINY = PRESETS["tiny"]


@pytest.fixture(scope="module", params=["deepseek_v3", "llama"])
def any_pair(request, tmp_path_factory):
    reference = references.build(request.param)
    return published_logits(reference, token_ids()), references.ours(reference, tmp_path_factory.mktemp("model"))


@pytest.fixture
def v3_pair(tmp_path):
    reference = references.build("deepseek_v3")
    return published_logits(reference, token_ids()), references.ours(reference, tmp_path)


@torch.no_grad()
def equals_the_published_implementation(pair) -> bool:
    expected, model = pair
    return difference(model(token_ids()), expected) < 1e-5


def make_wrong(model, name, wrong) -> None:
    """Turn every module of one name into its wrong variant, weights and all."""
    for path, module in model.named_modules():
        if path.endswith("." + name):
            module.__class__ = wrong


# Attention ---------------------------------------------------------------------------------------------------------


class SeparateScales(LatentAttention):
    """Scores of content and of position, each divided by the root of its own width, then added."""

    def _attend_expanded(self, x, q_nope, q_rope, joint):
        c = self.config
        q_nope = q_nope * c.qk_nope_head_dim**-0.5 / self.scale
        q_rope = q_rope * c.qk_rope_head_dim**-0.5 / self.scale
        return super()._attend_expanded(x, q_nope, q_rope, joint)


def test_content_and_position_scaled_separately_is_caught_by_the_published_logits(v3_pair):
    assert equals_the_published_implementation(v3_pair)
    make_wrong(v3_pair[1], "self_attn", SeparateScales)
    assert not equals_the_published_implementation(v3_pair)


@torch.no_grad()
def equals_attention_in_float64(attention) -> bool:
    """One head at a time, scale 1 / sqrt(width) written out."""
    c, x = attention.config, torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    q_nope, q_rope, joint = (t.double() for t in attention._project(x, torch.arange(9)))
    memory, rope_key = joint.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    rebuilt = (memory @ attention.kv_b_proj.weight.double().T).unflatten(-1, (c.num_attention_heads, -1))
    keys, values = rebuilt.split([c.qk_nope_head_dim, c.v_head_dim], -1)
    scores = torch.einsum("bhtd,bshd->bhts", q_nope, keys) + torch.einsum("bhtd,bsd->bhts", q_rope, rope_key)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = (scores / (c.qk_nope_head_dim + c.qk_rope_head_dim) ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bshd->bthd", weights, values).flatten(2) @ attention.o_proj.weight.double().T
    return all(difference(attention(x, torch.arange(9), absorb=absorb), expected) < 1e-5 for absorb in (True, False))


def test_a_softmax_scale_with_a_missing_star_is_caught_by_float64_attention():
    attention = references.fill(LatentAttention(TINY.replace(hidden_size=48)))
    assert equals_attention_in_float64(attention)
    attention.scale = attention.config.qk_head_dim * -0.5  # meant: ** -0.5. It still trains.
    assert not equals_attention_in_float64(attention)


def cached_equals_uncached(pair) -> bool:
    expected, model = pair
    return difference(cached_logits(model, token_ids(), [13, 1]), expected) < 1e-5


def test_a_mask_that_hides_the_past_from_a_single_token_is_caught_by_cached_equals_uncached(any_pair, monkeypatch):
    assert cached_equals_uncached(any_pair)
    for module in (grouped, latent):  # torch reads is_causal from the top left: one query sees only the first key
        monkeypatch.setattr(module, "causal_mask", lambda *_: {"is_causal": True})
    with torch.no_grad():
        assert equals_the_published_implementation(any_pair)  # without a cache nothing looks wrong
    absorbs = any_pair[1].config.uses_latent_attention  # one token in the absorbed form needs no mask at all
    assert cached_equals_uncached(any_pair) == absorbs


# Caches ------------------------------------------------------------------------------------------------------------


def values_per_token(cache) -> int:
    return sum(view.shape[-1] * (view.shape[1] if view.dim() == 4 else 1) for view in cache.view())


def test_a_rope_key_per_head_is_caught_by_counting_the_cache():
    config = TINY.replace(kv_lora_rank=128, qk_rope_head_dim=64, num_attention_heads=8)
    per_head = dataclasses.replace(config, qk_rope_head_dim=8 * 64)
    assert values_per_token(new_cache(config)) == 192
    assert values_per_token(LatentCache(per_head)) == 640


def v3_bytes_per_token(kind, config=V3) -> int:
    """Bytes of one token in the caches of all layers, counted on a real cache object."""
    cache = kind(config, capacity=1, dtype=torch.bfloat16)
    cache.length = 1
    return config.num_hidden_layers * cache.nbytes


def test_latent_attention_that_caches_what_it_rebuilt_is_caught_by_the_bytes_of_the_cache():
    kind = type(new_cache(V3, capacity=1))
    assert v3_bytes_per_token(kind) == 70_272  # Insights into DeepSeek-V3 (arXiv 2505.09343), table 1
    assert v3_bytes_per_token(GroupedCache) == 4_997_120  # expanded keys and values: 71 times as much


def test_two_vectors_of_the_latents_width_are_caught_by_the_published_bytes():
    class KeysAndValues(LatentCache):
        def __init__(self, config, batch=1, capacity=64, dtype=torch.float32, device="cpu"):
            super(LatentCache, self).__init__([(batch, config.kv_lora_rank)] * 2, capacity, dtype, device)

    assert v3_bytes_per_token(KeysAndValues) == 124_928 != 70_272
    as_mha = V3.replace(kv_lora_rank=None, head_dim=V3.hidden_size // V3.num_attention_heads)
    assert v3_bytes_per_token(GroupedCache, as_mha) == 1_748_992 != 70_272


# Experts -----------------------------------------------------------------------------------------------------------


class LeakingBias(Router):
    """Weights from the scores that already carry the balancing bias."""

    def forward(self, x):
        experts, _, scores = super().forward(x)
        weights = (scores + self.e_score_correction_bias).gather(1, experts)
        return Routing(experts, weights / weights.sum(-1, keepdim=True) * self.config.routed_scaling_factor, scores)


@torch.no_grad()
def bias_moves_choices_only(model) -> bool:
    """The same bias for every expert changes no choice, so the output must not move."""
    before = model(token_ids())
    for layer in model.expert_layers():
        layer.gate.e_score_correction_bias += 0.5
    return difference(model(token_ids()), before) < 1e-5


def test_a_bias_in_the_gate_weights_is_caught_by_a_bias_that_changes_no_choice(v3_pair):
    model = v3_pair[1]
    assert bias_moves_choices_only(model)
    make_wrong(model, "gate", LeakingBias)
    assert not bias_moves_choices_only(model)


class ZeroFill(Router):
    """Experts of dropped groups get the score 0 instead of minus infinity."""

    def choose(self, scores):
        biased = scores + self.e_score_correction_bias
        return biased.masked_fill(~self._kept(biased), 0.0).topk(self.config.num_experts_per_tok).indices


class BestOfGroup(Router):
    """A group ranked by its best expert, V2's rule, where V3 adds the two best."""

    def _kept(self, scores):
        c = self.config
        groups = scores.unflatten(-1, (c.n_group, -1)).amax(-1).topk(c.topk_group, dim=-1).indices
        kept = torch.zeros(len(scores), c.n_group, dtype=torch.bool).scatter_(1, groups, True)
        return kept.repeat_interleave(c.n_routed_experts // c.n_group, 1)


def chosen(kind, scores, biased, groups, kept, choices) -> set[int]:
    gate = kind(
        TINY.replace(n_routed_experts=len(scores), n_group=groups, topk_group=kept, num_experts_per_tok=choices)
    )
    gate.e_score_correction_bias.copy_(torch.tensor(biased) - torch.tensor(scores))
    return set(gate.choose(torch.tensor([scores])).flatten().tolist())


def test_masked_groups_filled_with_zero_are_caught_by_negative_scores():
    scores = [0.9, 0.8, 0.1, 0.2, 0.7, 0.4, 0.3, 0.6]
    biased = [0.4, -0.1, -0.5, -0.6, 0.3, -0.2, -0.3, -0.4]  # groups 0 and 2 are kept, the third pick is negative
    assert chosen(Router, scores, biased, 4, 2, 3) == {0, 4, 1}
    assert chosen(ZeroFill, scores, biased, 4, 2, 3) - {0, 1, 4, 5}


def test_groups_ranked_by_their_best_are_caught_by_a_lonely_favourite():
    scores = [0.70, 0.05, 0.50, 0.45, 0.40, 0.39]  # 0.70 is the best expert, but 0.50 + 0.45 the best pair
    assert chosen(Router, scores, scores, 3, 1, 2) == {2, 3}
    assert chosen(BestOfGroup, scores, scores, 3, 1, 2) == {0, 1}


def test_groups_ranked_by_their_best_are_caught_by_the_published_logits(v3_pair):
    assert equals_the_published_implementation(v3_pair)
    make_wrong(v3_pair[1], "gate", BestOfGroup)
    assert not equals_the_published_implementation(v3_pair)


def gate_gradients(factor) -> torch.Tensor:
    """The gradients of all gates in one training step with the expert loss at this factor."""
    model, gradients = references.fill(training_runs.fresh(training_runs.SMALL)), []
    for layer in model.expert_layers():
        layer.gate.weight.register_hook(gradients.append)
    next(loop.train(model, training_runs.batches(), dataclasses.replace(training_runs.RECIPE, expert_loss=factor)))
    return torch.cat(gradients)


def test_a_balance_loss_that_is_never_added_is_caught_by_the_gradient_of_the_gate(monkeypatch):
    without = gate_gradients(0.0)
    assert difference(gate_gradients(0.5), without) > 1e-2
    right = loop.balance_loss  # computed, shown in every record, and no part of what is learned
    monkeypatch.setattr(loop, "balance_loss", lambda *inputs: right(*inputs).detach())
    assert torch.equal(gate_gradients(0.5), without)


# Eight bits --------------------------------------------------------------------------------------------------------


def product_with_blocks_of(rows: int, a, b):
    """a times b transposed, where `rows` rows of b share a scale."""
    scales = b.scales.repeat_interleave(rows, 0)[: len(b.codes)].repeat_interleave(128, 1)
    return a.dequantize() @ (b.codes.float() * scales).T


@pytest.mark.parametrize(("rows", "wrong"), [(256, False), (512, False), (508, True)])
def test_a_block_height_worked_out_from_the_shapes_is_caught_by_a_last_block_that_is_not_whole(rows, wrong):
    torch.manual_seed(0)
    weight = torch.randn(rows, 256)
    a, b = precision.quantize_tiles(torch.randn(8, 256)), precision.quantize_blocks(weight)
    right, careless = precision.fp8_matmul(a, b), product_with_blocks_of(rows // len(b.scales), a, b)
    assert torch.equal(right, product_with_blocks_of(128, a, b))
    assert torch.equal(right, careless) is not wrong
    unrounded = a.dequantize() @ weight.T
    assert difference(careless, unrounded) < 0.1  # a tolerance would let it pass


# Counting ----------------------------------------------------------------------------------------------------------


def parameters(config) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()])


def test_dense_first_layers_counted_as_experts_are_caught_by_the_published_total():
    alone = V3.replace(num_nextn_predict_layers=0)
    assert parameters(alone) == 671_026_419_200
    assert 701e9 < parameters(alone.replace(first_k_dense_replace=0)) < 705e9  # what four calculators say


def test_the_small_shapes_here_could_show_every_mistake():
    assert LATENT["qk_nope_head_dim"] != LATENT["qk_rope_head_dim"] != LATENT["v_head_dim"]
    assert LATENT["topk_group"] < LATENT["n_group"] and LLAMA["num_key_value_heads"] < LLAMA["num_attention_heads"]
