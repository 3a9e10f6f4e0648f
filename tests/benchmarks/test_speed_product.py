"""How long the H800 model takes beside torch's FP32 product and beside mmaemu, which gives the same bits: `make bench`.

One thread; operands already quantized, 1 x 128 tiles times 128 x 128 blocks. mmaemu knows no such scales: it promotes
every 128 as well, but multiplies by nothing.
"""

import os
import statistics
import subprocess
import sys

import mmaemu
import pytest
import torch
from rounds import TABLE, interleaved, report

from deepseek_lab.precision import BlockScaled, fp8_matmul, quantize_blocks, quantize_tiles

ASKED = {"torch FP32": (8, 4.5), "mmaemu": (1 / 30, 1 / 60)}


@pytest.mark.parametrize(("size", "rounds"), [(512, 5), (1024, 7)])
def test_a_product(one_thread, size, rounds):
    torch.manual_seed(0)
    x, w = torch.randn(size, size), torch.randn(size, size)
    a, b = quantize_tiles(x), quantize_blocks(w)
    runs = {
        "H800 product": lambda: fp8_matmul(a, b, "h800"),
        "torch FP32": lambda: x @ w.T,
        'accumulator="fp32"': lambda: fp8_matmul(a, b),
    }
    if size <= 512:
        ones = [x._replace(scales=torch.ones_like(x.scales)) for x in (a, b)]
        assert torch.equal(fp8_matmul(*ones, "h800"), by_mmaemu(a, b))
        runs["mmaemu"] = lambda: by_mmaemu(a, b)
    report(interleaved(runs, rounds), f" for {size}^3", ASKED if size == 512 else None)


def by_mmaemu(a: BlockScaled, b: BlockScaled):
    return mmaemu.accumulate(a.codes, b.codes, use_fast_accum=False, profile="hopper", splitk=1)


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
    TABLE.append(("first call in a new process", "seconds of the processor", statistics.median(seconds[1:]), 0.4, 0.4))
