"""What one code says and what rounding does to one number: the records behind the pictures of formats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import FloatFormat, find_format, round_to


@dataclass(frozen=True)
class Code:
    """One code of a format: its three fields, its value, and the values next to it (None where there is none).

    kind: "normal", "subnormal", "zero", "infinity" or "NaN".
    """

    format: FloatFormat
    code: int

    @property
    def fields(self) -> tuple[int, int, int]:
        """Sign, exponent and mantissa bits as whole numbers."""
        return self.format.fields(self.code)

    @property
    def value(self) -> float:
        return self.format.value(self.code)

    @property
    def size_code(self) -> int:
        """The code without its sign: how many steps from zero."""
        return self.code & self.format.nan_code

    @property
    def kind(self) -> str:
        if self.size_code > self.format.max_code:
            return "infinity" if self.size_code == self.format.inf_code else "NaN"
        return "zero" if self.size_code == 0 else "normal" if self.fields[1] else "subnormal"

    @property
    def neighbours(self) -> tuple[float | None, float | None]:
        """The next value below and the next above; infinity counts as one."""
        if self.kind == "NaN":
            return None, None
        if self.kind == "zero":
            return -self.format.smallest_subnormal, self.format.smallest_subnormal
        beyond = self.size_code + 1 > (self.format.inf_code or self.format.max_code)
        nearer, farther = self.format.value(self.code - 1), None if beyond else self.format.value(self.code + 1)
        return (farther, nearer) if self.fields[0] else (nearer, farther)

    @property
    def step(self) -> float | None:
        """The distance to the next value away from zero; None for infinity and NaN."""
        if self.kind in ("infinity", "NaN"):
            return None
        return 2.0 ** (max(self.fields[1], 1) - self.format.bias - self.format.mantissa_bits)


@dataclass(frozen=True)
class Rounded:
    """A number and the code that it becomes. error: value less number; relative: error by number, None at 0.

    tie: two values were equally near. Errors of what becomes, or was, infinity or NaN are infinite or NaN.
    """

    number: float
    code: Code
    error: float
    relative: float | None
    tie: bool


def round_number(number: float, fmt: FloatFormat | str) -> Rounded:
    """Return what a number becomes in a format, by the format's own overflow. Raises ValueError: unknown formats."""
    fmt = find_format(fmt)
    code = Code(fmt, fmt.code(number))
    error = 0.0 if number == code.value else code.value - number
    relative = error / abs(number) if number and math.isfinite(number) else None
    within = abs(number) < fmt.max + Code(fmt, fmt.max_code).step  # beyond, nothing is on the other side
    return Rounded(number, code, error, relative, within and _steps(number, fmt) % 1 == 0.5)


def _steps(number: float, fmt: FloatFormat) -> float:
    """How many of the steps that lie around it a number is away from zero; a tie ends in one half."""
    exponent = max(math.frexp(number)[1] - 1, 1 - fmt.bias)
    return math.ldexp(abs(number), fmt.mantissa_bits - exponent)


def worst_errors(
    fmt: FloatFormat | str, low: int, high: int, bins: int = 8, samples: int = 64
) -> tuple[Tensor, Tensor]:
    """Return the largest relative rounding error between 2^low and 2^high: (where, error), float64 [octaves x bins].

    Each power of two is cut into `bins` equal ratios, each of which is rounded at samples + 1 numbers. Too large
    numbers saturate, and those that become 0 are wrong by 1.
    """
    octaves = torch.arange(low, high, dtype=torch.float64)
    edges = (octaves[:, None] + torch.arange(bins, dtype=torch.float64) / bins).flatten()
    powers = edges[:, None] + torch.linspace(0, 1 / bins, samples + 1, dtype=torch.float64)
    numbers = powers.exp2().float()
    errors = ((round_to(numbers, fmt, "saturate").double() - numbers.double()) / numbers.double()).abs()
    return (edges + 0.5 / bins).exp2(), errors.amax(dim=1)
