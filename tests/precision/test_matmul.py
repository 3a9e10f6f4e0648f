"""FP8 products: the H800 model with tiles and blocks, what its few bits cost, and the exact product beside it."""

import pytest
import torch
from products import by_mmaemu, differing

from deepseek_lab.precision import (
    E5M2,
    BlockScaled,
    fp8_matmul,
    quantize,
    quantize_blocks,
    quantize_tensor,
    quantize_tiles,
)

SHAPES = [(33, 70, 512), (5, 129, 300), (64, 200, 97), (1, 1, 1), (7, 128, 1000)]


def matrix(*shape, seed):
    """Normal numbers whose size changes from channel to channel and from row to row, so that every scale is another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.randn(shape[-1], generator=generator).exp() * torch.randn(shape[-2], 1, generator=generator).exp()


def expected(a, b, step):
    """mmaemu's product, with the scale that belongs to each value read off what `dequantize` makes of ones."""
    scales = (BlockScaled(torch.ones_like(x.codes), *x[1:]).dequantize()[:, ::step].contiguous() for x in (a, b))
    return by_mmaemu(a.codes.view(torch.uint8), b.codes.view(torch.uint8), *scales, step)


def error(x, exact):
    """Relative error in the Euclidean norm."""
    return ((x.double() - exact).norm() / exact.norm()).item()


def calc_diff(x, y):
    """DeepGEMM's measure of two results: 1 - 2 <x, y> / (|x|^2 + |y|^2)."""
    x, y = x.double(), y.double()
    return (1 - 2 * (x * y).sum() / (x.square() + y.square()).sum()).item()


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_times_blocks_have_the_bits_of_mmaemu(shape, kernels, monkeypatch):
    monkeypatch.setenv("LAB_KERNELS", kernels)
    m, n, k = shape
    a, b = quantize_tiles(matrix(m, k, seed=0)), quantize_blocks(matrix(n, k, seed=1))
    assert differing(fp8_matmul(a, b, "h800"), expected(a, b, 128)) == 0


@pytest.mark.parametrize("promote_every", [32, 64, 128])
@pytest.mark.parametrize(("first", "second"), [
    ((1, 128), (1, 128)), ((128, 128), (128, 128)), ((1, 128), (200, 300)), ((150, 300), (200, 128)),
    ((3, 256), (1, 128)),
], ids=str)  # fmt: skip
def test_any_two_tilings_meet(first, second, promote_every):
    a, b = quantize(matrix(150, 300, seed=2), first), quantize(matrix(200, 300, seed=3), second, scale="ue8m0")
    assert differing(fp8_matmul(a, b, "h800", promote_every), expected(a, b, promote_every)) == 0


@pytest.mark.parametrize("promote_every", [96, 256, 1024, None])
def test_one_scale_for_the_tensor_may_be_promoted_at_any_interval(promote_every):
    a, b = quantize_tensor(matrix(20, 700, seed=4)), quantize_tensor(matrix(30, 700, seed=5))
    assert differing(fp8_matmul(a, b, "h800", promote_every), expected(a, b, promote_every or 704)) == 0


def test_the_weight_gradient_multiplies_tiles_along_the_tokens():
    """dW = dy^T x: both have 128 x 1 tiles, which lie along K once they are transposed."""
    dy, x = (quantize_tiles(matrix(300, width, seed=width), axis=-2) for width in (40, 50))
    got = fp8_matmul(dy.T, x.T, "h800")
    assert differing(got, expected(dy.T, x.T, 128)) == 0
    assert error(got, dy.dequantize().double().T @ x.dequantize().double()) < 1e-3


@pytest.mark.parametrize("accumulator", ["fp32", "h800"])
def test_leading_axes_stay(accumulator):
    x, b = matrix(6, 300, seed=6), quantize_blocks(matrix(70, 300, seed=7))
    flat = fp8_matmul(quantize_tiles(x), b, accumulator)
    assert torch.equal(fp8_matmul(quantize_tiles(x.view(2, 3, 300)), b, accumulator), flat.view(2, 3, 70))
    assert torch.equal(
        fp8_matmul(quantize_tiles(x[0]), b, accumulator), fp8_matmul(quantize_tiles(x[:1]), b, accumulator)[0]
    )


def test_autocast_takes_no_bits_of_the_product():
    a, b = quantize_tiles(matrix(20, 300, seed=15)), quantize_blocks(matrix(30, 300, seed=16))
    plain = fp8_matmul(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_matmul(a, b), plain)


@pytest.mark.parametrize("accumulator", ["fp32", "h800"])
def test_scales_in_training_are_taken_as_they_are(accumulator):
    a, b = quantize_tiles(matrix(4, 300, seed=17)), quantize_blocks(matrix(5, 300, seed=18))
    learned = a._replace(scales=a.scales.clone().requires_grad_())
    assert torch.equal(fp8_matmul(learned, b, accumulator), fp8_matmul(a, b, accumulator))


@pytest.mark.parametrize("accumulator", ["fp32", "h800"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 40), (3, 0, 40), (3, 4, 0)])
def test_sizes_of_zero_give_zeros(m, n, k, accumulator):
    a, b = quantize_tiles(torch.ones(m, k)), quantize_blocks(torch.ones(n, k))
    assert torch.equal(fp8_matmul(a, b, accumulator), torch.zeros(m, n))


@pytest.mark.parametrize("accumulator", ["fp32", "h800"])
def test_a_tile_that_is_lost_takes_its_row_alone(accumulator):
    x = matrix(4, 300, seed=8)
    b = quantize_blocks(matrix(9, 300, seed=9))
    clean = fp8_matmul(quantize_tiles(x), b, accumulator)
    x[2, 200] = torch.nan
    got = fp8_matmul(quantize_tiles(x, nonfinite="pass"), b, accumulator)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(("fmt_a", "fmt_b"), [("E4M3", "E4M3"), ("E5M2", "E4M3"), ("E4M3", "E5M2")])
def test_fp32_is_the_product_of_what_both_stand_for(fmt_a, fmt_b):
    """torch's FP8 product on a CPU takes one scale per tensor or row. Bound: a sum of 608 products in any order."""
    x, w = matrix(48, 608, seed=10), matrix(64, 608, seed=11)
    for rows_a, rows_b in ((48, 64), (1, 1)):
        a, b = quantize(x, (rows_a, 608), fmt=fmt_a), quantize(w, (rows_b, 608), fmt=fmt_b)
        scales = (a.scales, b.scales.T.contiguous()) if rows_a == 1 else (a.scales.squeeze(), b.scales.squeeze())
        theirs = torch._scaled_mm(a.codes, b.codes.T, *scales, out_dtype=torch.float32)
        exact = a.dequantize().double() @ b.dequantize().double().T
        assert error(fp8_matmul(a, b), theirs.double()) < 2 * 608**0.5 * 2**-24
        assert error(fp8_matmul(a, b, "fp32"), exact) < 608**0.5 * 2**-24


@pytest.mark.parametrize(("shape_of", "alone", "promoted"), [
    (torch.Tensor.abs, 7.1e-2, 6.5e-4),  # positive: what is cut off adds up
    (torch.Tensor.clone, 1.35e-3, 1.3e-4),  # of both signs: much of it cancels
], ids=["positive", "normal"])  # fmt: skip
def test_promotion_repairs_a_long_sum(shape_of, alone, promoted):
    generator = torch.Generator().manual_seed(12)
    a, b = (quantize_tensor(shape_of(torch.randn(64, 4096, generator=generator))) for _ in range(2))
    exact = a.dequantize().double() @ b.dequantize().double().T
    errors = [error(fp8_matmul(a, b, "h800", every), exact) for every in (None, 1024, 128, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(alone, rel=0.1)
    assert errors[2] == pytest.approx(promoted, rel=0.1)
    assert error(fp8_matmul(a, b, "fp32"), exact) < errors[3] / 10


def test_truncation_makes_positive_sums_too_small():
    generator = torch.Generator().manual_seed(13)
    a, b = (quantize_tensor(torch.rand(32, 4096, generator=generator)) for _ in range(2))
    exact = a.dequantize().double() @ b.dequantize().double().T
    alone, promoted = ((fp8_matmul(a, b, "h800", every).double() - exact) / exact for every in (None, 128))
    assert (alone < 0).all()
    assert (promoted < 0).all()
    assert alone.mean().item() == pytest.approx(-0.07, rel=0.1)
    assert alone.mean() / promoted.mean() > 50


def test_eight_bits_cost_what_deepgemm_allows():
    """DeepGEMM asks for less than 1e-3 and finds about 0.0007; the accumulator's part is far below a millionth."""
    generator = torch.Generator().manual_seed(14)
    x, w = (torch.randn(256, 1024, generator=generator) for _ in range(2))
    a, b = quantize_tiles(x), quantize_blocks(w)
    wide, narrow = (fp8_matmul(a, b, accumulator) for accumulator in ("fp32", "h800"))
    assert calc_diff(narrow, x.double() @ w.double().T) == pytest.approx(0.0007, rel=0.1)
    assert 0 < calc_diff(narrow, wide) < 2e-8


def operand(*shape, tile=(1, 128), **how):
    return quantize(matrix(*shape, seed=0), tile, **how)


X, W = operand(3, 256), operand(4, 256)
OTHER_CODES = X._replace(codes=X.codes.view(torch.uint8))
OTHER_SCALES = X._replace(scales=X.scales[:, :1])
STRADDLING = BlockScaled(torch.zeros(2, 3, 256).to(X.codes.dtype), torch.ones(2, 2, 2), (2, 128))
ELSEWHERE = X._replace(codes=X.codes.to("meta"), scales=X.scales.to("meta"))


@pytest.mark.parametrize(("a", "b", "how", "error", "message"), [
    (torch.ones(3, 256), W, {}, TypeError, "got Tensor for a; expected BlockScaled, as quantize_tiles"),
    (X, W.codes, {}, TypeError, "got Tensor for b"),
    (OTHER_CODES, W, {}, TypeError, "codes in torch.uint8; expected float8_e4m3fn or float8_e5m2"),
    (OTHER_SCALES, W, {}, ValueError, r"scales of shape \(3, 1\) beside codes \(3, 256\); expected \(3, 2\)"),
    (ELSEWHERE, W, {}, ValueError, "operands on meta and cpu"),
    (STRADDLING, W, {}, ValueError, r"shape \(2, 3, 256\); expected a matrix \[row, column\] for 2 x 128 tiles"),
    (X, operand(4, 255), {}, ValueError, r"\(3, 256\) and \(4, 255\); expected \[..., K\] and \[N, K\]"),
    (X, operand(256, 4), {}, ValueError, "b is transposed here"),
    (X, operand(2, 4, 256), {}, ValueError, r"expected \[..., K\] and \[N, K\]"),
    (X, W, {"accumulator": "fp16"}, ValueError, "'fp16' is unknown; choose one of fp32, h800"),
])  # fmt: skip
def test_operands_that_do_not_fit_are_refused(a, b, how, error, message):
    with pytest.raises(error, match=message):
        fp8_matmul(a, b, **how)


@pytest.mark.parametrize(("a", "b", "promote_every", "message"), [
    (operand(3, 256, fmt=E5M2), W, 128, "got E5M2 and E4M3; V3 multiplies E4M3 only"),
    (X, operand(4, 256, fmt=E5M2), 128, "got E4M3 and E5M2"),
    (OTHER_SCALES, W, 128, r"expected \(3, 2\)"),
    (X, W, None, "promote_every=None with scales that change every 128 values along K: sums are multiplied by"),
    (X, W, 256, "promote_every=256 with scales that change every 128 values"),
    (X, W, 96, "Choose a number that divides the width of the tiles, or one scale for all of K"),
    (X, operand(4, 256, tile=(1, 64)), 128, "every 64 and 128 values"),
    (operand(256, 3, tile=(128, 1)), operand(4, 3), 128, "change every 1 values along K"),
    (X, W, 40, "promote_every=40; an instruction adds 32 products, so choose a multiple of 32, or None"),
    (X, W, 0, "promote_every=0"),
    (X, W, -128, "promote_every=-128"),
    (X, W, 128.0, "promote_every=128.0"),
])  # fmt: skip
def test_what_the_h800_model_cannot_promote_is_refused(a, b, promote_every, message):
    with pytest.raises(ValueError, match=message):
        fp8_matmul(a, b, "h800", promote_every)
