"""Absorbed attention of one token: every body within the rounding of float32 of what float64 says."""

import tracemalloc

import attending
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scripts import run

import deepseek_lab as lab
from deepseek_lab.attention import LatentAttention, LatentCache
from deepseek_lab.kernels import dispatch, numba_attention, numba_cpu, reference
from deepseek_lab.precision import quantize_tiles

BODIES = pytest.mark.parametrize("body", [reference, numba_cpu], ids=["reference", "numba"])
KINDS = pytest.mark.parametrize("kind", attending.MEMORIES)
SIZES = dict(kind=st.sampled_from(attending.MEMORIES), heads=st.integers(1, 19), slots=st.integers(1, 150),
             latent=st.integers(1, 150), rope=st.integers(0, 20), seed=st.integers(0, 2**31),
             spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]))  # fmt: skip


@BODIES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**SIZES, shares=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_every_shape_is_within_the_bound(body, kind, heads, slots, latent, rope, seed, spread, shares):
    q, memory, joint = attending.case(kind, len(shares), heads, slots, latent, rope, seed, spread)
    lengths = torch.tensor([round(share * slots) for share in shares])
    got = attending.attend(body, q, memory, lengths, 0.3, latent)
    assert attending.worst(got, q, joint, lengths, 0.3, latent) <= 1


@BODIES
@KINDS
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 200])
def test_lengths_around_the_edges_of_tiles(body, kind, length):
    q, memory, joint = attending.case(kind, 2, 9, 200, 32, 8, seed=length)
    lengths = torch.tensor([length, 200 - length])
    got = attending.attend(body, q, memory, lengths, 0.2, 32)
    assert attending.worst(got, q, joint, lengths, 0.2, 32) <= 1
    assert (got[0] == 0).all() == (length == 0)


@BODIES
def test_one_length_serves_all_rows(body):
    q, memory, _ = attending.case("float32", 3, 2, 70, 16, 4, seed=0)
    each = attending.attend(body, q, memory, torch.full((3,), 66), 0.2, 16)
    assert torch.equal(attending.attend(body, q, memory, 66, 0.2, 16), each)


@BODIES
@KINDS
def test_what_lies_behind_the_length_is_not_read(body, kind):
    q, memory, joint = attending.case(kind, 1, 3, 80, 20, 4, seed=1)
    for part in memory:
        part[:, 70:] = 0x7F if part.dtype == torch.uint8 else torch.nan
    got = attending.attend(body, q, memory, 70, 0.2, 20)
    assert attending.worst(got, q, joint, torch.tensor([70]), 0.2, 20) <= 1


@BODIES
def test_a_slot_that_dominates_is_the_answer_wherever_it_stands(body):
    for place in (0, 63, 64, 99):
        q, (memory,), _ = attending.case("float32", 1, 4, 100, 12, 4, seed=2)
        memory[:] *= 0.01
        memory[0, place] = 40 * q[0, 1] / q[0, 1].norm()
        got = body.decode_attention(q, memory, 100, 30.0, 12)
        assert torch.equal(got[0, 1], memory[0, place, :12])


@BODIES
@pytest.mark.parametrize("score", [0.0, -3e37, 3e37, -80.0])
def test_equal_scores_give_the_mean(body, score):
    memory = torch.randn(1, 90, 9, generator=torch.Generator().manual_seed(3))
    memory[..., 8] = 1
    q = torch.zeros(1, 2, 9)
    q[..., 8] = score
    mean = memory[0, :, :8].double().mean(0)
    got = body.decode_attention(q, memory, 90, 1.0, 8)
    assert ((got - mean).abs() <= (90 + 12) * 2.0**-24 * memory[..., :8].abs().max()).all()


@BODIES
def test_scores_that_fall_steadily_by_hundreds_are_within_the_bound(body):
    memory = torch.randn(1, 150, 6, generator=torch.Generator().manual_seed(4))
    for ramp in (torch.linspace(0, -900, 150), torch.linspace(-900, 0, 150)):
        memory[0, :, 5] = ramp
        q = torch.tensor([0, 0, 0, 0, 0, 1.0]).expand(1, 3, 6)
        lengths = torch.tensor([150])
        got = body.decode_attention(q, memory, lengths, 1.0, 5)
        assert attending.worst(got, q, memory, lengths, 1.0, 5) <= 1


@BODIES
def test_a_nan_in_the_memory_shows(body):
    """Caches refuse NaN; should one come through all the same, the answer is not a number that looks right."""
    for place in (0, 65, 99):
        q, (memory,), _ = attending.case("float32", 1, 3, 100, 16, 4, seed=5)
        memory[0, place] = torch.nan
        assert body.decode_attention(q, memory, 100, 0.2, 16).isnan().all()


@KINDS
@pytest.mark.parametrize("change", ["a slot less", "scale", "rope key", "values of another slot"])
def test_the_bound_would_show_a_mistake(kind, change):
    q, memory, joint = attending.case(kind, 2, 3, 90, 24, 8, seed=6)
    lengths = torch.tensor([90, 41])
    wrong = dict(q=q, lengths=lengths, scale=0.2)
    if change == "rope key":
        wrong["q"] = q * torch.tensor([1.0] * 31 + [0.99])
    elif change == "values of another slot":
        memory = [part.roll(1, dims=1) if i == len(memory) - 1 else part for i, part in enumerate(memory)]
        memory = memory if len(memory) > 1 else [torch.cat([joint[..., :23].roll(1, 1), joint[..., 23:]], -1)]
    else:
        wrong |= {"lengths": lengths - 1} if change == "a slot less" else {"scale": 0.2002}
    got = attending.attend(reference, memory=memory, latent=24, **wrong)
    assert attending.worst(got, q, joint, lengths, 0.2, 24) > 1


def test_the_numba_exponential_is_within_two_units_of_two_to_the_minus_24():
    exp = numba_attention.exp

    @njit
    def all_of(x, out):
        for i in range(x.size):
            out[i] = exp(x[i])

    x = -np.linspace(0, 87.3, 3_000_001).astype(np.float32)[:-1]
    x = np.concatenate([x, -np.logspace(-30, 1.9, 100_000).astype(np.float32)])
    out = np.empty_like(x)
    all_of(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1).max() < 2.0**-23
    edges = np.array([0, -0.0, -87.31, -1e30, -np.inf, np.nan], np.float32)
    out = np.empty_like(edges)
    all_of(edges, out)
    assert out[:5].tolist() == [1, 1, 0, 0, 0] and np.isnan(out[5])


@BODIES
def test_every_e4m3_code_is_read(body):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    scales, rope = torch.full((1, 256, 1), 0.37), torch.zeros(1, 256, 0, dtype=torch.bfloat16)
    for slot in range(256):
        got = body.decode_attention_fp8(torch.zeros(1, 1, 1), codes[:, slot:], scales[:, slot:], rope[:, slot:], 1, 1.0)
        expected = codes[0, slot].view(torch.float8_e4m3fn).float() * 0.37
        torch.testing.assert_close(got[0, 0], expected, rtol=0, atol=0, equal_nan=True)


@BODIES
def test_codes_of_the_library_are_taken_as_they_are(body):
    q, _, joint = attending.case("float32", 1, 4, 70, 130, 6, seed=7)
    blocks, rope, lengths = quantize_tiles(joint[..., :130]), joint[..., 130:].bfloat16(), torch.tensor([70])
    wide = torch.cat([blocks.dequantize(), rope.float()], dim=-1)
    got = body.decode_attention_fp8(q, blocks.codes, blocks.scales, rope, lengths, 0.1)
    assert attending.worst(got, q, wide, lengths, 0.1, 130) <= 1


@BODIES
def test_memories_that_lie_differently_give_the_same(body):
    q, (memory,), _ = attending.case("float32", 3, 4, 70, 32, 8, seed=8)
    expected = body.decode_attention(q, memory, 70, 0.2, 32)
    for other in (
        memory.contiguous(),
        memory.transpose(1, 2).contiguous().transpose(1, 2),
        memory[:1].expand(3, -1, -1),
    ):
        got = body.decode_attention(q, other, 70, 0.2, 32)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got, expected) == (other.stride(0) > 0)


def test_attention_of_the_library_is_this_one():
    torch.manual_seed(0)
    layer, cache = LatentAttention(lab.PRESETS["tiny"]).eval(), LatentCache(lab.PRESETS["tiny"], batch=2)
    seen = []
    layer.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        layer(torch.randn(2, 70, 256), torch.arange(70), cache)
        x = torch.randn(2, 1, 256)
        layer(x, torch.tensor([70]), cache)
        q_nope, q_rope, _ = layer._project(x, torch.tensor([70]))
        c = layer.config
        w_uk, w_uv = layer.kv_b_proj.weight.unflatten(0, (8, -1)).split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q = torch.cat([torch.einsum("bhtn,hnl->bhl", q_nope, w_uk), q_rope[:, :, 0]], dim=-1)
        mixed = numba_cpu.decode_attention(q, cache.view()[0], 71, layer.scale, c.kv_lora_rank)
        ours = torch.einsum("bhl,hvl->bhv", mixed, w_uv).flatten(1)
    torch.testing.assert_close(ours, seen[1][:, 0], rtol=1e-4, atol=1e-5)


@BODIES
def test_what_does_not_fit_is_refused(body):
    q, (memory,), _ = attending.case("float32", 2, 3, 10, 16, 4, seed=9)
    _, (codes, scales, rope), _ = attending.case("float8", 2, 3, 10, 16, 4, seed=9)
    for args, message in [
        ((q, memory[:1], 5, 1.0, 16), "expected \\[batch, head, latent \\+ rope\\]"),
        ((q, memory[..., 1:], 5, 1.0, 16), "expected \\[batch, head"),
        ((q, memory, 11, 1.0, 16), "lengths from 11 to 11; the memory has 10 slots"),
        ((q, memory, torch.tensor([-1, 3]), 1.0, 16), "lengths from -1 to 3"),
        ((q, memory, torch.tensor([3]), 1.0, 16), "expected whole numbers \\[2\\]"),
        ((q, memory, torch.tensor([3.0, 4.0]), 1.0, 16), "expected whole numbers"),
        ((q, memory, 5, 1.0, 21), "latent=21 of 20 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            body.decode_attention(*args)
    for parts in [(codes, scales[:, :9], rope), (codes, scales, rope[..., 1:]), (codes[:, :9], scales, rope)]:
        with pytest.raises(ValueError, match="of shapes"):
            body.decode_attention_fp8(q, *parts, 5, 1.0)
    with pytest.raises(TypeError, match="a memory in torch\\.float16"):
        body.decode_attention(q, memory.half(), 5, 1.0, 16)
    with pytest.raises(TypeError, match="expected float32, uint8"):
        body.decode_attention_fp8(q, codes.int(), scales, rope, 5, 1.0)


def test_nothing_to_do_is_done():
    for batch, heads, slots in [(0, 2, 5), (2, 0, 5), (2, 3, 0)]:
        q, memory = torch.ones(batch, heads, 6), torch.ones(batch, slots, 6)
        for body in (reference, numba_cpu):
            got = body.decode_attention(q, memory, 0, 1.0, 4)
            assert got.shape == (batch, heads, 4) and not got.any()


def test_the_environment_chooses_the_body(monkeypatch):
    for name, module in (("reference", reference), ("numba", numba_cpu)):
        monkeypatch.setenv("LAB_KERNELS", name)
        assert dispatch.body_for(torch.ones(1)).decode_attention is module.decode_attention


def test_a_memory_in_eight_bits_gets_no_float_copy():
    """What NumPy and torch take for one token stays far below the codes, which are a fourth of a float copy."""
    q, memory, _ = attending.case("float8", 1, 8, 20_000, 64, 16, seed=10)
    attending.attend(numba_cpu, q, memory, 20_000, 0.1, 64)
    tracemalloc.start()
    attending.attend(numba_cpu, q, memory, 20_000, 0.1, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory[0].nbytes / 20


SHAPES = """
import attending, torch
from deepseek_lab.kernels import numba_cpu, numba_attention
for kind in attending.MEMORIES:
    for slots, latent, rope in [(1, 1, 0), (70, 18, 6), (130, 130, 20), (64, 32, 0)]:
        q, memory, joint = attending.case(kind, 2, 9, slots, latent, rope, seed=11)
        lengths = torch.tensor([slots, slots // 2])
        got = attending.attend(numba_cpu, q, memory, lengths, 0.2, latent)
        assert attending.worst(got, q, joint, lengths, 0.2, latent) <= 1
"""


def test_no_index_leaves_its_array(tmp_path):
    """But for those of small products, which check nothing: they stay within what `attend_tile` names."""
    script = SHAPES + "print('inside')"
    assert run(script, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path)) == "inside\n"


def test_every_way_of_keeping_a_memory_is_compiled_beforehand(tmp_path):
    """Here by the part of `python -m deepseek_lab.kernels` that is about attention."""
    ahead = "from deepseek_lab.kernels import __main__, numba_cpu; __main__.compile_attention(numba_cpu)"
    run(ahead, NUMBA_CACHE_DIR=str(tmp_path))
    script = SHAPES + "print(sum(numba_attention.attend.stats.cache_misses.values()))"
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "0\n"
