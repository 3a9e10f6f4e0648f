"""Rows go to their experts and back: every body says what the definition says, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import run

from deepseek_lab.kernels import dispatch, numba_cpu, reference

BODIES = pytest.mark.parametrize("body", [reference, numba_cpu], ids=["reference", "numba"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def case(tokens, choices, hidden, experts=5, dtype=torch.float32, seed=0):
    """Tokens, their gradient, answers, weights (some zero, some negative), the order by expert and its inverse."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient = (torch.randn(tokens, hidden, generator=generator).to(dtype) for _ in range(2))
    answers = torch.randn(tokens * choices, hidden, generator=generator).to(dtype)
    weights = torch.randn(tokens, choices, generator=generator) * (
        torch.rand(tokens, choices, generator=generator) > 0.1
    )
    order = torch.randint(experts, (tokens * choices,), generator=generator).argsort(stable=True)
    return x, gradient, answers, weights, order, order.argsort()


def same(got, expected):
    """The same bits (any NaN for a NaN) and the same kind of tensor."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = (x.float().nan_to_num(nan=0.5).view(torch.int32) for x in (got, expected))
    assert torch.equal(got, expected)


def assert_bodies_agree(x, gradient, answers, weights, order, back):
    choices = weights.shape[1]
    same(numba_cpu.permute(x, order, choices), reference.permute(x, order, choices))
    same(numba_cpu.unpermute(answers, back, weights), reference.unpermute(answers, back, weights))
    got, expected = (body.unpermute_gradients(gradient, answers, order, weights) for body in (numba_cpu, reference))
    for pair in zip(got, expected, strict=True):
        same(*pair)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 40), choices=st.integers(1, 9), hidden=st.integers(0, 150), experts=st.integers(1, 9),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**31))  # fmt: skip
def test_every_shape_gives_the_bits_of_the_reference(tokens, choices, hidden, experts, dtype, seed):
    assert_bodies_agree(*case(tokens, choices, hidden, experts, dtype, seed))


@DTYPES
def test_numbers_of_all_sizes_give_the_bits_of_the_reference(dtype):
    x, gradient, answers, weights, order, back = case(30, 4, 100, dtype=dtype)
    sizes = torch.logspace(-44, 38, 100)
    answers, x = ((rows * sizes).to(dtype) for rows in (answers, x))
    answers[3, ::7], answers[5, 1::7], answers[6, 2::7], answers[7] = torch.inf, -torch.inf, torch.nan, 3.3e38
    assert_bodies_agree(x, gradient, answers, weights * 3, order, back)


@BODIES
@DTYPES
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(30, 4, 5), (1, 3, 5), (20, 2, 1), (1, 1, 1)])
def test_the_definition_one_row_at_a_time(body, dtype, tokens, choices, experts):
    """One row, and all slots with one expert, among them."""
    x, gradient, answers, weights, order, back = case(tokens, choices, 50, experts, dtype)
    sent = body.permute(x, order, choices)
    assert all(torch.equal(sent[i], x[slot // choices]) for i, slot in enumerate(order.tolist()))
    got, (of_answers, of_weights) = (
        body.unpermute(answers, back, weights),
        body.unpermute_gradients(gradient, answers, order, weights),
    )
    for token in range(tokens):
        total = torch.zeros(50)
        for choice in range(choices):
            at = back[token * choices + choice]
            total += weights[token, choice] * answers[at].float()
            assert torch.equal(of_answers[at], (weights[token, choice] * gradient[token].float()).to(dtype))
            terms = gradient[token].double() * answers[at].double()
            # 6 rounded sums of partial sums after one or two products, each off by half a unit of its size
            assert abs(of_weights[token, choice] - terms.sum()) <= 8 * 2.0**-24 * terms.abs().sum()
        assert torch.equal(got[token], total.to(dtype))


@BODIES
def test_gradients_are_those_of_the_weighted_sum(body):
    _, gradient, answers, weights, order, back = case(12, 3, 70)
    rows, shares = answers.double().requires_grad_(), weights.double().requires_grad_()
    (rows[back].unflatten(0, (12, 3)) * shares[..., None]).sum(1).backward(gradient.double())
    of_answers, of_weights = body.unpermute_gradients(gradient, answers, order, weights)
    torch.testing.assert_close(of_answers, rows.grad.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(of_weights, shares.grad.float(), rtol=1e-6, atol=1e-5)


@BODIES
def test_rows_that_do_not_lie_in_one_piece_are_read_right(body):
    _, gradient, answers, weights, order, back = case(10, 2, 40)
    wide = torch.randn(20, 80)
    wide[:, ::2] = answers
    apart = wide[:, ::2], weights.T.contiguous().T, gradient.T.contiguous().T
    same(body.permute(apart[2], order, 2), reference.permute(gradient, order, 2))
    same(body.unpermute(apart[0], back, apart[1]), reference.unpermute(answers, back, weights))
    expanded = torch.ones(1, 1).expand(10, 40)  # what .sum().backward() hands over
    got = body.unpermute_gradients(expanded, apart[0], order, apart[1])
    for pair in zip(got, reference.unpermute_gradients(torch.ones(10, 40), answers, order, weights), strict=True):
        same(*pair)


@BODIES
def test_a_part_of_the_slots_can_be_sent(body):
    """Those at the end of the order belong to no expert where choices are dropped."""
    x, gradient, answers, weights, order, _ = case(10, 3, 20)
    assert torch.equal(body.permute(x, order[:17], 3), reference.permute(x, order, 3)[:17])
    of_answers, of_weights = body.unpermute_gradients(gradient, answers[:17], order[:17], weights)
    whole = reference.unpermute_gradients(gradient, answers, order, weights)
    assert torch.equal(of_answers, whole[0][:17])
    assert torch.equal(of_weights.flatten()[order[:17]], whole[1].flatten()[order[:17]])
    assert not of_weights.flatten()[order[17:]].any()


@BODIES
def test_what_does_not_fit_is_refused(body):
    x, gradient, answers, weights, order, back = case(6, 2, 8)
    for wrong in (order.clone().fill_(12), order - 1):
        with pytest.raises(IndexError, match=r"order has values from .*; there are 12 slots"):
            body.permute(x, wrong, 2)
        with pytest.raises(IndexError, match="order has values"):
            body.unpermute_gradients(gradient, answers, wrong, weights)
        with pytest.raises(IndexError, match="back has values"):
            body.unpermute(answers, wrong, weights)
    with pytest.raises(TypeError, match=r"order got torch\.int32; expected torch\.int64"):
        body.permute(x, order.int(), 2)
    with pytest.raises(ValueError, match=r"expected \[slot, hidden\], \[token \* choice\], \[token, choice\]"):
        body.unpermute(answers, back[:-1], weights)
    with pytest.raises(ValueError, match="at least one choice"):
        body.permute(x, order, 0)
    with pytest.raises(ValueError, match=r"gradient, answers, order, weights of shapes \[\(6, 7\)"):
        body.unpermute_gradients(gradient[:, :7], answers, order, weights)


def test_compiled_kernels_refuse_dtypes_that_they_were_not_made_for():
    x, gradient, answers, weights, order, back = case(6, 2, 8)
    with pytest.raises(TypeError, match=r"got rows in torch\.float64; expected torch\.float32 or torch\.bfloat16"):
        numba_cpu.permute(x.double(), order, 2)
    with pytest.raises(TypeError, match=r"rows in torch\.float32 and weights in torch\.float64"):
        numba_cpu.unpermute(answers, back, weights.double())
    with pytest.raises(TypeError, match=r"rows in torch\.bfloat16, torch\.float32"):
        numba_cpu.unpermute_gradients(gradient.bfloat16(), answers, order, weights)
    reference.unpermute(answers.double(), back, weights.double())


def test_the_environment_chooses_the_body(monkeypatch):
    for name, module in (("reference", reference), ("numba", numba_cpu)):
        monkeypatch.setenv("LAB_KERNELS", name)
        assert dispatch.body_for(torch.ones(1)).unpermute is module.unpermute


SHAPES = """
import torch
from deepseek_lab.kernels import numba_cpu, numba_dispatch
for dtype in (torch.float32, torch.bfloat16):
    for tokens, choices, hidden in [(0, 2, 5), (1, 1, 1), (7, 3, 70), (4, 2, 32), (3, 2, 0)]:
        index, weights = torch.arange(tokens * choices), torch.ones(tokens, choices)
        rows, answers = (torch.ones(count, hidden, dtype=dtype) for count in (tokens, len(index)))
        numba_cpu.permute(rows, index, choices)
        numba_cpu.unpermute(answers, index, weights)
        numba_cpu.unpermute_gradients(rows, answers, index, weights)
"""


def test_no_index_leaves_its_array(tmp_path):
    assert run(SHAPES + "print('inside')", NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path)) == "inside\n"


def test_both_dtypes_are_compiled_beforehand(tmp_path):
    """Here by the part of `python -m deepseek_lab.kernels` that is about moving rows."""
    ahead = "from deepseek_lab.kernels import __main__, numba_cpu; __main__.compile_dispatch(numba_cpu)"
    run(ahead, NUMBA_CACHE_DIR=str(tmp_path))
    script = (
        SHAPES
        + """
kernels = numba_dispatch.copy_rows, numba_dispatch.sum_rows, numba_dispatch.spread_gradient
print(sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels))
"""
    )
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "0\n"
