"""What a step sees depends on seed and step alone."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.data import Batches

TOKENS = torch.randint(0, 260, (5000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)


def test_the_same_seed_gives_the_same_steps_in_any_order():
    batches, again = Batches(TOKENS, 4, 16, seed=7), Batches(TOKENS.clone(), 4, 16, seed=7)
    first = [batches[step] for step in range(20)]
    assert all(torch.equal(again[step], first[step]) for step in reversed(range(20)))
    assert all(torch.equal(a, b) for a, b in itertools.islice(zip(batches, first, strict=False), 20))


def test_steps_seeds_and_rows_differ():
    batches = Batches(TOKENS, 4, 16, seed=7)
    seen = {tuple(row.tolist()) for step in range(50) for row in batches[step]}
    assert len(seen) > 180  # of 200 rows a few may start at the same place
    for seed in (0, 1, 6, 8, 7 + 2**16):
        other = Batches(TOKENS, 4, 16, seed)
        assert not any(torch.equal(batches[step], other[step]) for step in range(20))
        assert not any(torch.equal(batches[step], other[step + 1]) for step in range(20))


def test_the_random_numbers_of_others_are_neither_used_nor_moved():
    batches = Batches(TOKENS, 4, 16)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = batches[5]
    assert torch.rand(1) == expected
    torch.manual_seed(2)
    assert torch.equal(batches[5], first)


@given(batch=st.integers(1, 5), length=st.integers(1, 40), step=st.integers(0, 10**9), seed=st.integers(0, 2**30))
def test_rows_are_stretches_of_the_text_and_targets_are_one_further(batch, length, step, seed):
    text = torch.arange(41).to(torch.int16)  # every token says where it stood
    rows = Batches(text, batch, length, seed)[step]
    assert rows.shape == (batch, length + 1) and rows.dtype == torch.int64
    assert (rows.diff(dim=1) == 1).all()
    inputs, targets = rows[:, :-1], rows[:, 1:]
    assert torch.equal(targets, inputs + 1)


def test_every_start_from_the_first_to_the_last_possible_occurs():
    batches = Batches(torch.arange(12), batch=50, length=4)
    starts = torch.cat([batches[step][:, 0] for step in range(20)])
    assert starts.unique().tolist() == list(range(8))
    assert torch.cat([batches[step][:, -1] for step in range(20)]).max() == 11


def test_a_fingerprint_changes_with_text_sizes_and_seed():
    base = Batches(TOKENS, 4, 16, 0).fingerprint()
    other = TOKENS.clone()
    other[4321] += 1
    variants = [Batches(other, 4, 16, 0), Batches(TOKENS[:-1], 4, 16, 0), Batches(TOKENS, 5, 16, 0),
                Batches(TOKENS, 4, 17, 0), Batches(TOKENS, 4, 16, 1)]  # fmt: skip
    assert len({base, *(b.fingerprint() for b in variants)}) == 6
    assert Batches(TOKENS.clone(), 4, 16, 0).fingerprint() == base
    assert Batches(torch.stack([TOKENS, TOKENS])[:, :].T.reshape(-1)[::2], 4, 16).fingerprint() == base


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match=r"shape \(16,\); expected \[token\] with at least length \+ 1 = 17"):
        Batches(TOKENS[:16], 4, 16)
    with pytest.raises(ValueError, match="expected"):
        Batches(TOKENS[None], 4, 16)
    with pytest.raises(ValueError, match="batch=0, length=16"):
        Batches(TOKENS, 0, 16)
    with pytest.raises(ValueError, match="batch=4, length=0"):
        Batches(TOKENS, 4, 0)
    with pytest.raises(IndexError, match="batch -1 does not exist"):
        Batches(TOKENS, 4, 16)[-1]
    assert Batches(TOKENS[:17], 4, 16)[0].shape == (4, 17)
    assert Batches(TOKENS, 4, 16).tokens_per_step == 64


@pytest.mark.parametrize("sizes", [{"batch": 4.0}, {"length": "16"}, {"seed": None}, {"seed": 0.5}], ids=str)
def test_sizes_and_seeds_are_whole_numbers(sizes):
    name, value = next(iter(sizes.items()))
    with pytest.raises(TypeError, match=f"Batches got {name}={value!r}; expected a whole number"):
        Batches(TOKENS, **{"batch": 4, "length": 16, **sizes})
    same = Batches(TOKENS, numpy.int64(4), numpy.int32(16), numpy.int64(7))
    assert same.fingerprint() == Batches(TOKENS, 4, 16, 7).fingerprint()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64])
def test_tokens_of_every_whole_type_are_read(dtype):
    tokens = (TOKENS % 200).to(dtype)
    assert torch.equal(Batches(tokens, 4, 16)[3], Batches((TOKENS % 200).long(), 4, 16)[3])


@pytest.mark.parametrize("wrong", ["a text", [1, 2, 3], numpy.arange(100)])
def test_what_is_no_tensor_is_refused_with_the_right_call(wrong):
    with pytest.raises(TypeError, match=rf"got {type(wrong).__name__}; .*Batches\(data\.split\(texts\)\[0\], batch"):
        Batches(wrong, 4, 16)
