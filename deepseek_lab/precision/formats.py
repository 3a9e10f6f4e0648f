"""Number formats as data, and what becomes of a number that has to fit into one.

A code has a sign bit, exponent bits e and mantissa bits m (M of them). Its value is (-1)^s 2^(e - bias) (1 + m / 2^M),
and where e is 0 it is (-1)^s 2^(1 - bias) m / 2^M: a subnormal number. The largest exponent is kept for infinity and
NaN, except in E4M3, which has no infinity and keeps a single code for NaN, so that it reaches 448 and not 240.

Sources: FP8 Formats for Deep Learning (arXiv 2209.05433), table 1; IEEE 754 for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import kernels

if TYPE_CHECKING:
    from torch import Tensor

#: What to do with a number that rounds to more than the largest one.
OVERFLOWS = ("saturate", "nan", "inf")


@dataclass(frozen=True)
class FloatFormat:
    """One way of writing numbers in bits.

    infinities: whether the largest exponent is kept for infinity and NaN. overflow: what torch does with numbers that
    are too large: "saturate" (take the largest number), "inf" or "nan".
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    infinities: bool = True
    overflow: str = "inf"

    @property
    def bits(self) -> int:
        """Bits of one code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def nan_code(self) -> int:
        """The code for NaN without its sign: all ones."""
        return (1 << (self.bits - 1)) - 1

    @property
    def inf_code(self) -> int | None:
        """The code of infinity, None where the format has none."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits if self.infinities else None

    @property
    def max_code(self) -> int:
        """The code of the largest finite number."""
        return (self.inf_code if self.infinities else self.nan_code) - 1

    @property
    def max(self) -> float:
        """The largest finite number: 448 in E4M3."""
        return self.value(self.max_code)

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all its mantissa bits."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest number above zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next number."""
        return 2.0**-self.mantissa_bits

    def fields(self, code: int) -> tuple[int, int, int]:
        """Return sign, exponent and mantissa bits of a code, as three whole numbers."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name} has codes 0 to {(1 << self.bits) - 1}, got {code}")
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = code >> self.mantissa_bits & ((1 << self.exponent_bits) - 1)
        return code >> (self.bits - 1), exponent, mantissa

    def value(self, code: int) -> float:
        """Return the number that a code stands for."""
        sign, exponent, mantissa = self.fields(code)
        size = code & self.nan_code
        if size > self.max_code:
            return math.copysign(math.inf if size == self.inf_code else math.nan, -sign)
        whole = mantissa + (1 << self.mantissa_bits if exponent else 0)
        return (-1) ** sign * math.ldexp(whole, max(exponent, 1) - self.bias - self.mantissa_bits)

    def code(self, number: float, overflow: str | None = None) -> int:
        """Return the code of the nearest number; of two that are equally near, the one with an even mantissa."""
        sign = int(math.copysign(1, number) < 0) << (self.bits - 1)
        if math.isnan(number):
            return sign | self.nan_code
        exponent = max(math.frexp(number)[1] - 1, 1 - self.bias) if number else 1 - self.bias
        code = self.max_code + 1
        if math.isfinite(number):
            steps = round(math.ldexp(abs(number), self.mantissa_bits - exponent))  # round() goes to even
            code = ((exponent + self.bias - 1) << self.mantissa_bits) + steps  # 2^(M+1) steps: the next exponent
        return sign | (code if code <= self.max_code else self.overflow_code(overflow))

    def overflow_code(self, overflow: str | None = None) -> int:
        """Return the code, without sign, for a number that is too large. Raises ValueError for what cannot be."""
        overflow = self.overflow if overflow is None else overflow
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow={overflow!r} is unknown; choose one of {', '.join(OVERFLOWS)}")
        code = {"saturate": self.max_code, "nan": self.nan_code, "inf": self.inf_code}[overflow]
        if code is None:
            raise ValueError(f'{self.name} has no infinity, so overflow="inf" cannot be; choose "saturate" or "nan"')
        return code

    def values(self) -> list[float]:
        """Return the values of all codes in order. Raises ValueError above 16 bits: nobody wants that list."""
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2^{self.bits} codes; values() lists them up to 16 bits")
        return [self.value(code) for code in range(1 << self.bits)]


E4M3 = FloatFormat("E4M3", 4, 3, 7, infinities=False, overflow="saturate")
E5M2 = FloatFormat("E5M2", 5, 2, 15)
FP16 = FloatFormat("FP16", 5, 10, 15)
BF16 = FloatFormat("BF16", 8, 7, 127)
TF32 = FloatFormat("TF32", 8, 10, 127)  # 19 bits that lie in 32
FP32 = FloatFormat("FP32", 8, 23, 127)
FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2, FP16, BF16, TF32, FP32)}


def find_format(fmt: FloatFormat | str) -> FloatFormat:
    """Return a format given itself or its name. Raises ValueError for a name that does not exist."""
    if isinstance(fmt, FloatFormat):
        return fmt
    if not isinstance(fmt, str) or fmt not in FORMATS:
        raise ValueError(f"format {fmt!r} is unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS[fmt]


def encode(x: Tensor, fmt: FloatFormat | str, overflow: str | None = None) -> Tensor:
    """Return the codes of the nearest numbers in a format, ties to even; the shape is that of x.

    x: floating-point tensor, taken as float32. Codes are uint8 up to 8 bits, int32 up to 31, int64 for FP32.
    overflow: "saturate", "nan" or "inf", for infinities too; unless told, what torch does with this format. NaN keeps
    its sign. Gradients do not pass.
    Raises TypeError for what is no floating-point tensor, ValueError for unknown formats and impossible overflows.
    """
    fmt = find_format(fmt)
    if not _is_tensor(x) or not x.is_floating_point():
        raise TypeError(f"encode got {_kind(x)}; pass a tensor of floating-point numbers. One number: "
                        f"{fmt.name}.code(number)")  # fmt: skip
    return kernels.body_for(x).encode(x.detach().float(), fmt, fmt.overflow_code(overflow))


def decode(codes: Tensor, fmt: FloatFormat | str) -> Tensor:
    """Return the numbers that codes stand for, float32; the shape is that of codes.

    codes: tensor of whole numbers; where their type has the format's width, a negative one stands for its bits.
    Raises TypeError for other tensors and types too narrow, ValueError for codes that the format does not have.
    """
    fmt = find_format(fmt)
    if not _is_tensor(codes) or _kind(codes) == "torch.bool" or codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"decode got {_kind(codes)}; pass a tensor of whole numbers as encode returns, or a tensor of "
                        f"torch's FP8 types as .view(torch.uint8). One code: {fmt.name}.value(code)")  # fmt: skip
    width = codes.dtype.itemsize * 8
    if width < fmt.bits:
        raise TypeError(f"decode got {codes.dtype}; the codes of {fmt.name} have {fmt.bits} bits")
    if width > fmt.bits and codes.numel():
        for code in (codes if codes.dtype.is_signed else codes.long()).aminmax():  # torch compares few unsigned types
            fmt.fields(code.item())
    return kernels.body_for(codes).decode(codes, fmt)


def round_to(x: Tensor, fmt: FloatFormat | str, overflow: str | None = None) -> Tensor:
    """Return the nearest numbers that a format can say, float32. Arguments and errors are those of `encode`."""
    codes = encode(x, fmt, overflow)
    return kernels.body_for(codes).decode(codes, find_format(fmt))


def _is_tensor(x: object) -> bool:
    return hasattr(x, "is_floating_point")  # torch itself is not imported here: formats are words too


def _kind(x: object) -> str:
    return str(x.dtype) if hasattr(x, "dtype") else type(x).__name__
