"""Absorbed attention of one new token on a CPU: all heads read one latent memory, in a single pass over it.

The memory is read a tile of slots at a time, widened to float32 where it is stored in fewer bits, and forgotten; with
each tile the running maximum and the sums are brought up to date, so no row of scores is ever kept (flash attention).
Heads stand side by side in groups of eight: scores and mixtures are then both products of small matrices.

Compiled functions check no index (with NUMBA_BOUNDSCHECK=1 all but the small products do): the functions at the end
check shapes first. What they call is in this file too, because Numba's cache does not notice a change in another one.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from . import reference_attention as reference

GROUP = 8  # heads, and slots, that a small product handles together
LANES = 16  # channels of a mixture that stand in one vector
TILE = 64  # slots at a time
BLOCK = reference.BLOCK
ZERO, ONE, NAN, LOWEST = (np.float32(number) for number in (0, 1, np.nan, -87.3))
MAGIC, LOG2_E = np.float32(1.5 * 2**23), np.float32(1.44269504)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has few bits: n times it is exact
POWERS = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                                       1.6666665459e-1, 5.0000001201e-1))  # fmt: skip
REBIAS = np.float32(2.0**120)
NONE = np.empty(0, np.float32)
WORD = ir.IntType(32)

helper = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
kernel = njit(error_model="numpy", cache=True, nogil=True, no_cfunc_wrapper=True)


def small_product(lanes: int):
    """Return the intrinsic out[i, j] += sum over k < count of a[i, k] * b[k, j] for i < 8 and j < lanes.

    The matrices lie in flat arrays; each is told by its start and its steps: from one i to the next and from one k to
    the next. The sums stay in eight vector registers; products are fused with sums where the processor can.
    """

    @intrinsic
    def add_product(typing_context, a, a_start, a_row, a_step, b, b_start, b_step, count, out, out_start, out_row):
        n, vector = types.intp, ir.VectorType(ir.FloatType(), lanes)
        kinds = a, n, n, n, b, n, n, n, out, n, n

        def codegen(context, builder, signature, args):
            arrays = (cgutils.create_struct_proxy(kinds[i])(context, builder, args[i]) for i in (0, 4, 8))
            a, b, out = (builder.bitcast(array.data, ir.FloatType().as_pointer()) for array in arrays)
            (a_start, a_row, a_step), (b_start, b_step, count), (out_start, out_row) = args[1:4], args[5:8], args[9:]
            kind = ir.FunctionType(vector, [vector] * 3)
            fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{lanes}f32")

            def place(array, start, index, step, kind=vector):
                pointer = builder.gep(array, [builder.add(start, builder.mul(index, step))])
                return builder.bitcast(pointer, kind.as_pointer())

            rows = [ir.Constant(count.type, i) for i in range(GROUP)]
            outs = [place(out, out_start, i, out_row) for i in rows]
            sums = [cgutils.alloca_once_value(builder, builder.load(each, align=4)) for each in outs]
            with cgutils.for_range(builder, count) as loop:
                right = builder.load(place(b, b_start, loop.index, b_step), align=4)
                start = builder.add(a_start, builder.mul(loop.index, a_step))
                for i, total in zip(rows, sums, strict=True):
                    left = builder.load(place(a, start, i, a_row, ir.FloatType()))
                    left = builder.insert_element(ir.Constant(vector, ir.Undefined), left, ir.Constant(WORD, 0))
                    left = builder.shuffle_vector(left, left, ir.Constant(ir.VectorType(WORD, lanes), [0] * lanes))
                    builder.store(builder.call(fused, [left, right, builder.load(total)]), total)
            for each, total in zip(outs, sums, strict=True):
                builder.store(builder.load(total), each, align=4)
            return context.get_dummy_value()

        return types.void(*kinds), codegen

    return add_product


add_scores = small_product(GROUP)
add_mixture = small_product(LANES)


@helper
def exp(x):
    """e^x for x <= 0, float32, within 2^-23 of itself: 2^n e^r with |r| < 0.35. 0 below -87.3, NaN for NaN.

    Without a branch, so that the compiler can do sixteen at a time. Coefficients: Cephes library, expf.c.
    """
    whole = x * LOG2_E + MAGIC  # beside the magic number a sum keeps whole steps only
    n = whole - MAGIC
    r = (x - n * LN_2_HIGH) - n * LN_2_LOW
    p = ((((POWERS[0] * r + POWERS[1]) * r + POWERS[2]) * r + POWERS[3]) * r + POWERS[4]) * r + POWERS[5]
    p = (p * r * r + r) + ONE
    power = np.int32(np.int32(np.float32(whole).view(np.int32) + np.int32(127)) << np.int32(23))  # the bits of 2^n
    return ZERO if x < LOWEST else p * power.view(np.float32)


def widen(x):
    """A stored number as float32: E4M3 in a uint8, BF16 in a uint16, or float32 itself."""


@overload(widen)
def widen_this(x):
    return {types.uint8: from_e4m3, types.uint16: from_bf16}.get(x, lambda x: x)


def from_bf16(x):
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


def from_e4m3(x):
    """Move the bits to where a float32 has them, subnormal numbers included; its exponent is 120 higher."""
    size = np.uint32(x & np.uint32(127))
    bits = np.uint32(np.uint32(size << np.uint32(20)) | np.uint32(np.uint32(x & np.uint32(128)) << np.uint32(24)))
    return NAN if size == np.uint32(127) else bits.view(np.float32) * REBIAS


@helper
def read(memory, start, count, scales, scale_at, tile, at):
    """tile[at : at + count] = memory[start : start + count], each 128 times their scale where there are scales."""
    for first in range(0, count, BLOCK):
        factor = scales[scale_at + first // BLOCK] if scales.size > 0 else ONE
        for j in range(first, min(first + BLOCK, count)):
            tile[np.uint64(at + j)] = widen(memory[np.uint64(start + j)]) * factor


@helper
def renew(scores, work, size, largest, total, mixed):
    """Bring largest [8], total [8] and mixed [8, .] up to date with scores [slot * 8], which become their weights.

    Eight heads side by side: element i + 8 is the next slot, so plain loops along i are eight sums or maxima at once.
    """
    work[:GROUP] = largest
    for i in range(size):
        work[i + GROUP] = scores[i] if scores[i] > work[i] else work[i]
    for head in range(GROUP):
        work[head] = work[size + head]
        if work[head] > largest[head]:
            shrink = exp(largest[head] - work[head])
            largest[head] = work[head]
            total[head] *= shrink
            for j in range(mixed.shape[1]):
                mixed[head, j] *= shrink
    for i in range(size - GROUP):
        work[i + GROUP] = work[i]
    for i in range(size):
        scores[i] = exp(scores[i] - work[i])
    work[:GROUP] = total
    for i in range(size):
        work[i + GROUP] = work[i] + scores[i]
    total[:] = work[size : size + GROUP]


@helper
def attend_tile(queries, rows, start, stride, count, scores, work, largest, total, mixed):
    """Take `count` slots in, which lie in the flat array rows from `start` on, `stride` apart."""
    (groups, width, _), wide = queries.shape, mixed.shape[2]
    for group in range(groups):
        scores[:] = 0
        for slot in range(0, count, GROUP):
            add_scores(rows, start + slot * stride, stride, 1, queries, group * width * GROUP, GROUP, width,
                       scores, slot * GROUP, GROUP)  # fmt: skip
        renew(scores, work, count * GROUP, largest[group], total[group], mixed[group])
        for j in range(0, wide, LANES):
            add_mixture(scores, 0, 1, GROUP, rows, start + j, stride, count, mixed, group * GROUP * wide + j, wide)


@helper
def by_group(q, scale):
    """Queries of one token [head, width], times scale -> [group, width, 8]; heads that fill up a group are zero."""
    heads, width = q.shape
    out = np.zeros((-(-heads // GROUP), width, GROUP), np.float32)
    for head in range(heads):
        for j in range(width):
            out[head // GROUP, j, head % GROUP] = q[head, j] * scale
    return out


@kernel
def attend(q, lengths, scale, latents, latent_steps, scales, scale_steps, ropes, rope_steps, out):
    """q [batch, head, latent + rope] and a memory -> out [batch, head, latent].

    latents, scales (none: no elements) and ropes are flat, with steps from one row and from one slot to the next. If
    latents are float32, their rope keys have to lie behind them.
    """
    (heads, latent), width = out.shape[1:], q.shape[2]
    wide, stride = -(-latent // LANES) * LANES, -(-width // LANES) * LANES  # filled up to whole vectors
    tile, none = np.zeros(TILE * stride, np.float32), np.empty(0, np.float32)
    scores, work = np.empty(TILE * GROUP, np.float32), np.empty((TILE + 1) * GROUP, np.float32)
    for b in range(len(q)):
        queries = by_group(q[b], scale)
        largest, total = np.full(queries.shape[::2], -np.inf, np.float32), np.zeros(queries.shape[::2], np.float32)
        mixed = np.zeros((len(queries), GROUP, wide), np.float32)
        for first in range(0, lengths[b], TILE):
            count = min(TILE, lengths[b] - first)
            start = b * latent_steps[0] + first * latent_steps[1]
            if latents.itemsize == 4 and count == TILE and wide <= width:
                attend_tile(queries, latents, start, latent_steps[1], count, scores, work, largest, total, mixed)
                continue
            for slot in range(count):
                row, at = first + slot, slot * stride
                scale_at = b * scale_steps[0] + row * scale_steps[1]
                read(latents, start + slot * latent_steps[1], latent, scales, scale_at, tile, at)
                read(ropes, b * rope_steps[0] + row * rope_steps[1], width - latent, none, 0, tile, at + latent)
            attend_tile(queries, tile, 0, stride, count, scores, work, largest, total, mixed)
        for head in range(heads):
            share = ONE / total[head // GROUP, head % GROUP] if lengths[b] > 0 else ZERO
            for j in range(latent):
                out[b, head, j] = mixed[head // GROUP, head % GROUP, j] * share


def decode_attention(q: Tensor, memory: Tensor, lengths: int | Tensor, scale: float, latent: int) -> Tensor:
    """Absorbed attention of one token; see reference_attention.py, also for what follows."""
    lengths = reference.check(q, memory, lengths, latent)
    rows, steps = flat(memory)
    return start(q, lengths, scale, latent, rows, steps, NONE, (0, 0), rows[latent:], steps)


def decode_attention_fp8(
    q: Tensor, codes: Tensor, scales: Tensor, rope: Tensor, lengths: int | Tensor, scale: float
) -> Tensor:
    """The same with a memory in eight bits, of which a tile at a time becomes float32."""
    lengths = reference.check_fp8(q, codes, scales, rope, lengths)
    return start(q, lengths, scale, codes.shape[-1], *flat(codes), *flat(scales), *flat(rope))


def attend_memory(q: np.ndarray, memory: np.ndarray, lengths: np.ndarray, scale: float, latent: int) -> np.ndarray:
    """The same for contiguous float32 arrays, whose shapes are not looked at; a memory of one text serves all of q."""
    rows, steps = memory.reshape(-1), (memory.shape[1] * memory.shape[2] if len(memory) > 1 else 0, memory.shape[2])
    out = np.empty((*q.shape[:2], latent), np.float32)
    attend(q, lengths, np.float32(scale), rows, steps, NONE, (0, 0), rows[latent:], steps, out)
    return out


def start(q: Tensor, lengths: Tensor, scale: float, latent: int, *memory) -> Tensor:
    """Call the kernel with a new array for its answer."""
    out = np.empty((*q.shape[:2], latent), np.float32)
    attend(q.detach().contiguous().numpy(), lengths.numpy(), np.float32(scale), *memory, out)
    return torch.from_numpy(out)


def flat(x: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the values of x [batch, slot, .] as they lie in memory, and the steps to the next row and slot."""
    x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    stored = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}.get(x.dtype, torch.uint8)
    return x.as_strided((size,), (1,)).view(stored).numpy(), x.stride()[:2]
