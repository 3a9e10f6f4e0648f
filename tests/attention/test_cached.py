"""However tokens arrive, whatever layout the cache has, attention gives what reading all of them at once gives."""

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import difference

from deepseek_lab.attention import (
    BlockPool,
    ExpandedCache,
    Fp8LatentCache,
    GroupedAttention,
    GroupedCache,
    LatentAttention,
    LatentCache,
    PagedCache,
)
from deepseek_lab.attention.masks import text_positions
from deepseek_lab.config import ModelConfig, RopeScaling
from deepseek_lab.presets import PRESETS

EXACT = 1e-5
ROPES = [None, RopeScaling("yarn", 4.0, 32, mscale=1.0, mscale_all_dim=0.7), RopeScaling("yarn", 4.0, 32)]


@st.composite
def latent_configs(draw) -> ModelConfig:
    sizes = {name: draw(st.integers(2, 9)) for name in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank")}
    heads = draw(st.integers(1, 4))
    return PRESETS["tiny"].replace(
        hidden_size=24, num_attention_heads=heads, num_key_value_heads=heads, **sizes,
        q_lora_rank=draw(st.sampled_from([None, 5, 16])), qk_rope_head_dim=draw(st.sampled_from([2, 4, 6])),
        rope_interleave=draw(st.booleans()), rope_scaling=draw(st.sampled_from(ROPES)),
    )  # fmt: skip


@st.composite
def grouped_configs(draw) -> ModelConfig:
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return ModelConfig(
        model_type="llama", hidden_size=24, num_attention_heads=groups * size, num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 6, 8])), attention_bias=draw(st.booleans()),
        rope_scaling=draw(st.sampled_from([*ROPES, RopeScaling("llama3", 4.0, 32)])), max_position_embeddings=64,
    )  # fmt: skip


def paged(config: ModelConfig, batch: int, capacity: int) -> PagedCache:
    """Blocks of four tokens, so that short texts cross from one to the next."""
    return PagedCache(BlockPool(config, batch * -(-max(capacity, 40) // 4), 4), batch)


LATENT = {"latent": LatentCache, "expanded": ExpandedCache, "paged": paged}
GROUPED = {"grouped": GroupedCache, "expanded": ExpandedCache}
CASES = st.one_of(
    st.tuples(latent_configs(), st.sampled_from(sorted(LATENT))),
    st.tuples(grouped_configs(), st.sampled_from(sorted(GROUPED))),
)
CHUNKS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def made(config: ModelConfig):
    kind = LatentAttention if config.uses_latent_attention else GroupedAttention
    return references.fill(kind(config)).requires_grad_(False)


def new(config: ModelConfig, layout: str, batch: int):
    return (LATENT if config.uses_latent_attention else GROUPED)[layout](config, batch, 3)


def vectors(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(seed))


def in_chunks(attention, x, cache, chunks, hidden=None, **more) -> torch.Tensor:
    """Attention with a cache, the tokens coming in chunks of these lengths."""
    positions = torch.arange(x.shape[1]) if hidden is None else text_positions(hidden)
    parts, start = [], cache.length
    assert start == 0 and sum(chunks) == x.shape[1]
    for length in chunks:
        end = start + length
        seen = {} if hidden is None else {"hidden": hidden[:, :end]}
        parts.append(attention(x[:, start:end], positions[..., start:end], cache, **seen, **more))
        start = end
    return torch.cat(parts, 1)


@settings(max_examples=80)
@given(case=CASES, chunks=CHUNKS, batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_cached_equals_uncached_in_every_layout(case, chunks, batch, seed):
    config, layout = case
    attention, x = made(config), vectors(batch, sum(chunks), seed)
    expected = attention(x, torch.arange(x.shape[1]))
    for parts in (chunks, [x.shape[1]], [1] * x.shape[1]):
        cache = new(config, layout, batch)
        assert difference(in_chunks(attention, x, cache, parts), expected) < EXACT
        assert cache.length == x.shape[1]


@settings(max_examples=80)
@given(case=CASES, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
       align=st.sampled_from(["left", "right"]), cut=st.integers(1, 9), more=st.integers(0, 4),
       seed=st.integers(0, 99))  # fmt: skip
def test_a_text_among_others_of_other_lengths_is_what_it_is_alone(case, lengths, align, cut, more, seed):
    config, layout = case
    attention, longest = made(config), max(lengths)
    total, places = longest + more, torch.arange(longest + more)
    x, own = vectors(len(lengths), total, seed), torch.tensor(lengths)[:, None]
    hidden = (places >= own) & (places < longest) if align == "left" else places < longest - own
    x = x + 100 * hidden[..., None]  # what stands in the padding must not matter
    first = [min(cut, longest), longest - min(cut, longest)] if cut < longest else [longest]
    chunks = first + [1] * more
    together = [in_chunks(attention, x, new(config, layout, len(x)), chunks, hidden)]
    together.append(attention(x, text_positions(hidden), hidden=hidden))
    for row, padding in enumerate(hidden):
        alone = attention(x[row : row + 1, ~padding], torch.arange(total - int(padding.sum())))
        assert all(difference(got[row : row + 1, ~padding], alone) < EXACT for got in together)
    assert all(got.isfinite().all() for got in together)


@settings(max_examples=30)
@given(config=latent_configs(), chunks=CHUNKS, absorb=st.sampled_from([True, False, None]))
def test_an_fp8_cache_reads_the_same_however_it_was_filled(config, chunks, absorb):
    """Every token is quantised by itself, so chunks and both ways of computing see the same numbers."""
    attention, x = made(config), vectors(2, sum(chunks))
    whole, parts = Fp8LatentCache(config, 2), Fp8LatentCache(config, 2)
    expected = in_chunks(attention, x, whole, [x.shape[1]])
    got = in_chunks(attention, x, parts, chunks, absorb=absorb)
    # A projection in chunks may be off in its last bit, which takes a value on the edge of two codes to the other one.
    equal = all(torch.equal(a.float(), b.float()) for a, b in zip(whole.parts(), parts.parts(), strict=True))
    assert difference(got, expected) < (EXACT if equal else 0.05)


@settings(max_examples=30)
@given(config=latent_configs(), seed=st.integers(0, 99))
def test_an_fp8_cache_changes_attention_by_no_more_than_its_rounding_can(config, seed):
    """What FP8 can do to one output, derived.

    A latent value c with scale s is stored as c + d with |d| <= max(|c| / 16, s / 1024): E4M3 has three bits behind the
    point, and below its normal range steps of 2 ** -9 of the scale, which is at most max|c| / 224. A rope value r in
    BF16 is off by |r| / 256 at most. So no score moves by more than

        D = scale * max over tokens of (|q_latent| . |d| + |q_rope| . |r| / 256).

    Weights p become p' with p' / p between exp(-2D) and exp(2D), hence sum |p' - p| <= exp(2D) - 1. With the value
    v = W_UV c of a token, off by at most |W_UV| |d|, and sum p' = 1, a head's output moves by no more than

        (exp(2D) - 1) * max|v| + max(|W_UV| |d|),

    and the sum over heads by |W_O| times that.
    """
    attention, x = made(config), vectors(1, 12, seed)
    c, positions = config, torch.arange(12)
    exact = attention(x, positions)
    got = in_chunks(attention, x, Fp8LatentCache(config), [12])

    q_nope, q_rope, joint = attention._project(x, positions)
    latent, rope = joint[0].abs().split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
    d = torch.maximum(latent / 16, latent.amax(-1, keepdim=True) / 224 / 1024)  # [token, latent]
    rebuild = attention.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1))
    w_uk, w_uv = rebuild.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
    q_latent = torch.einsum("htn,hnl->htl", q_nope[0], w_uk).abs()
    moved = attention.scale * (q_latent @ d.T + q_rope[0].abs() @ rope.T / 256)  # [head, query, token]
    most = moved.amax(-1)[..., None]  # all tokens, future ones too, only make the bound wider
    values = torch.einsum("hvl,tl->htv", w_uv, joint[0, :, : c.kv_lora_rank]).abs().amax(1, keepdim=True)
    slips = torch.einsum("hvl,tl->htv", w_uv.abs(), d).amax(1, keepdim=True)
    heads = (2 * most).expm1() * values + slips  # [head, query, v]
    bound = heads.transpose(0, 1).flatten(1) @ attention.o_proj.weight.abs().T
    assert ((got - exact)[0].abs() <= bound + 1e-5).all()
    assert difference(got, exact) > 1e-4  # it is rounded


def test_a_ragged_paged_cache_is_read_without_its_empty_slots_or_not_at_all():
    config = PRESETS["tiny"].replace(hidden_size=24)
    attention, x = made(config), vectors(2, 9)
    cache, positions = paged(config, 2, 9), torch.arange(9)
    expected = attention(x[1:], positions)
    attention(x[:, :6], positions[:6], cache)
    cache.truncate(4, sequence=0)
    with pytest.raises(ValueError, match=r"sequences of \[4, 6\] tokens; pass hidden="):
        attention(x[:, 6:], positions[6:], cache)
    for hidden in ([False] * 9, [True] + [False] * 8, [False] * 2 + [True] * 7):
        with pytest.raises(ValueError, match=r"sequences of \[4, 6\] tokens; .* True for the empty slots in front"):
            attention(x[:, 6:], positions[6:], cache, hidden=torch.tensor([hidden] * 2))
    assert cache.lengths == [4, 6]
    hidden = torch.nn.functional.pad(cache.hidden(), (0, 3))
    mixed = torch.cat([x[:1, 4:7], x[1:, 6:]])
    got = attention(mixed, text_positions(hidden)[:, 6:], cache, hidden=hidden)
    assert difference(got[1:], expected[:, 6:]) < EXACT
    assert difference(got[:1], attention(x[:1, :7], positions[:7])[:, 4:]) < EXACT


# Bad input ---------------------------------------------------------------------------------------------------------

ATTENTIONS = {
    "latent": (PRESETS["tiny"].replace(hidden_size=24), sorted(LATENT)),
    "grouped": (ModelConfig(model_type="llama", hidden_size=24, num_attention_heads=4, num_key_value_heads=2,
                            max_position_embeddings=64), sorted(GROUPED)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "layout"), [(kind, layout) for kind, (_, names) in ATTENTIONS.items() for layout in names]
)
def test_what_does_not_continue_a_cache_is_refused_and_leaves_it_as_it_was(kind, layout):
    config = ATTENTIONS[kind][0]
    attention, cache, x = made(config), new(config, layout, 2), vectors(2, 8)
    attention(x[:, :5], torch.arange(5), cache)
    before = [part.clone() for part in cache.view()]
    bad_x = x.clone()
    bad_x[0, 6] = float("nan")
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    wrong = [
        (x[:, 5:], torch.tensor([4, 5, 6]), {}, r"positions \[4, 5, 6\] go back behind the 5 tokens"),
        (x[:, 5:6], torch.tensor([3]), {}, r"positions \[3\] go back"),
        (x[:, 5:], torch.tensor([5, 7, 6]), {}, "go back"),
        (x[:, 5:], torch.tensor([[5, 6, 7], [5, 6, 4]]), {}, "go back"),
        (x[:, 5:], torch.arange(5, 7), {}, r"positions have shape \(2,\)"),
        (x[:1, 5:], torch.arange(5, 8), {}, "batch size"),
        (bad_x[:, 5:], torch.arange(5, 8), {}, "nan"),
        (x[:, 5:], torch.arange(5, 8), dict(hidden=hidden[:, 5:]), r"hidden is \(2, 3\)"),
        (x[:, 5:], torch.arange(5, 8), dict(hidden=hidden.long()), r"torch\.int64; expected"),
        (x[:, 5:], torch.arange(5, 8), dict(hidden=hidden.tolist()), "hidden is a list; expected a tensor"),
    ]
    for part, positions, more, words in wrong:
        with pytest.raises(ValueError, match=words):
            attention(part, positions, cache, **more)
        assert cache.length == 5
        assert all(torch.equal(a, b) for a, b in zip(cache.view(), before, strict=True))
    assert attention(x[:, 5:], torch.arange(9, 12), cache).isfinite().all()  # a gap is no way back


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_cache_of_another_model_or_layout_is_refused_and_left_as_it_was(kind):
    (config, layouts), (other, others) = ATTENTIONS[kind], ATTENTIONS[{"latent": "grouped", "grouped": "latent"}[kind]]
    attention, x = made(config), vectors(2, 3)
    wider = config.replace(**{"v_head_dim": 40, "kv_lora_rank": 48} if kind == "latent" else {"num_key_value_heads": 4})
    caches = [new(other, layout, 2) for layout in others]
    caches += [new(wider, layout, 2) for layout in layouts if (kind, layout) != ("grouped", "expanded")]
    for cache in caches:
        with pytest.raises(ValueError, match="a cache serves one model, layout and batch size"):
            attention(x, torch.arange(3), cache)
        assert cache.length == 0


def test_absorbing_from_expanded_keys_is_refused():
    config = ATTENTIONS["latent"][0]
    cache = ExpandedCache(config, 2)
    with pytest.raises(ValueError, match=r"absorb=True with an ExpandedCache.*layout 'latent'"):
        made(config)(vectors(2, 1), torch.arange(1), cache, absorb=True)
    assert cache.length == 0
