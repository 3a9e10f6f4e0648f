"""FP8 blocks: the codes and scales that the released weights would have, ragged edges included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.precision import BLOCK, BlockScaled, quantize_blocks

# Shapes of weight_scale_inv in the released DeepSeek-V3 weights (V2-Lite for the last): README_WEIGHTS.md.
SCALE_SHAPES = [
    ((1536, 7168), (12, 56)), ((24576, 1536), (192, 12)), ((576, 7168), (5, 56)), ((32768, 512), (256, 4)),
    ((7168, 16384), (56, 128)), ((18432, 7168), (144, 56)), ((7168, 18432), (56, 144)), ((2048, 7168), (16, 56)),
    ((7168, 2048), (56, 16)), ((10944, 2048), (86, 16)),
]  # fmt: skip
SIZES = [(1, 1), (128, 128), (127, 129), (300, 260), (5, 1000), (256, 1)]


def matrix(rows, columns, seed=0):
    """A matrix whose blocks have very different sizes, so that a scale of the wrong block shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, -(-rows // BLOCK) * -(-columns // BLOCK))
    sizes = sizes.view(-(-rows // BLOCK), -(-columns // BLOCK)).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return torch.randn(rows, columns, generator=generator) * sizes[:rows, :columns]


@pytest.mark.parametrize(("shape", "scales"), SCALE_SHAPES)
def test_scales_have_the_published_shapes(shape, scales):
    with torch.device("meta"):  # no memory for the codes: only the check of the shapes runs
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
        assert BlockScaled(codes, torch.empty(scales)).dequantize().shape == shape
        with pytest.raises(ValueError, match=rf"expected \({scales[0]}, {scales[1]}\)"):
            BlockScaled(codes, torch.empty(scales[0], scales[1] + 1)).dequantize()


def test_a_real_matrix_of_ragged_height_gets_five_rows_of_scales():
    q = quantize_blocks(matrix(576, 640))  # kv_a_proj_with_mqa has 576 rows
    assert q.scales.shape == (5, 5)
    assert q.nbytes == 576 * 640 + 5 * 5 * 4


@pytest.mark.parametrize("size", SIZES)
def test_every_block_is_quantised_on_its_own(size):
    w = matrix(*size)
    q = quantize_blocks(w)
    assert q.codes.dtype == torch.float8_e4m3fn and q.scales.dtype == torch.float32 and q.codes.shape == w.shape
    for i, rows in enumerate(w.split(BLOCK, 0)):
        for j, block in enumerate(rows.split(BLOCK, 1)):
            scale = block.abs().max() / 448
            codes = (block / scale).to(torch.float8_e4m3fn)
            got = q.codes[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            assert q.scales[i, j] == scale
            assert torch.equal(got.float(), codes.float())
            back = q.dequantize()[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            assert torch.equal(back, codes.float() * scale)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 10**6), st.floats(-30, 30))
def test_no_value_moves_by_more_than_half_a_step(rows, columns, seed, exponent):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q = quantize_blocks(w)
    # Normal codes keep 3 fraction bits: half a step is 1/16 of the value. Below 2^-6 the step is 2^-9.
    spread = q.scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    assert ((q.dequantize() - w).abs() <= torch.maximum(w.abs() / 16, 2.0**-10 * spread) * 1.0001).all()


def test_the_largest_value_of_a_block_keeps_its_sign_and_becomes_448():
    q = quantize_blocks(torch.tensor([[0.5, -3.0], [1.0, 0.25]]))
    assert q.codes.float().min() == -448
    assert q.scales.item() == pytest.approx(3 / 448)


def test_a_block_of_zeros_stays_zeros():
    w = matrix(200, 300)
    w[:128, 128:256] = 0
    q = quantize_blocks(w)
    assert q.scales[0, 1].item() == pytest.approx(2.2321428571428574e-07)  # 1e-4 / 448, as in the released kernels
    assert (q.dequantize()[:128, 128:256] == 0).all()
    assert q.dequantize().isfinite().all()


def test_quantising_twice_changes_nothing_more():
    once = quantize_blocks(matrix(300, 200)).dequantize()
    again = quantize_blocks(once).dequantize()
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


def test_bf16_matrices_are_quantised_from_their_values():
    w = matrix(130, 70).bfloat16()
    assert torch.equal(quantize_blocks(w).codes.float(), quantize_blocks(w.float()).codes.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_no_scale_can_save_is_refused(bad):
    w = matrix(130, 130)
    w[129, 129] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_blocks(w)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()])
def test_only_matrices_have_blocks(shape):
    with pytest.raises(ValueError, match="expected a matrix"):
        quantize_blocks(torch.ones(shape))
