"""How long the H800 model takes beside torch's FP32 product and beside mmaemu, which gives the same bits: `make bench`.

One thread; operands already quantized, 1 x 128 tiles times 128 x 128 blocks. mmaemu knows no such scales: it promotes
every 128 as well, but multiplies by nothing.
"""

import os
import statistics
import subprocess
import sys

import mmaemu
import torch
from rounds import interleaved, report

from deepseek_lab.precision import BlockScaled, fp8_matmul, quantize_blocks, quantize_tiles

FP32, MMAEMU, FIRST_CALL = 8, 1 / 30, 0.4  # at most so many times the FP32 product, mmaemu, and seconds


def median_ratio(seconds, other):
    first = next(iter(seconds.values()))
    return statistics.median(a / b for a, b in zip(first, seconds[other], strict=True))


def measure(size, rounds):
    torch.manual_seed(0)
    x, w = torch.randn(size, size), torch.randn(size, size)
    a, b = quantize_tiles(x), quantize_blocks(w)
    runs = {
        "H800 model": lambda: fp8_matmul(a, b, "h800"),
        "torch FP32": lambda: x @ w.T,
        'accumulator="fp32"': lambda: fp8_matmul(a, b),
    }
    if size <= 512:
        ones = [x._replace(scales=torch.ones_like(x.scales)) for x in (a, b)]
        assert torch.equal(fp8_matmul(*ones, "h800"), by_mmaemu(a, b))
        runs["mmaemu"] = lambda: by_mmaemu(a, b)
    seconds = interleaved(runs, rounds)
    report(seconds, f" for {size}^3")
    return seconds


def by_mmaemu(a: BlockScaled, b: BlockScaled):
    return mmaemu.accumulate(a.codes, b.codes, use_fast_accum=False, profile="hopper", splitk=1)


def test_512_cubed(one_thread):
    seconds = measure(512, rounds=5)
    assert median_ratio(seconds, "torch FP32") <= FP32
    assert median_ratio(seconds, "mmaemu") <= MMAEMU


def test_1024_cubed(one_thread):
    assert median_ratio(measure(1024, rounds=7), "torch FP32") <= FP32


def test_the_first_call_of_a_new_process():
    """With Numba's cache filled, by the first of these processes. Processor time: waiting for others is not counted."""
    script = """
import time, torch
from deepseek_lab.kernels import numba_product
codes, one = torch.ones(2, 32, dtype=torch.uint8), torch.ones(2, 1)
start = time.process_time()
numba_product.product(codes, codes, one, one, 32)
print(time.process_time() - start)
"""
    seconds = [
        float(subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, check=True).stdout)
        for _ in range(4)
    ]
    print(f"\nfirst call, cache filled: {', '.join(f'{each:.2f}' for each in seconds[1:])} s")
    assert min(seconds[1:]) <= FIRST_CALL
