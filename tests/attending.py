"""Absorbed attention in float64, and how far from it float32 may be."""

import torch

from deepseek_lab.kernels import reference
from deepseek_lab.precision import E4M3

MEMORIES = ("float32", "bfloat16", "float8")


def case(kind: str, batch: int, heads: int, slots: int, latent: int, rope: int, seed: int, spread: float = 1.0):
    """Return q, the memory as it is kept, and the memory in float32; larger `spread`, more different scores.

    Memories are views on longer buffers, as caches give them, with NaN behind their end.
    """
    generator = torch.Generator().manual_seed(seed)
    q = spread * torch.randn(batch, heads, latent + rope, generator=generator)
    joint = torch.randn(batch, slots + 3, latent + rope, generator=generator)
    joint[:, slots:] = torch.nan
    joint = joint[:, :slots]
    if kind == "float32":
        return q, (joint,), joint
    if kind == "bfloat16":
        return q, (joint.bfloat16(),), joint.bfloat16().float()
    codes = torch.randint(0, 256, (batch, slots + 3, latent), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 3
    codes[:, slots:] = 0x7F
    scales = (torch.rand(batch, slots, -(-latent // 128), generator=generator) + 0.01) / 200
    parts = codes[:, :slots], scales, joint[..., latent:].bfloat16()
    wide = reference.decode(parts[0], E4M3) * scales.repeat_interleave(128, dim=-1)[..., :latent]
    return q, parts, torch.cat([wide, parts[2].float()], dim=-1)


def attend(body, q, memory, lengths, scale: float, latent: int):
    """What a body answers, for either way of keeping a memory."""
    if len(memory) == 1:
        return body.decode_attention(q, *memory, lengths, scale, latent)
    return body.decode_attention_fp8(q, *memory, lengths, scale)


def exact(q, joint, lengths, scale: float, latent: int):
    """softmax(scale q . memory) memory, one row and head after the other, in float64."""
    out = torch.zeros(*q.shape[:2], latent, dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        memory = joint[b, :length].double()
        for h in range(q.shape[1] if length else 0):
            out[b, h] = (scale * memory @ q[b, h].double()).softmax(0) @ memory[:, :latent]
    return out


def bound(q, joint, lengths, scale: float, latent: int):
    """How far from `exact` an answer in float32 may be: [batch, head, latent] float64. u = 2^-24, n slots, w channels.

    A score is a sum of w products and, with the scale, off by (w + 2) u S at most in any order, S the largest sum of
    their sizes; taking the maximum off it (at most 2 S away) and, on a GPU, log2(e) add 4 u S: (w + 6) u S. A weight
    has this error in its numerator and, at most, in the sum: 2 (w + 6) u S relative to it. exp is within 4 u. A new
    maximum, at most n / 8 times, multiplies what has been summed by an exp: 5 u each, and the differences of maxima
    add up to no more than 2 S, which is in the two sums above. The sums of n terms are off by n u each, the division by
    2 u; weights below e^-87.3 of the largest may be dropped, n 2^-125. All of it is relative to the sum of weights
    times sizes of a channel, no more than the channel's largest size M: (2 (w + 6) S + 3 n + 12) u M.
    """
    out = torch.zeros(*q.shape[:2], latent, dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        if length:
            memory = joint[b, :length].double().abs()
            sizes = (abs(scale) * q[b].double().abs() @ memory.T).amax(1)
            terms = 2 * (q.shape[2] + 6) * sizes + 3 * length + 12
            out[b] = terms[:, None] * 2.0**-24 * memory[:, :latent].amax(0)
    return out


def worst(got, q, joint, lengths, scale: float, latent: int) -> float:
    """The largest error as a share of the bound; nothing else but a right answer is below 1."""
    expected = exact(q, joint, lengths, scale, latent)
    assert (got.shape, got.dtype) == (expected.shape, torch.float32)
    error, allowed = (got.double() - expected).abs(), bound(q, joint, lengths, scale, latent)
    assert not error.isnan().any() and (error[allowed == 0] == 0).all()
    return (error / allowed.clamp(min=1e-300)).max().item() if error.numel() else 0.0
