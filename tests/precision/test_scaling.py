"""Tiles and blocks in FP8: the codes and scales of the released kernels, bit for bit, ragged edges included."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.precision import (
    BLOCK,
    E4M3,
    E5M2,
    BlockScaled,
    fp8_matmul,
    quantize,
    quantize_blocks,
    quantize_tensor,
    quantize_tiles,
)

# Shapes of weight_scale_inv in the released DeepSeek-V3 weights (V2-Lite for the last): README_WEIGHTS.md.
SCALE_SHAPES = [
    ((1536, 7168), (12, 56)), ((24576, 1536), (192, 12)), ((576, 7168), (5, 56)), ((32768, 512), (256, 4)),
    ((7168, 16384), (56, 128)), ((18432, 7168), (144, 56)), ((7168, 18432), (56, 144)), ((2048, 7168), (16, 56)),
    ((7168, 2048), (56, 16)), ((10944, 2048), (86, 16)),
]  # fmt: skip
SIZES = [(1, 1), (128, 128), (127, 129), (300, 260), (5, 1000), (256, 1)]


# Ways of scaling: (name, how the library is asked, tile).
WAYS = [
    ("tiles", quantize_tiles, (1, BLOCK)),
    ("columns", lambda x, **how: quantize_tiles(x, axis=-2, **how), (BLOCK, 1)),
    ("blocks", quantize_blocks, (BLOCK, BLOCK)),
    ("odd", lambda x, **how: quantize(x, (3, 50), **how), (3, 50)),
]
each_way = pytest.mark.parametrize(("way", "tile"), [case[1:] for case in WAYS], ids=[case[0] for case in WAYS])


def expression(x, tile, fmt=E4M3, power_of_two=False):
    """Codes and scales as the released kernels compute them, tile by tile: amax, clamp, divide, divide, clamp, cast."""
    dtype = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[fmt]
    codes, scales = [], []
    for rows in x.split(tile[0], 0):
        parts = rows.split(tile[1], 1)
        row = torch.stack([part.abs().amax().clamp(min=1e-4) / fmt.max for part in parts])
        if power_of_two:
            row = row.double().log2().ceil().exp2().float()  # exact in float64
        scales.append(row)
        scaled = [(part / scale).clamp(-fmt.max, fmt.max) for part, scale in zip(parts, row, strict=True)]
        codes.append(torch.cat(scaled, 1).to(dtype).view(torch.uint8))
    return torch.cat(codes), torch.stack(scales)


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


@each_way
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_codes_and_scales_are_those_of_the_released_kernels(way, tile, size, fmt, scale):
    x = matrix(*size)
    before = x.clone()
    q = way(x, fmt=fmt, scale=scale)
    codes, scales = expression(x, tile, fmt, scale == "ue8m0")
    assert q.tile == tile and q.format is fmt
    assert torch.equal(q.codes.view(torch.uint8), codes)
    assert torch.equal(q.scales, scales)
    assert torch.equal(x, before)
    assert q.nbytes == codes.numel() + 4 * scales.numel()


@each_way
def test_a_value_is_its_code_times_the_scale_of_its_tile(way, tile):
    q = way(matrix(300, 260))
    spread = q.scales.repeat_interleave(tile[0], 0)[:300].repeat_interleave(tile[1], 1)[:, :260]
    assert torch.equal(q.dequantize(), q.codes.float() * spread)


def test_the_worked_tile():
    x = (torch.arange(128, dtype=torch.float32) + 1)[None] / 10
    q, up = quantize_tiles(x), quantize_tiles(x, scale="ue8m0")
    assert q.scales.item() == pytest.approx(0.02857142873108387, rel=1e-9) and up.scales.item() == 0.03125
    assert q.codes[0, :8].float().tolist() == [3.5, 7, 10, 14, 18, 20, 24, 28]
    assert up.codes[0, :8].float().tolist() == [3.25, 6.5, 10, 13, 16, 20, 22, 26]
    assert q.codes[0, -3:].float().tolist() == [448] * 3 and up.codes[0, -3:].float().tolist() == [416] * 3
    assert (q.dequantize() - x).abs().max().item() == pytest.approx(0.45714282989501953)
    assert ((q.dequantize() - x).norm() / x.norm()).item() == pytest.approx(0.025393398478627205, rel=1e-5)


@pytest.mark.parametrize(("scale", "error"), [("fp32", 0.025730647146701813), ("ue8m0", 0.0265500508248806)])
def test_normal_numbers_are_wrong_by_two_and_a_half_percent(scale, error):
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    wrong = quantize_tiles(x, scale=scale).dequantize() - x
    assert (wrong.norm() / x.norm()).item() == pytest.approx(error, rel=0.02)


def test_a_scale_a_little_above_a_power_of_two_goes_up_to_the_next():
    """float32 log2 of this scale is -9 exactly; by its exponent bits it becomes 2^-8."""
    scale = 0.0019531252328306437
    x = torch.full((1, 128), scale * 448)
    assert (x[0, 0] / 448).item() == scale
    assert torch.tensor(scale).log2().ceil().item() == -9
    assert quantize_tiles(x, scale="ue8m0").scales.item() == 2.0**-8
    assert quantize_tiles(torch.full((1, 128), 448 * 2.0**-9), scale="ue8m0").scales.item() == 2.0**-9


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_power_of_two_leaves_the_largest_value_between_224_and_448(largest):
    q = quantize_tiles(torch.tensor([[max(largest, 1e-4), -largest]]), scale="ue8m0")
    assert math.frexp(q.scales.item())[0] == 0.5
    assert 224 <= max(largest, 1e-4) / q.scales.item() <= 448


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_way
def test_nan_and_infinity_are_refused_by_name_and_place(way, tile, bad):
    x = matrix(140, 300)
    x[139, 7] = bad
    with pytest.raises(ValueError, match=rf"got {bad} at \[139, 7\].*nonfinite"):
        way(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_way
def test_nan_and_infinity_passed_on_spoil_their_tile_and_no_other(way, tile, bad):
    x = matrix(140, 300)
    good = way(x)
    x[139, 7] = bad
    q = way(x, nonfinite="pass")
    codes, scales = expression(x, tile)
    torch.testing.assert_close(q.scales, scales, rtol=0, atol=0, equal_nan=True)
    got, expected = q.codes.float(), codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    spoilt = torch.zeros(140, 300, dtype=torch.bool)
    row, column = 139 // tile[0] * tile[0], 7 // tile[1] * tile[1]
    spoilt[row : row + tile[0], column : column + tile[1]] = True
    assert q.dequantize()[spoilt].isnan().all()  # infinity: 0 times an infinite scale
    assert torch.equal(q.dequantize()[~spoilt], good.dequantize()[~spoilt])


def test_a_number_that_float32_cannot_say_is_refused_too():
    with pytest.raises(ValueError, match=r"got 1e\+300 at \[0, 1\]"):
        quantize_tiles(torch.tensor([[1.0, 1e300]], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(300,), (2, 3, 200), (2, 0, 200), (4, 0), (0, 4), (2, 3, 0)])
def test_tiles_of_one_row_keep_the_leading_axes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    q = quantize_tiles(x)
    assert q.codes.shape == shape and q.scales.shape == (*shape[:-1], -(-shape[-1] // BLOCK))
    if x.numel():
        rows = quantize_tiles(x.reshape(-1, shape[-1]))
        assert torch.equal(q.codes.float().view(rows.codes.shape), rows.codes.float())
        assert torch.equal(q.dequantize().view(rows.codes.shape), rows.dequantize())
    assert q.dequantize().shape == shape


@pytest.mark.parametrize("shape", [(0, 0), (0, 130), (130, 0)])
@each_way
def test_a_matrix_without_values_has_no_scales(way, tile, shape):
    q = way(torch.ones(shape))
    assert q.codes.shape == q.dequantize().shape == shape and q.scales.numel() == q.nbytes == 0


def test_one_scale_for_a_whole_matrix():
    x = matrix(300, 260)
    q = quantize_tensor(x)
    assert q.scales.shape == (1, 1) and q.scales.item() == x.abs().max() / 448
    assert torch.equal(q.codes.float(), (x / q.scales).to(torch.float8_e4m3fn).float())
    assert quantize_tensor(torch.ones(0, 3)).dequantize().shape == (0, 3)
    with pytest.raises(ValueError, match="expected a matrix"):
        quantize_tensor(torch.ones(2, 1, 4))


@each_way
def test_matrices_that_do_not_lie_in_one_row_are_scaled_by_their_values(way, tile):
    x = matrix(260, 300)
    for view in (x.T, x[::2, 3:], x[:, :1].expand(260, 70), x.requires_grad_()):
        got, expected = way(view), way(view.detach().clone(memory_format=torch.contiguous_format))
        assert torch.equal(got.codes.float(), expected.codes.float()) and torch.equal(got.scales, expected.scales)


def test_the_transposed_matrix_has_transposed_tiles():
    x = matrix(200, 300)
    turned = quantize_tiles(x).T
    expected = quantize_tiles(x.T, axis=-2)
    assert turned.tile == expected.tile == (BLOCK, 1)
    assert torch.equal(turned.codes.float(), expected.codes.float()) and torch.equal(turned.scales, expected.scales)
    assert torch.equal(turned.dequantize(), quantize_tiles(x).dequantize().T)
    assert turned.codes.is_contiguous() and turned.scales.is_contiguous()
    with pytest.raises(ValueError, match="only a matrix"):
        quantize_tiles(torch.ones(2, 3, 4)).T  # noqa: B018


@pytest.mark.parametrize("shape", [(576, 7168), (130, 70), (1, 1)])
def test_published_weights_are_read_as_they_are_written(shape):
    q = quantize_blocks(matrix(*shape))
    tensors = q.to_published("kv_a_proj_with_mqa.weight")
    assert sorted(tensors) == ["kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.weight_scale_inv"]
    back = BlockScaled.from_published(tensors, "kv_a_proj_with_mqa.weight")
    assert torch.equal(back.dequantize(), q.dequantize()) and back.nbytes == q.nbytes


def test_published_tensors_that_do_not_belong_together_are_refused():
    tensors = quantize_blocks(matrix(300, 200)).to_published("w")
    with pytest.raises(ValueError, match="no w_scale_inv"):
        BlockScaled.from_published({"w": tensors["w"]}, "w")
    with pytest.raises(ValueError, match="no v;"):
        BlockScaled.from_published(tensors, "v")
    with pytest.raises(ValueError, match=r"expected \(3, 2\)"):
        BlockScaled.from_published(tensors | {"w_scale_inv": torch.ones(2, 2)}, "w")
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        BlockScaled.from_published(tensors | {"w": torch.ones(300, 200)}, "w")
    for other in (quantize_tiles(matrix(300, 200)), quantize_blocks(matrix(300, 200), fmt=E5M2)):
        with pytest.raises(ValueError, match="published weights are E4M3 in 128 x 128 blocks"):
            other.to_published("w")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(fmt="E4M4"), "'E4M4' is unknown"),
        (dict(fmt="FP16"), "choose E4M3 or E5M2"),
        (dict(scale="e8m0"), "'e8m0' is unknown"),
        (dict(nonfinite="ignore"), "'ignore' is unknown"),
        (dict(tile=(0, 128)), "from 1 up"),
        (dict(tile=(128,)), "from 1 up"),
        (dict(tile=(1.0, 128)), "from 1 up"),
        (dict(tile=128), "got tile=128; expected two whole numbers"),
        (dict(tile=None), "got tile=None; expected two whole numbers"),
    ],
)
def test_what_does_not_exist_is_refused(how, says):
    with pytest.raises(ValueError, match=says):
        quantize(**{"x": torch.ones(2, 2), "tile": (1, 128)} | how)


def test_tiles_run_along_one_of_the_last_two_axes():
    with pytest.raises(ValueError, match="axis=0"):
        quantize_tiles(torch.ones(2, 2), axis=0)


@pytest.mark.parametrize("bad", [torch.arange(4).view(2, 2), torch.ones(2, 2) > 0, [[1.0]], None])
def test_only_tensors_of_floating_point_numbers_are_scaled(bad):
    with pytest.raises(TypeError, match="floating-point"):
        quantize_tiles(bad)
    with pytest.raises(TypeError, match="floating-point"):
        quantize_tensor(bad)


@pytest.mark.parametrize(
    ("shape", "tile", "says"),
    [
        ((2, 3, 4), (2, 128), r"shape \(2, 3, 4\); expected a matrix \[row, column\] for 2 x 128 tiles"),
        ((3,), (2, 128), r"shape \(3,\); expected a matrix"),
        ((), (1, 128), r"shape \(\); expected a matrix"),
        ((2, 3), (0, 128), "from 1 up"),
        ((2, 3), (1, 1, 128), "from 1 up"),
    ],
)
def test_codes_that_have_no_such_tiles_are_refused(shape, tile, says):
    codes = torch.ones(shape).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"BlockScaled got .*{says}"):
        BlockScaled(codes, torch.ones(shape), tile).dequantize()


def test_scales_in_training_are_taken_as_they_are():
    q = quantize_tiles(matrix(5, 300))
    assert torch.equal(q._replace(scales=q.scales.clone().requires_grad_()).dequantize(), q.dequantize())


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_a_tile_far_larger_than_the_matrix_is_one_scale_for_it(kernels, monkeypatch):
    monkeypatch.setenv("LAB_KERNELS", kernels)
    x = matrix(5, 7)
    huge, whole = quantize(x, (1 << 50, 1 << 50)), quantize_tensor(x)
    assert torch.equal(huge.codes.float(), whole.codes.float()) and torch.equal(huge.scales, whole.scales)
    assert torch.equal(huge.dequantize(), whole.dequantize())


def test_a_copied_format_is_published_like_the_original(monkeypatch):
    monkeypatch.setattr(BlockScaled, "format", property(lambda self: copy.deepcopy(E4M3)))
    assert quantize_blocks(matrix(3, 4)).to_published("w").keys() == {"w", "w_scale_inv"}
    assert fp8_matmul(quantize_blocks(matrix(3, 4)), quantize_blocks(matrix(3, 4)), "h800").shape == (3, 3)
