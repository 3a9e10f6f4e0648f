"""The product of the H800 model has, in both bodies for a CPU, the bits of mmaemu's model of a Hopper tensor core."""

import os
import subprocess
import sys

import mmaemu
import pytest
import torch
from products import CODES, by_mmaemu, differing, every, operands

from deepseek_lab.kernels import numba_cpu, numba_product, reference, reference_product

BODIES = pytest.mark.parametrize("body", [reference, numba_cpu], ids=["reference", "numba"])
SHAPES = [(33, 70, 512, 128), (5, 129, 300, 128), (64, 3, 97, 32), (1, 1, 1, 32), (7, 64, 1000, 256), (2, 65, 31, 64)]


def codes_of(*numbers):
    return torch.tensor([numbers]).to(torch.float8_e4m3fn).view(torch.uint8)


def dot(body, a, b, step=32):
    """The product of two rows of numbers, unscaled."""
    one = torch.ones(1, -(-len(a) // step))
    return body.product(codes_of(*a), codes_of(*b), one, one, step).item()


@BODIES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", CODES)
def test_all_bits_are_those_of_mmaemu(body, kind, shape):
    inputs = operands(kind, *shape)
    assert differing(body.product(*inputs), by_mmaemu(*inputs)) == 0


@BODIES
@pytest.mark.parametrize("kind", CODES)
def test_a_long_sum_without_promotion_has_the_bits_of_mmaemu(body, kind):
    inputs = operands(kind, 6, 9, 4096, step=4096)
    assert differing(body.product(*inputs), by_mmaemu(*inputs)) == 0


@BODIES
def test_promotion_every_128_is_what_mmaemu_calls_slow_accumulation(body):
    a, b, *_ = operands("every code", 40, 50, 1111, step=128)
    expected = mmaemu.accumulate(
        *(x.view(torch.float8_e4m3fn) for x in (a, b)), use_fast_accum=False, profile="hopper", splitk=1
    )
    assert differing(body.product(a, b, torch.ones(40, 9), torch.ones(50, 9), 128), expected) == 0


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_hundred_thousand_sums_have_the_bits_of_mmaemu(seed):
    for kind in CODES:
        inputs = operands(kind, 130, 250, 256, step=128, seed=seed)
        assert differing(numba_cpu.product(*inputs), by_mmaemu(*inputs)) == 0, kind


@pytest.mark.parametrize(("name", "other"), [("KEPT", 12), ("KEPT", 14), ("CHAIN", 16), ("CHAIN", 64)])
def test_these_inputs_would_show_another_accumulator(name, other, monkeypatch):
    inputs = operands("every code", 8, 9, 256, step=128)
    expected = by_mmaemu(*inputs)
    monkeypatch.setattr(reference_product, name, other)
    assert differing(reference.product(*inputs), expected) > 0


@BODIES
def test_thirteen_bits_behind_the_largest_are_kept_and_the_rest_is_cut_off(body):
    kept, lost = (2**-6, 2**-7), (2**-6, 2**-8)  # products 2^-13 and 2^-14 beside 1
    for sign in (1, -1):  # towards zero: a negative rest does not take a step
        assert dot(body, [1, kept[0]], [1, sign * kept[1]]) == 1 + sign * 2**-13
        assert dot(body, [1] + 31 * [lost[0]], [1] + 31 * [sign * lost[1]]) == 1


@BODIES
def test_the_exponent_of_a_product_is_the_sum_of_two_exponents(body):
    """1.75 * 1.75 = 3.0625 counts as 2^0: two products of 2^-13 survive the alignment, and their sum the last cut."""
    assert dot(body, [1.75, 2**-6, 2**-6], [1.75, 2**-7, 2**-7]) == 3.0625 + 2**-12
    assert dot(body, [1.75, 2**-6], [1.75, 2**-7]) == 3.0625  # 13 bits behind 2^1


@BODIES
def test_a_subnormal_number_has_the_exponent_of_the_smallest_normal_one(body):
    """2^-9 * 256 = 0.5 counts as 2^(-6 + 8): what is smaller than 2^-11 is cut off."""
    assert dot(body, [2**-9, 2**-6], [256, 2**-6]) == 0.5  # beside 2^-1, 2^-12 would be kept
    assert dot(body, [2**-9, 2**-6], [256, 2**-5]) == 0.5 + 2**-11


@BODIES
def test_the_partial_sum_is_aligned_with_the_products(body):
    """Beside 1024, 2^-3 is the last that counts; promoted after each chain, all of the small ones do."""
    a, b = [32] + 31 * [0] + 32 * [0.25], [32] + 31 * [0] + 32 * [0.25]
    assert dot(body, a, b, step=64) == 1024
    assert dot(body, a, b, step=32) == 1026


@BODIES
def test_sums_of_nothing_are_plus_zero(body):
    for a, b in (([0, -0.0], [-1, 1]), ([3, 3], [5, -5]), ([2**-9], [-0.0])):
        assert str(dot(body, a, b)) == "0.0"


@BODIES
def test_scales_are_applied_one_after_the_other(body):
    """(dot * a_scale) * b_scale, as the released kernel does; dot * (a_scale * b_scale) is rounded elsewhere."""
    generator = torch.Generator().manual_seed(0)
    a_scale, b_scale = (torch.rand(size, 1, generator=generator) for size in (50, 60))
    a, b = codes_of(1.25), codes_of(1)
    got = body.product(a.expand(50, 1), b.expand(60, 1), a_scale, b_scale, 32)
    assert torch.equal(got, (1.25 * a_scale) * b_scale.T)
    assert not torch.equal(got, 1.25 * (a_scale * b_scale.T))


@BODIES
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_takes_its_row_or_column_and_nothing_else(body, code):
    a, b, *rest = operands("every code", 5, 70, 200, step=128)
    expected = by_mmaemu(a, b, *rest)
    a[1, 150] = b[66, 3] = code
    expected[1], expected[:, 66] = torch.nan, torch.nan
    assert differing(body.product(a, b, *rest), expected) == 0
    assert differing(by_mmaemu(a, b, *rest), expected) == 0


@BODIES
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 40), (3, 0, 40), (3, 70, 0), (0, 0, 0)])
def test_sizes_of_zero_give_zeros(body, m, n, k):
    got = body.product(*operands("every code", m, n, k, step=32))
    assert torch.equal(got, torch.zeros(m, n))


@BODIES
def test_operands_may_lie_in_memory_as_they_like_and_stay_as_they_are(body):
    inputs = operands("every code", 20, 70, 160, step=128)
    strided = [x.T.contiguous().T if i % 2 else x.repeat_interleave(2, 0)[::2] for i, x in enumerate(inputs[:4])]
    before = [x.clone() for x in strided]
    assert torch.equal(body.product(*strided, 128), body.product(*inputs))
    assert all(torch.equal(x, y) for x, y in zip(strided, before, strict=True))


@BODIES
@pytest.mark.parametrize(("change", "error", "message"), [
    ({"step": 100}, ValueError, "step=100; products are added 32 at a time"),
    ({"step": 0}, ValueError, "step=0"),
    ({"b": every(6, 255, seed=0)}, ValueError, r"codes \(5, 256\) and \(6, 255\); expected \[M, K\] and \[N, K\]"),
    ({"a": every(256, seed=0)}, ValueError, r"codes \(256,\)"),
    ({"a_scales": torch.ones(5, 1)}, ValueError, r"scales \(5, 1\) and \(6, 2\); expected \(5, 2\) and \(6, 2\)"),
    ({"b_scales": torch.ones(1, 2)}, ValueError, r"one per 128 values along K"),
    ({"a": torch.ones(5, 256)}, TypeError, "got torch.float32 and torch.uint8; expected E4M3 codes as torch.uint8"),
    ({"b_scales": torch.ones(6, 2).double()}, TypeError, "scales in torch.float32 and torch.float64"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(body, change, error, message):
    inputs = dict(zip(("a", "b", "a_scales", "b_scales", "step"), operands("every code", 5, 6, 256, 128), strict=True))
    with pytest.raises(error, match=message):
        body.product(**(inputs | change))


def test_one_signature_serves_all_operands():
    for m, n, k, step in [(1, 1, 1, 32), (9, 70, 300, 128), (3, 0, 40, 32), (2, 64, 0, 32)]:
        numba_cpu.product(*operands("every code", m, n, k, step))
    assert len(numba_product.multiply.signatures) == 1


def test_every_index_is_in_bounds(tmp_path):
    """The same products with Numba's bounds check on, which a call that is wrong on purpose shows to be on."""
    here = os.path.dirname(__file__)
    script = f"""
import sys
sys.path[:0] = {[os.path.dirname(here), here]!r}
import numpy as np, test_product as t
room = [np.zeros(shape, dtype) for shape in ((1, 32), (32, 64)) for dtype in (np.float32, np.int8)]
scales = np.ones((1, 1), np.float32), np.ones((1, 64), np.float32)
try:
    t.numba_product.multiply(*room[:2], scales[0], *room[2:], scales[1], 32, 1, np.zeros((1, 64), np.float32))
    print("no bounds check")
except IndexError:
    for shape in t.SHAPES:
        inputs = t.operands("every code", *shape)
        assert t.differing(t.numba_product.product(*inputs), t.reference.product(*inputs)) == 0
    print("in bounds")
"""
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (made.stdout.strip(), made.returncode) == ("in bounds", 0), made.stderr
