"""Rows to their experts and back on an NVIDIA GPU: a block for each row written, its threads side by side along it.

BF16 rows are whole numbers here. A warp adds a weight's gradient: 32 partial sums, as the reference defines them.
"""

from functools import cache

import numpy as np
import torch
from numba import types
from torch import Tensor

from . import reference_dispatch as reference
from .cuda_device import THREADS, bits_of, bring, cuda, inlined, number_of, start, times

LANES = reference.LANES
INFINITY, NAN = 0x7F800000, 0x7FC0  # float32, as bits; BF16


@inlined
def from_bf16(x):
    return number_of(np.int32(x) << 16)


@inlined
def to_bf16(x):
    """The nearest BF16, ties to even."""
    bits = bits_of(x)
    code = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # a sum of 64 bits: NaN does not run over
    return code if bits & 0x7FFFFFFF <= INFINITY else NAN


def casts(kind: str):
    """Return the device functions (stored -> float32, float32 -> stored) for "float32" or "bfloat16"."""
    return (inlined(lambda x: x),) * 2 if kind == "float32" else (from_bf16, to_bf16)


@cache
def permute_kernel():
    """Kernel (x, order, choices, out) on a block for each slot."""

    @cuda.jit
    def permute(x, order, choices, out):
        slot = cuda.blockIdx.x
        token = order[slot] // choices
        for j in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
            out[slot, j] = x[token, j]

    return permute


@cache
def unpermute_kernel(kind: str):
    """Kernel (answers, back, weights, out) on a block for each token."""
    widen, narrow = casts(kind)

    @cuda.jit
    def unpermute(answers, back, weights, out):
        token, choices = cuda.blockIdx.x, weights.shape[1]
        for j in range(cuda.threadIdx.x, out.shape[1], cuda.blockDim.x):
            total = np.float32(0)
            for choice in range(choices):
                total += times(weights[token, choice], widen(answers[back[token * choices + choice], j]))
            out[token, j] = narrow(total)

    return unpermute


@cache
def gradients_kernel(kind: str):
    """Kernel (gradient, answers, order, weights, of_answers, of_weights) on a block of LANES threads for each slot."""
    widen, narrow = casts(kind)

    @cuda.jit
    def gradients(gradient, answers, order, weights, of_answers, of_weights):
        sums = cuda.shared.array(LANES, types.float32)
        slot, lane, choices = cuda.blockIdx.x, cuda.threadIdx.x, weights.shape[1]
        token = order[slot] // choices
        choice = order[slot] - token * choices
        weight, total = weights[token, choice], np.float32(0)
        for j in range(lane, answers.shape[1], LANES):
            passed = widen(gradient[token, j])
            of_answers[slot, j] = narrow(times(weight, passed))
            total += times(passed, widen(answers[slot, j]))
        sums[lane] = total
        cuda.syncthreads()
        half = LANES // 2
        while half > 0:
            if lane < half:
                sums[lane] += sums[lane + half]
            cuda.syncthreads()
            half //= 2
        if lane == 0:
            of_weights[token, choice] = sums[0]

    return gradients


def permute(x: Tensor, order: Tensor, choices: int) -> Tensor:
    """Copy tokens to their slots; see reference_dispatch.py, also for what follows."""
    reference.check_rows(x)
    reference.check_order(x, order, choices)
    rows, there = bring(whole(x), order)
    out = torch.empty(len(order), x.shape[1], dtype=rows.dtype, device=rows.device)
    start(permute_kernel(), len(order), THREADS, rows, there, choices, out)
    return out.view(x.dtype).to(x.device)


def unpermute(answers: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of each token's answers."""
    reference.check_rows(answers, weights=weights)
    reference.check_back(answers, back, weights)
    rows, *there = bring(whole(answers), back, weights)
    out = torch.empty(len(weights), answers.shape[1], dtype=rows.dtype, device=rows.device)
    start(unpermute_kernel(kind_of(answers)), len(weights), THREADS, rows, *there, out)
    return out.view(answers.dtype).to(answers.device)


def unpermute_gradients(gradient: Tensor, answers: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What `unpermute` passes back for answers and for weights."""
    reference.check_rows(gradient, answers, weights=weights)
    reference.check_gradient(gradient, answers, order, weights)
    there = bring(whole(gradient), whole(answers), order, weights)
    of_answers, of_weights = torch.empty_like(there[1]), torch.zeros_like(there[3])
    start(gradients_kernel(kind_of(answers)), len(order), LANES, *there, of_answers, of_weights)
    return of_answers.view(answers.dtype).to(answers.device), of_weights.to(weights.device)


def kind_of(rows: Tensor) -> str:
    return "float32" if rows.dtype == torch.float32 else "bfloat16"


def whole(rows: Tensor) -> Tensor:
    """BF16 as whole numbers, which the compiler takes."""
    rows = rows.detach().contiguous()
    return rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
