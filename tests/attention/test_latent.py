"""Both ways of computing latent attention, and the definition in float64, give the same answer."""

import pytest
import references
import torch
from references import difference

from deepseek_lab.attention import (
    BlockPool,
    Fp8LatentCache,
    GroupedAttention,
    GroupedCache,
    LatentAttention,
    LatentCache,
    PagedCache,
    new_cache,
)
from deepseek_lab.config import ModelConfig, RopeScaling
from deepseek_lab.model import Transformer, apply_policy
from deepseek_lab.precision import PrecisionPolicy
from deepseek_lab.presets import PRESETS

BASE = PRESETS["tiny"].replace(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
CONFIGS = {
    "plain": BASE,
    "no query latent": BASE.replace(q_lora_rank=None),
    "values wider than keys": BASE.replace(qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=21),
    "yarn": BASE.replace(rope_scaling=RopeScaling("yarn", 4.0, 32, mscale=1.0, mscale_all_dim=0.7)),
    "half-split rope": BASE.replace(rope_interleave=False),
    "one head": BASE.replace(num_attention_heads=1, num_key_value_heads=1),
}
TOLERANCE = 1e-5


def filled(config: ModelConfig) -> LatentAttention:
    return references.fill(LatentAttention(config))


def inputs(config: ModelConfig, batch: int = 2, tokens: int = 19) -> tuple:
    x = torch.randn(batch, tokens, config.hidden_size, generator=torch.Generator().manual_seed(3))
    return x, torch.arange(tokens)


@pytest.fixture(params=CONFIGS)
def attention(request):
    return filled(CONFIGS[request.param])


@torch.no_grad()
def by_definition(attention: LatentAttention, x, positions):
    """Equations 1 to 11 of the DeepSeek-V3 report in float64, one head and one query at a time."""
    c = attention.config
    q_nope, q_rope, joint = (t.double() for t in attention._project(x, positions))
    latent, rope_key = joint.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
    rebuilt = (latent @ attention.kv_b_proj.weight.double().T).unflatten(-1, (c.num_attention_heads, -1))
    out = x.new_zeros(*x.shape[:2], c.num_attention_heads, c.v_head_dim, dtype=torch.float64)
    for b in range(len(x)):
        for head in range(c.num_attention_heads):
            keys, values = rebuilt[b, :, head].split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
            for t in range(x.shape[1]):
                seen = slice(0, t + 1)  # a token sees itself and those before it
                scores = keys[seen] @ q_nope[b, head, t] + rope_key[b, seen] @ q_rope[b, head, t]
                out[b, t, head] = (scores * attention.scale).softmax(0) @ values[seen]
    return out.flatten(2) @ attention.o_proj.weight.double().T


@pytest.mark.parametrize("absorb", [True, False, None])
@torch.no_grad()
def test_attention_is_what_the_equations_say(attention, absorb):
    x, positions = inputs(attention.config)
    expected = by_definition(attention, x, positions)
    assert difference(attention(x, positions, absorb=absorb), expected) < TOLERANCE


@pytest.mark.parametrize("chunks", [[19], [7, 12], [1, 2, 16], [18, 1], [1] * 19])
@pytest.mark.parametrize("absorb", [True, False])
@torch.no_grad()
def test_absorbed_and_expanded_agree_with_a_cache_too(attention, absorb, chunks):
    x, positions = inputs(attention.config)
    expected = attention(x, positions, absorb=not absorb)
    cache = LatentCache(attention.config, batch=2, capacity=3)
    parts = [
        attention(*part, cache, absorb=absorb) for part in zip(x.split(chunks, 1), positions.split(chunks), strict=True)
    ]
    assert difference(torch.cat(parts, 1), expected) < TOLERANCE


@torch.no_grad()
def test_both_ways_may_take_turns_on_one_cache(attention):
    x, positions = inputs(attention.config)
    cache, parts = LatentCache(attention.config, batch=2), []
    for i, (part, place) in enumerate(zip(x.split(3, 1), positions.split(3), strict=True)):
        parts.append(attention(part, place, cache, absorb=bool(i % 2)))
    assert difference(torch.cat(parts, 1), attention(x, positions)) < TOLERANCE


def test_both_ways_have_the_same_gradients(attention):
    x, positions = inputs(attention.config)
    found = []
    for absorb in (True, False):
        attention.zero_grad()
        (attention(x, positions, absorb=absorb) ** 2).sum().backward()
        found.append({name: p.grad.clone() for name, p in attention.named_parameters()})
    assert all(difference(found[0][name], found[1][name]) < 1e-4 for name in found[0])


@torch.no_grad()
def test_no_token_sees_a_later_one(attention):
    x, positions = inputs(attention.config)
    changed = x.clone()
    changed[:, 11:] += 1
    for absorb in (True, False):
        before, after = attention(x, positions, absorb=absorb), attention(changed, positions, absorb=absorb)
        assert difference(after[:, :11], before[:, :11]) < TOLERANCE
        assert difference(after[:, 11:], before[:, 11:]) > 0.01


def test_each_kind_of_attention_refuses_the_others_config():
    with pytest.raises(ValueError, match="LatentAttention needs kv_lora_rank"):
        LatentAttention(PRESETS["llama-3.1-8b"])
    with pytest.raises(ValueError, match="GroupedAttention got kv_lora_rank=64"):
        GroupedAttention(BASE)
    with pytest.raises(ValueError, match="needs kv_lora_rank"):
        _ = PRESETS["llama-3.1-8b"].latent_width
    assert GroupedCache(PRESETS["llama-3.1-8b"], capacity=1).nbytes == 0


@pytest.mark.parametrize(("layout", "dtype"), [("latent_fp8", torch.float32), ("latent", torch.bfloat16)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_narrow_memory_is_read_as_it_is_stored_with_the_same_result(layout, dtype, batch, monkeypatch):
    torch.manual_seed(0)
    layer, x = filled(BASE), torch.randn(batch, 70, BASE.hidden_size)
    with torch.no_grad():
        whole = new_cache(BASE, batch, 70, dtype, layout=layout)
        layer(x[:, :69], torch.arange(69), whole)
        widened, read = whole.fork(), []
        monkeypatch.setattr(Fp8LatentCache, "view", lambda self: read.append(self))  # would widen the whole memory
        monkeypatch.setattr(LatentAttention, "_attend_absorbed", lambda *args: read.append(args))
        got = layer(x[:, 69:], torch.tensor([69]), whole)
        monkeypatch.undo()
    expected = layer(x[:, 69:], torch.tensor([69]), widened)  # gradients are on, which no kernel has
    assert not read and expected.requires_grad
    assert torch.equal(whole.view()[0], widened.view()[0])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", [PrecisionPolicy(), PrecisionPolicy(products="bf16", wide=())])
def test_what_a_policy_rounds_is_not_left_out_by_the_kernels(policy):
    model = apply_policy(Transformer(BASE), policy)
    layer, (x, positions) = model.layers[0].self_attn, inputs(BASE)
    with torch.no_grad():
        fast, slow = (new_cache(BASE, 2, 19, torch.bfloat16) for _ in range(2))
        got = [layer(x[:, :18], positions[:18], fast), layer(x[:, 18:], positions[18:], fast)][1]
        layer(x[:, :18], positions[:18], slow)
    assert torch.equal(got, layer(x[:, 18:], positions[18:], slow).detach())


@pytest.mark.parametrize("paged", [False, True])
def test_a_memory_that_splits_latent_and_rope_key_elsewhere_is_refused_before_it_is_read(paged):
    other = BASE.replace(kv_lora_rank=BASE.kv_lora_rank + 2, qk_rope_head_dim=BASE.qk_rope_head_dim - 2)
    layer, (x, positions) = filled(BASE), inputs(BASE)
    cache = PagedCache(BlockPool(other, 2, layout="latent_fp8"), 2) if paged else Fp8LatentCache(other, 2)
    with pytest.raises(ValueError, match="a cache serves one model"):
        layer(x, positions, cache)
    assert cache.length == 0
