"""Rotary positions: turn each pair of values by an angle that grows with the position.

Two vectors turned by their own positions have a dot product that depends only on the distance between them. Long
contexts stretch the slow angles and leave the fast ones alone: YaRN (DeepSeek) or Llama 3's rule.

Sources: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); the frequencies are those of the DeepSeek-V3 inference
code, whose ramp is linear in the index of the frequency, not in its wavelength as in the YaRN paper.
"""

import math

import torch
from torch import Tensor

from ..config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the angle per position of every pair: [rotary_dim / 2] float32, radians.

    theta_k = rope_theta ** (-2k / rotary_dim), stretched as `config.rope_scaling` says.
    """
    dim = config.rotary_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "yarn":
        stretched = _yarn_ramp(scaling, dim, config.rope_theta)
    else:
        stretched = _llama3_ramp(scaling, plain)
    return plain * (1 - stretched) + plain / scaling.factor * stretched


def _yarn_ramp(scaling: RopeScaling, dim: int, base: float) -> Tensor:
    """How far each frequency is stretched: 0 below the fast bound, 1 above the slow one, linear in between."""

    def index_of(rotations: float) -> float:
        return (
            dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))
        )

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
    high += 0.001 * (high == low)
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def _llama3_ramp(scaling: RopeScaling, plain: Tensor) -> Tensor:
    """How far each frequency is stretched, linear in rotations per original context (Llama 3.1 reference code)."""
    rotations = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return 1 - ((rotations - low) / (high - low)).clamp(0, 1)


def mscale(factor: float, m: float) -> float:
    """YaRN's attention temperature: 0.1 m ln(factor) + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def rotation_scale(config: ModelConfig) -> float:
    """What cosines and sines are multiplied by: 1 unless a YaRN config gives unequal or no mscale values."""
    s = config.rope_scaling
    if s is None or s.rope_type != "yarn":
        return 1.0
    if s.mscale and s.mscale_all_dim:
        return mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim)
    return mscale(s.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by: qk_head_dim ** -0.5, times mscale squared with YaRN (0.1352 in V3)."""
    scale = config.qk_head_dim**-0.5
    s = config.rope_scaling
    if config.uses_latent_attention and s is not None and s.mscale_all_dim:
        scale *= mscale(s.factor, s.mscale_all_dim) ** 2
    return scale


class RotaryTable:
    """The turn of every pair at every position asked for so far; grows when a later position comes.

    Calling it with positions [token] or [batch, token] returns exp(i * position * theta), [..., rotary_dim / 2]
    complex64.
    """

    def __init__(self, config: ModelConfig):
        self.frequencies = inverse_frequencies(config)
        self.scale = rotation_scale(config)
        self._turns = torch.empty(0, len(self.frequencies), dtype=torch.complex64, device="cpu")

    def __call__(self, positions: Tensor) -> Tensor:
        first, last = (int(p) for p in (positions.flatten()[0], positions.flatten()[-1]))
        consecutive = positions.dim() == 1 and (len(positions) == 1 or bool((positions.diff() == 1).all()))
        lowest, longest = (first, last) if consecutive else (int(p) for p in positions.aminmax())
        if lowest < 0:
            raise ValueError(f"positions {positions.tolist()} begin below 0; a text begins at position 0")
        if longest >= len(self._turns) or self._turns.device != positions.device:
            self._grow(max(longest + 1, 2 * len(self._turns), 256), positions.device)
        # Consecutive positions are the usual case: a view, no copy.
        return self._turns[first : last + 1] if consecutive else self._turns[positions]

    def _grow(self, length: int, device: torch.device) -> None:
        # The table outlives the call: one made while generating must still serve a training step.
        with torch.inference_mode(False), torch.no_grad():
            angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * self.frequencies.to(device)
            self._turns = torch.polar(torch.full_like(angles, self.scale), angles)


def turns_of_heads(turns: Tensor) -> Tensor:
    """Make turns of positions [token] or [batch, token] fit what has heads: [batch, head, token, .]."""
    return turns.unsqueeze(1) if turns.dim() == 3 else turns


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring pairs (x0, x1), (x2, x3), ...: DeepSeek's layout.

    x: [..., token, rotary_dim]; turns: complex64, [token, rotary_dim / 2] or what fits x (`turns_of_heads`). A pair is
    read as one complex number, so a turn is a multiplication. Returns the shape and dtype of x.
    """
    own = x.float().unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)  # a view may begin amid a pair
    pairs = torch.view_as_complex(own)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (x_k, x_{k + dim/2}): Llama's layout. Shapes as in `rotate_pairs`."""
    turned = torch.complex(*x.float().chunk(2, dim=-1)) * turns
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
