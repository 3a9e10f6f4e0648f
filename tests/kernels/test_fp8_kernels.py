"""Casts and scaling in Numba are the reference's, bit for bit: every format, shape of tile and kind of scale."""

import os
import subprocess
import sys

import pytest
import torch

from deepseek_lab.kernels import numba_cpu, reference
from deepseek_lab.precision import E4M3, E5M2, FORMATS, FloatFormat, quantize_blocks, quantize_tiles

E5M6 = FloatFormat("E5M6", 5, 6, 15)  # the V3 report keeps inputs of attention's last layer in it
OTHERS = [E5M6, FloatFormat("E4M3FNUZ", 4, 3, 8, infinities=False), FloatFormat("E4M3 with infinity", 4, 3, 7),
          FloatFormat("E3M2", 3, 2, 3, infinities=False), FloatFormat("E8M7 shifted", 8, 7, 100),
          FloatFormat("E8M0 with sign", 8, 0, 127)]  # fmt: skip
ALL = [*FORMATS.values(), *OTHERS]
# Lower halves of a float32 that decide about rounding: nothing, the last bit, halves of 8 to 16 bits and next to them.
LOWER = sorted({0, 1, 0xFFFF, *(min((1 << k) + d, 0xFFFF) for k in range(8, 17) for d in (-1, 0, 1))})
SHAPES = [(1, 1), (128, 128), (200, 300), (129, 1), (300, 1), (1, 129), (5, 1000), (3, 2100), (0, 7), (7, 0)]
TILES = [(1, 128), (128, 1), (128, 128), (3, 5), (7, 1), (1, 1), (1, 3000), (300, 2)]


def matrix(shape, seed):
    """Numbers of very different sizes, so that a wrong scale shows; every seventh row is zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** (4 * torch.randn(shape, generator=generator)).clamp(-40, 37)
    x[::7] = 0
    return x


def assert_same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.is_floating_point():
        got, expected = got.view(torch.int32), expected.view(torch.int32)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
def test_codes_are_the_references(fmt):
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    x = (upper[:, None] | torch.tensor(LOWER, dtype=torch.int32)).view(torch.float32)
    for overflow in ("saturate", "nan", *(["inf"] if fmt.infinities else [])):
        code = fmt.overflow_code(overflow)
        assert_same(numba_cpu.encode(x, fmt, code), reference.encode(x, fmt, code))


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
def test_numbers_are_the_references(fmt):
    codes = torch.arange(1 << fmt.bits) if fmt.bits < 20 else torch.randint(1 << fmt.bits, (1 << 19,))
    assert_same(numba_cpu.decode(codes, fmt), reference.decode(codes, fmt))


@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_matrices_are_the_references(shape, tile, fmt, power_of_two):
    x = matrix(shape, seed=sum(tile))
    before = x.clone()
    got, expected = (body.quantize(x, fmt, tile, power_of_two) for body in (numba_cpu, reference))
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs)
    assert_same(numba_cpu.dequantize(*got, fmt, tile), reference.dequantize(*got, fmt, tile))
    assert_same(x, before)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spoil_what_they_spoil_in_the_reference(bad, tile, fmt, power_of_two):
    """All NaN get one code: infinity by infinity is -NaN on one processor, +NaN on another."""
    x = matrix((140, 300), seed=3)
    x[130, 257] = bad
    x[131, 250:260] *= -bad
    got, expected = (body.quantize(x, fmt, tile, power_of_two) for body in (numba_cpu, reference))
    assert_same(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)
    lost = numba_cpu.decode(got[0], fmt).isnan()
    assert lost.any() and (got[0][lost] == 0x7F).all()


def test_the_default_dtype_of_torch_changes_nothing():
    codes, scales = torch.randint(0, 127, (3, 64), dtype=torch.uint8), torch.ones(3, 2)
    expected = reference.product(codes, codes, scales, scales, 32)
    torch.set_default_dtype(torch.float64)
    try:
        for body in (reference, numba_cpu):
            assert_same(body.product(codes, codes, scales, scales, 32), expected)
            quantized = body.quantize(expected, E4M3, (1, 128), False)
            assert quantized[1].dtype == body.dequantize(*quantized, E4M3, (1, 128)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_zeros_keep_their_sign_and_the_smallest_numbers_become_zeros():
    x = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 1e-38, -1.0]])
    codes, _ = numba_cpu.quantize(x, E4M3, (1, 6), False)
    assert codes.tolist() == [[0x00, 0x80, 0x00, 0x80, 0x00, 0xFE]]


def test_the_largest_float32_still_has_a_scale():
    x = torch.full((2, 130), torch.finfo(torch.float32).max)
    for power_of_two in (False, True):
        codes, scales = numba_cpu.quantize(x, E4M3, (1, 128), power_of_two)
        assert scales.isfinite().all() and (numba_cpu.decode(codes, E4M3) <= 448).all()


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_the_environment_chooses_the_body(kernels, monkeypatch):
    monkeypatch.setenv("LAB_KERNELS", kernels)
    module, calls = {"reference": reference, "numba": numba_cpu}[kernels], []
    for name in ("quantize", "dequantize"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, run=run, name=name: (calls.append(name), run(*args))[1])
    quantize_tiles(torch.ones(2, 3)).dequantize()
    assert calls == ["quantize", "dequantize"]


def test_the_same_whatever_body(monkeypatch):
    x = matrix((300, 200), seed=5)
    found = []
    for kernels in ("reference", "numba"):
        monkeypatch.setenv("LAB_KERNELS", kernels)
        found.append([quantize_tiles(x), quantize_tiles(x, axis=-2, scale="ue8m0"), quantize_blocks(x, fmt="E5M2")])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
        assert torch.equal(ours.scales, theirs.scales)


def test_no_index_leaves_its_array(tmp_path):
    script = """if True:
        import torch
        from deepseek_lab.precision import E4M3, FP16, decode, encode, quantize
        for shape in [(1, 1), (5, 300), (130, 3), (0, 4)]:
            x = torch.randn(shape)
            for tile in [(1, 128), (128, 1), (128, 128), (3, 5)]:
                quantize(x, tile).dequantize()
            [decode(encode(x, fmt), fmt) for fmt in (E4M3, FP16)]
        print("inside")
    """
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "LAB_KERNELS": "numba"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.stdout == "inside\n", run.stderr


def test_every_kernel_is_compiled_beforehand(tmp_path):
    """After `python -m deepseek_lab.kernels` a process compiles nothing: the cache has all it asks for."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "LAB_KERNELS": "numba"}
    subprocess.run([sys.executable, "-m", "deepseek_lab.kernels"], env=environment, check=True, capture_output=True)
    script = """if True:
        import torch
        from deepseek_lab.kernels import numba_cpu
        from deepseek_lab.precision import *
        x = torch.randn(4, 256)
        round_to(x, E4M3), round_to(x, BF16)
        quantize_tiles(x).dequantize(), quantize_tiles(x, axis=-2).dequantize(), quantize_blocks(x, scale="ue8m0")
        fp8_matmul(quantize_tiles(x), quantize_blocks(x), accumulator="h800")
        kernels = [numba_cpu.encode_all, numba_cpu.decode_all, numba_cpu.quantize_tiles, numba_cpu.quantize_columns,
                   numba_cpu.dequantize_all]
        print(sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels))
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.stdout == "0\n", run.stderr
