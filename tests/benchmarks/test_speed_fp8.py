"""How long casts and scaling to FP8 take on one thread, beside torch doing the same: `make bench`.

Everybody runs once per round, in turns; a ratio is the median of the ratios within a round. Ours is what a user calls,
new memory for the result included; torch's copy_ writes into memory that is there. Results are compared first.
"""

import os
import subprocess
import sys

import torch
from rounds import interleaved, report

from deepseek_lab.precision import E4M3, E5M2, decode, encode, quantize_blocks, quantize_tiles

ROUNDS = 21
VALUES = 1 << 24


def expression(x, rows, columns):
    """Codes and scales [tile row, 1, tile column, 1] as one writes it in torch; x / scale is a division."""
    tiles = x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    scales = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-4) / 448
    return (tiles / scales).clamp(-448, 448).to(torch.float8_e4m3fn).view(x.shape), scales


def fake_quantized(x):
    """The same and back to float32."""
    codes, scales = expression(x, 1, 128)
    return (codes.float().view(x.shape[0], 1, -1, 128) * scales).view(x.shape)


def moves(nbytes):
    """A copy that reads and writes so many bytes together."""
    source = torch.zeros(nbytes // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def test_casts(one_thread):
    x = torch.randn(VALUES)
    for fmt, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        theirs = torch.zeros(VALUES, dtype=dtype)
        assert torch.equal(encode(x, fmt), theirs.copy_(x).view(torch.uint8))
        runs = {f"{fmt.name} cast": lambda fmt=fmt: encode(x, fmt), "torch copy_": lambda out=theirs: out.copy_(x)}
        asked = {"torch copy_": (0.50, 0.38), "copy of the same bytes": (1.35, 1.0)} if fmt is E4M3 else None
        report(interleaved(runs | {"copy of the same bytes": moves(5 * VALUES)}, ROUNDS), " for 2^24 values", asked)


def test_decoding(one_thread):
    codes, back = encode(torch.randn(VALUES), E4M3), torch.zeros(VALUES)
    same = codes.view(torch.float8_e4m3fn)
    assert torch.equal(decode(codes, E4M3), back.copy_(same))
    runs = {"E4M3 decoded": lambda: decode(codes, E4M3), "torch copy_": lambda: back.copy_(same)}
    report(interleaved(runs | {"copy of the same bytes": moves(5 * VALUES)}, ROUNDS), " for 2^24 values")


def test_scaling(one_thread):
    x = torch.randn(4096, 4096)
    ways = {(1, 128): quantize_tiles, (128, 128): quantize_blocks, (128, 1): lambda x: quantize_tiles(x, axis=-2)}
    for (rows, columns), way in ways.items():
        codes, scales = expression(x, rows, columns)
        assert torch.equal(way(x).codes.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(way(x).scales.flatten(), scales.flatten())
        runs = {
            f"{rows} x {columns}, 4096 x 4096": lambda way=way: way(x),
            "torch expression": lambda rows=rows, columns=columns: expression(x, rows, columns),
            "copy of the same bytes": moves(5 * x.numel()),
        }
        asked = {(1, 128): (0.08, 0.05), (128, 128): (0.15, 0.08)}.get((rows, columns))
        report(interleaved(runs, 9), asked={"torch expression": asked} if asked else None)


def test_there_and_back(one_thread):
    x = torch.randn(1024, 1024)
    assert torch.equal(quantize_tiles(x).dequantize(), fake_quantized(x))
    runs = {"1 x 128 there and back, 1024 x 1024": lambda: quantize_tiles(x).dequantize()}
    report(interleaved(runs | {"torch expression": lambda: fake_quantized(x)}, 101))


def test_first_calls_in_a_fresh_process():
    """With kernels in Numba's cache, as after `python -m deepseek_lab.kernels`: seconds until the first result."""
    script = """if True:
        import time
        import torch
        start, x = time.perf_counter(), torch.ones(2, 128)
        import numba
        print(f"import numba {time.perf_counter() - start:.3f} s", end="")
        from deepseek_lab.precision import encode, quantize_tiles
        for name, call in (("first kernel", lambda: encode(x, "E4M3")), ("another", lambda: quantize_tiles(x))):
            start = time.perf_counter()
            call()
            print(f", {name} {time.perf_counter() - start:.3f} s", end="")
    """
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
        print(f"\n{run.stdout}", end="")
