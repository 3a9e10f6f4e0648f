"""Absorbed attention of one new token over a latent memory, in torch: what is right.

Every head asks the same memory and gets a latent back; what a token keeps is its latent and one rope key, shared by all
heads (attention/latent.py). Sources: DeepSeek-V2 report (arXiv 2405.04434), section 2.1; for reading the memory once,
with a running maximum and sum, as the other bodies do: arXiv 2205.14135, algorithm 1, and arXiv 1805.02867.
"""

import torch
from torch import Tensor

from .reference_product import value

BLOCK = 128  # channels of a latent that share a scale
MEMORY = (torch.float32, torch.bfloat16)
CODES = (torch.uint8, torch.float8_e4m3fn)


def decode_attention(q: Tensor, memory: Tensor, lengths: int | Tensor, scale: float, latent: int) -> Tensor:
    """softmax(scale q . memory) memory[..., :latent] -> [batch, head, latent] float32.

    q [batch, head, latent + rope] float32: absorbed queries. memory [batch, slot, latent + rope] float32 or bfloat16.
    lengths: how many slots, from the first, are written, for all rows or [batch]. What lies behind them is not read;
    where nothing is written the answer is zero. Raises ValueError for other shapes, TypeError for other dtypes.
    """
    lengths = check(q, memory, lengths, latent)
    written = torch.arange(memory.shape[1], device=q.device) < lengths.view(-1, 1)  # [batch, slot]
    memory = memory.float().where(written[..., None], 0)
    scores = scale * torch.bmm(q, memory.transpose(1, 2))  # [batch, head, slot]
    weights = scores.masked_fill(~written[:, None], -torch.inf).softmax(dim=-1)
    return torch.bmm(weights.where(written[:, None], 0), memory[..., :latent])


def decode_attention_fp8(
    q: Tensor, codes: Tensor, scales: Tensor, rope: Tensor, lengths: int | Tensor, scale: float
) -> Tensor:
    """The same with a memory in eight bits -> [batch, head, latent] float32.

    codes [batch, slot, latent]: E4M3, as uint8 or float8_e4m3fn. scales [batch, slot, ceil(latent / 128)] float32, one
    for each 128 codes. rope [batch, slot, rope] bfloat16 or float32.
    """
    lengths, latent = check_fp8(q, codes, scales, rope, lengths), codes.shape[-1]
    latents = value(codes).float() * scales.repeat_interleave(BLOCK, dim=-1)[..., :latent]
    return decode_attention(q, torch.cat([latents, rope.float()], dim=-1), lengths, scale, latent)


def check(q: Tensor, memory: Tensor, lengths: int | Tensor, latent: int) -> Tensor:
    """Return the lengths [batch] int64 beside q, or raise: compiled bodies check no index."""
    if q.dtype != torch.float32 or memory.dtype not in MEMORY:
        raise TypeError(f"decode_attention got q in {q.dtype} and a memory in {memory.dtype}; expected torch.float32 "
                        "and torch.float32 or torch.bfloat16")  # fmt: skip
    if q.dim() != 3 or memory.dim() != 3 or (len(q), q.shape[2]) != (len(memory), memory.shape[2]):
        raise ValueError(f"decode_attention got q {tuple(q.shape)} and memory {tuple(memory.shape)}; expected "
                         "[batch, head, latent + rope] and [batch, slot, latent + rope]")  # fmt: skip
    if not 1 <= latent <= q.shape[2]:
        raise ValueError(f"latent={latent} of {q.shape[2]} channels; latents come first, rope keys behind them")
    return check_lengths(q, lengths, memory.shape[1])


def check_fp8(q: Tensor, codes: Tensor, scales: Tensor, rope: Tensor, lengths: int | Tensor) -> Tensor:
    """The same for a memory in three parts."""
    dtypes = {"q": q.dtype, "codes": codes.dtype, "scales": scales.dtype, "rope": rope.dtype}
    expected = (torch.float32,), CODES, (torch.float32,), MEMORY
    if any(dtype not in allowed for dtype, allowed in zip(dtypes.values(), expected, strict=True)):
        raise TypeError(f"decode_attention_fp8 got {dtypes}; expected float32, uint8, float32, bfloat16")
    (batch, slots, latent), shapes = codes.shape, [tuple(x.shape) for x in (q, codes, scales, rope)]
    width = latent + rope.shape[-1]
    expected = (batch, q.shape[1], width), (batch, slots, -(-latent // BLOCK)), (batch, slots, width - latent)
    if latent < 1 or tuple(shapes[i] for i in (0, 2, 3)) != expected:
        raise ValueError(f"decode_attention_fp8 got q, codes, scales, rope of shapes {shapes}; expected "
                         f"[batch, head, latent + rope], [batch, slot, latent], [batch, slot, ceil(latent / {BLOCK})], "
                         "[batch, slot, rope]")  # fmt: skip
    return check_lengths(q, lengths, slots)


def check_lengths(q: Tensor, lengths: int | Tensor, slots: int) -> Tensor:
    """Return the lengths as [batch] int64; ValueError where there are not as many slots or rows."""
    if isinstance(lengths, int):
        least, most, found = lengths, lengths, torch.full((len(q),), lengths, device=q.device)
    elif lengths.shape != (len(q),) or lengths.is_floating_point():
        raise ValueError(f"lengths got {lengths.dtype} {tuple(lengths.shape)}; expected whole numbers [{len(q)}]")
    else:
        least, most = (int(x) for x in lengths.aminmax()) if len(q) else (0, 0)
        found = lengths.to(q.device, torch.int64).contiguous()
    if not 0 <= least <= most <= slots:
        raise ValueError(f"lengths from {least} to {most}; the memory has {slots} slots")
    return found
