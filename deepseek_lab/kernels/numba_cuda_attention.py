"""Absorbed attention of one new token on an NVIDIA GPU: a block reads a tile of the memory once for several heads.

As in numba_attention.py a running maximum and sum are kept, so that one pass is enough. A kernel is built for each
width and way of keeping the memory, so that these are constants in it.
"""

from functools import cache

import numpy as np
import torch
from numba import types
from torch import Tensor

from . import reference_attention as reference
from .cuda_device import SIMULATED, THREADS, bring, cuda, inlined, instruction, number_of, start
from .numba_cuda_product import NAN, value_of

HEADS, TILE = 4, 8  # heads of a block, slots of a tile
PAIRS = HEADS * TILE
PARTS = THREADS // PAIRS  # threads that share a score
SHARED = 48 * 1024  # bytes that a block may use without asking for more
ZERO, LOG2_E = np.float32(0), np.float32(1.44269504)

if SIMULATED:

    def exp2(x):
        return np.exp2(np.float32(x))
else:
    exp2 = instruction("ex2.approx.f32 $0, $1;", types.float32, types.float32)  # within 2^-22 of itself (PTX ISA)


def reader(kind: str, latent: int):
    """Return the device function (latents, scales, ropes, row, slot, channel) -> float32."""
    if kind == "float32":
        return inlined(lambda memory, scales, ropes, b, slot, c: memory[b, slot, c])
    if kind == "bfloat16":
        return inlined(lambda memory, scales, ropes, b, slot, c: number_of(np.int32(memory[b, slot, c]) << 16))

    def read(codes, scales, ropes, b, slot, channel):
        if channel >= latent:
            return number_of(np.int32(ropes[b, slot, channel - latent]) << 16)
        code = np.int32(codes[b, slot, channel])
        value = value_of(code) if code & 0x7F != 0x7F else number_of(NAN)
        return value * scales[b, slot, channel // reference.BLOCK]

    return inlined(read)


@cache
def attention_kernel(kind: str, latent: int, width: int):
    """Kernel (q, latents, scales, ropes, lengths, scale, out) on blocks (head / HEADS, batch) of THREADS threads."""
    read, all_queries, all_mixed, all_slots = reader(kind, latent), HEADS * width, HEADS * latent, TILE * width

    @cuda.jit
    def attention(q, latents, scales, ropes, lengths, scale, out):
        queries = cuda.shared.array(all_queries, types.float32)  # one a line: the simulator tells them by their lines
        mixed = cuda.shared.array(all_mixed, types.float32)
        tile = cuda.shared.array(all_slots, types.float32)
        parts = cuda.shared.array(THREADS, types.float32)
        weights = cuda.shared.array(PAIRS, types.float32)
        largest = cuda.shared.array(HEADS, types.float32)
        total = cuda.shared.array(HEADS, types.float32)
        shrink = cuda.shared.array(HEADS, types.float32)
        thread, b, first_head = cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.x * HEADS
        part, slot, head = thread % PARTS, thread // PARTS % TILE, thread // PARTS // TILE  # of this thread's score
        heads, length = out.shape[1], lengths[b]
        for i in range(thread, all_queries, THREADS):
            queries[i] = q[b, min(first_head + i // width, heads - 1), i % width] * (scale * LOG2_E)
        for i in range(thread, all_mixed, THREADS):
            mixed[i] = ZERO
        if thread < HEADS:
            largest[thread], total[thread] = np.float32(-np.inf), np.float32(0)
        for first in range(0, length, TILE):
            count = min(TILE, length - first)
            for i in range(thread, count * width, THREADS):
                tile[i] = read(latents, scales, ropes, b, first + i // width, i % width)
            cuda.syncthreads()
            score = np.float32(0)
            if slot < count:
                for channel in range(part, width, PARTS):
                    score += queries[head * width + channel] * tile[slot * width + channel]
            parts[thread] = score
            cuda.syncthreads()
            if thread < HEADS:
                renew(thread, count, parts, weights, largest, total, shrink)
            cuda.syncthreads()
            for i in range(thread, all_mixed, THREADS):
                sum_up(i, i // latent, i % latent, count, weights, tile, width, shrink, mixed)
            cuda.syncthreads()
        for i in range(thread, all_mixed, THREADS):
            if first_head + i // latent < heads:
                out[b, first_head + i // latent, i % latent] = mixed[i] / total[i // latent] if length > 0 else ZERO

    return attention


@inlined
def renew(head, count, parts, weights, largest, total, shrink):
    """One thread per head: its scores become weights, its maximum and its sum are brought up to date."""
    best = largest[head]
    for slot in range(count):
        pair = head * TILE + slot
        score = np.float32(0)
        for part in range(PARTS):
            score += parts[pair * PARTS + part]
        weights[pair] = score
        best = max(best, score)
    shrink[head] = exp2(largest[head] - best)
    largest[head] = best
    summed = total[head] * shrink[head]
    for slot in range(count):
        weight = exp2(weights[head * TILE + slot] - best)
        weights[head * TILE + slot] = weight
        summed += weight
    total[head] = summed


@inlined
def sum_up(i, head, channel, count, weights, tile, width, shrink, mixed):
    """mixed[i] += weights of the head times a channel of the tile, after what has been summed is made smaller."""
    value = mixed[i] * shrink[head]
    for slot in range(count):
        value += weights[head * TILE + slot] * tile[slot * width + channel]
    mixed[i] = value


def decode_attention(q: Tensor, memory: Tensor, lengths: int | Tensor, scale: float, latent: int) -> Tensor:
    """Absorbed attention of one token; see reference_attention.py, also for what follows."""
    lengths = reference.check(q, memory, lengths, latent)
    kind = "float32" if memory.dtype == torch.float32 else "bfloat16"
    return run(kind, q, lengths, scale, latent, memory, memory, memory)


def decode_attention_fp8(
    q: Tensor, codes: Tensor, scales: Tensor, rope: Tensor, lengths: int | Tensor, scale: float
) -> Tensor:
    """The same with a memory in eight bits."""
    lengths = reference.check_fp8(q, codes, scales, rope, lengths)
    return run("float8", q, lengths, scale, codes.shape[-1], codes, scales, rope.to(torch.bfloat16))


def run(kind: str, q: Tensor, lengths: Tensor, scale: float, latent: int, *memory: Tensor) -> Tensor:
    """Start the kernel of this width; narrow numbers are handed over as whole ones, contiguous memories uncopied."""
    width = q.shape[2]
    if 4 * ((HEADS + TILE) * width + HEADS * latent + 2 * THREADS) > SHARED:
        raise ValueError(f"decode_attention got {latent} + {width - latent} channels; a block of this kernel has room "
                         f"for some 700 (V3 has 576): set LAB_KERNELS=reference")  # fmt: skip
    whole = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    there = [x.view(whole.get(x.dtype, x.dtype)) for x in bring(q, *memory, lengths)]
    out = torch.empty(*q.shape[:2], latent, device=there[0].device)
    blocks = -(-q.shape[1] // HEADS), len(q)
    start(attention_kernel(kind, latent, width), blocks, THREADS, *there, np.float32(scale), out)
    return out.to(q.device)
