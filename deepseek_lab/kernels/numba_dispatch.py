"""Rows to their experts and back on a CPU: the bits of reference_dispatch.py, each row read and written once.

Compiled functions check no index: the functions at the end check first. Matrices are flat, and an unsigned index
cannot mean "from the end", which would cost a test. BF16 rows are whole numbers here, widened where they are read.
"""

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from . import reference_dispatch as reference

LANES = reference.LANES
ZERO = np.float32(0)

kernel = njit(error_model="numpy", cache=True, nogil=True, no_cfunc_wrapper=True)


def widen(x):
    """A stored number as float32: BF16 in a uint16, or float32 itself."""


def narrow(x, like):
    """A float32 as it is stored in the array `like`: BF16 to the nearest, ties to even, or float32 itself."""


def from_bf16(x):
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


def to_bf16(x, like):
    bits = np.float32(x).view(np.uint32)
    up = np.uint32(np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    code = np.uint32(np.uint32(bits + up) >> np.uint32(16))
    return np.uint16(0x7FC0 if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else code)


@overload(widen)
def widen_this(x):
    return from_bf16 if x == types.uint16 else lambda x: x


@overload(narrow)
def narrow_this(x, like):
    return to_bf16 if like.dtype == types.uint16 else lambda x, like: x


@kernel
def copy_rows(x, order, choices, hidden, out):
    """Row i of out [slot * hidden] = row order[i] // choices of x [token * hidden]."""
    for i in range(len(order)):
        source, target = np.uint64(order[i] // choices * hidden), np.uint64(i * hidden)
        for j in range(hidden):
            out[target + np.uint64(j)] = x[source + np.uint64(j)]


@kernel
def sum_rows(answers, back, weights, hidden, out):
    """Row t of out [token * hidden] float32 = sum of weights[t, c] times row back[t * choices + c] of answers."""
    tokens, choices = weights.shape
    for t in range(tokens):
        target = np.uint64(t * hidden)
        for c in range(choices):
            source, weight = np.uint64(back[t * choices + c] * hidden), weights[t, c]
            for j in range(hidden):
                at = np.uint64(target + np.uint64(j))
                out[at] = (out[at] if c > 0 else ZERO) + weight * widen(answers[source + np.uint64(j)])


@kernel
def spread_gradient(gradient, answers, order, weights, hidden, of_answers, of_weights):
    """Each slot's weight times its token's gradient, and the dot product of that gradient with the slot's answer."""
    choices = weights.shape[1]
    sums = np.empty(LANES, np.float32)
    for i in range(len(order)):
        token = order[i] // choices
        choice = order[i] - token * choices
        weight, source, target = weights[token, choice], np.uint64(token * hidden), np.uint64(i * hidden)
        for j in range(hidden):
            of_answers[target + np.uint64(j)] = narrow(weight * widen(gradient[source + np.uint64(j)]), of_answers)
        sums[:] = ZERO
        for first in range(0, hidden, LANES):
            for lane in range(min(LANES, hidden - first)):
                j = np.uint64(first + lane)
                sums[np.uint64(lane)] += widen(gradient[source + j]) * widen(answers[target + j])
        half = LANES // 2
        while half > 0:
            for lane in range(half):
                sums[lane] += sums[lane + half]
            half //= 2
        of_weights[token, choice] = sums[0]


def permute(x: Tensor, order: Tensor, choices: int) -> Tensor:
    """Copy tokens to their slots; see reference_dispatch.py, also for what follows."""
    reference.check_rows(x)
    reference.check_order(x, order, choices)
    out = empty(len(order), x)
    copy_rows(flat(x), array(order), choices, x.shape[1], flat(out))
    return out


def unpermute(answers: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of each token's answers."""
    reference.check_rows(answers, weights=weights)
    reference.check_back(answers, back, weights)
    out = torch.empty(len(weights), answers.shape[1])
    sum_rows(flat(answers), array(back), array(weights), answers.shape[1], flat(out))
    return out.to(answers.dtype)


def unpermute_gradients(gradient: Tensor, answers: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What `unpermute` passes back for answers and for weights."""
    reference.check_rows(gradient, answers, weights=weights)
    reference.check_gradient(gradient, answers, order, weights)
    of_answers, of_weights = empty(len(answers), answers), torch.zeros(weights.shape)
    spread_gradient(flat(gradient), flat(answers), array(order), array(weights), answers.shape[1],
                    flat(of_answers), array(of_weights))  # fmt: skip
    return of_answers, of_weights


def empty(count: int, like: Tensor) -> Tensor:
    """Rows to be written. NumPy asks for large arrays in large pages: small ones, new in every step, cost more to touch
    for the first time than to write."""
    stored = np.float32 if like.dtype == torch.float32 else np.uint16
    return torch.from_numpy(np.empty((count, like.shape[1]), stored)).view(like.dtype)


def array(x: Tensor) -> np.ndarray:
    """The values of a tensor, copied only where they do not lie in one piece."""
    return x.detach().contiguous().numpy()


def flat(x: Tensor) -> np.ndarray:
    """The values of a matrix in one row, BF16 as whole numbers."""
    x = x.detach().contiguous().view(-1)
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
