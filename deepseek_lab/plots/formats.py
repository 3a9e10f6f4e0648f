"""Pictures of number formats: their bits, their values, their rounding errors, and which codes a tensor uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deepseek_lab.precision import FORMATS, FloatFormat, find_format

from .sheet import WIDTH, Box, Line, Shape, Sheet, Words, draw
from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

#: Ground and ink of each field of a code; dark and light, so that they stay apart in greyscale.
FIELDS = {
    "sign": ("#FFFFFF", INK),
    "exponent": (PALETTE["activations"], INK),
    "mantissa": (PALETTE["weights"], "white"),
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BIT = 10.6  # the width of a bit in `formats_bar`
_LEFT, _RIGHT = 16, WIDTH - 16  # of the axes of values, in pixels
_LOOKS = {  # of each format's line: colour, dashes, and on which side of it the name stands
    "E5M2": (PALETTE["gradients"], "-", "bottom"),
    "E4M3": (PALETTE["weights"], "-", "top"),
    "BF16": (PALETTE["cache"], "-", "bottom"),
    "FP16": (PALETTE["moments"], "-", "top"),
}


def power(exponent: int | str) -> str:
    """Return a power of two as text: 2⁻⁹, or 2³⁻⁷ of "3-7"."""
    return "2" + str(exponent).translate(_SUPERSCRIPTS)


def short(number: float) -> str:
    """Return a number in at most five digits: 57,344, 0.015625, 3.4e38."""
    text = f"{number:,.5g}" if 1e-4 <= abs(number) < 1e5 or not number else f"{number:.2g}".replace("e+", "e")
    return text.replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def formats_bar(formats: Sequence[str | FloatFormat] = tuple(FORMATS), ax: Axes | None = None) -> Axes:
    """Draw each format as a row of bits (sign, exponent, mantissa) with its largest number and its step at 1."""
    shapes: list[Shape] = [
        Words(14, 20, "bits of a number", bold=True),
        Words(414, 20, "largest", bold=True),
        Words(492, 20, "step at 1", bold=True),
    ]
    y = 32.0
    for fmt in map(find_format, formats):
        x = 66.0
        shapes.append(Words(58, y + 19, fmt.name, "end", bold=True))
        for name, bits in zip(FIELDS, (1, fmt.exponent_bits, fmt.mantissa_bits), strict=True):
            ground, ink = FIELDS[name]
            shapes.append(Box(x, y, _BIT * bits, 28, ground, INK, line=0.7, kind=name, name=fmt.name))
            for edge in (x + _BIT * i for i in range(1, bits)):
                shapes += [Line(((edge, top), (edge, top + 4)), ink, 0.7) for top in (y, y + 24)]
            label = f"{name} {bits}" if _BIT * bits > 80 else str(bits)
            shapes.append(Words(x + _BIT * bits / 2, y + 19, label, "middle", size=12, colour=ink, kind="width"))
            x += _BIT * bits
        shapes.append(Words(414, y + 19, short(fmt.max)))
        shapes.append(Words(492, y + 19, power(-fmt.mantissa_bits)))
        y += 36
    x = 66.0
    for name, (ground, _) in FIELDS.items():
        shapes += [Box(x, y + 4, 13, 13, ground, INK, line=0.7), Words(x + 19, y + 15, name)]
        x += 100
    return draw(Sheet(y + 26, "Bits of number formats: sign, exponent, mantissa.", tuple(shapes)), ax)


def format_values(fmt: str | FloatFormat = "E4M3", ax: Axes | None = None) -> Axes:
    """Draw all values of an 8-bit format three times: all of them, those about zero, and by their powers of two.

    The first two axes are linear: values crowd around zero, and the subnormal ones (marked) keep one distance. The
    third is logarithmic, positive values only: every power of two holds equally many. Raises ValueError above 8 bits.
    """
    fmt = find_format(fmt)
    if fmt.bits > 8:
        raise ValueError(f"format_values draws every value, and {fmt.name} has 2^{fmt.bits} codes; choose E4M3 or E5M2")
    finite = sorted({v for v in fmt.values() if math.isfinite(v)})
    near = 4 * fmt.smallest_normal
    shapes: list[Shape] = [Words(_LEFT, 22, f"{fmt.name}: {len(finite)} different numbers", bold=True)]
    shapes += _linear(finite, fmt, fmt.max, 58, f"all, from {short(-fmt.max)} to {short(fmt.max)}")
    title = f"about zero: subnormal numbers (below {power(1 - fmt.bias)}, short strokes) keep one distance"
    shapes += _linear([v for v in finite if abs(v) <= near], fmt, near, 138, title)
    count = 1 << fmt.mantissa_bits
    shapes.append(Words(_LEFT, 208, f"above zero, on a logarithmic axis: {count} in every power of two", size=12))
    shapes += value_line(fmt, 218)
    return draw(Sheet(276, f"All {len(finite)} values of {fmt.name}.", tuple(shapes)), ax)


def _linear(values: Sequence[float], fmt: FloatFormat, end: float, y: float, title: str) -> list[Shape]:
    """Return one linear axis from -end to end with a stroke for each value."""
    out: list[Shape] = [Words(_LEFT, y - 10, title, size=12), Line(((_LEFT, y + 26), (_RIGHT, y + 26)))]
    middle, half = WIDTH / 2, (_RIGHT - _LEFT) / 2
    for value in values:
        x, top = middle + half * value / end, y if abs(value) >= fmt.smallest_normal else y + 12
        out.append(Line(((x, top), (x, y + 26)), PALETTE["weights"], kind="value", name=str(value)))
    for tick, anchor in ((-end, "start"), (-end / 2, "middle"), (0, "middle"), (end / 2, "middle"), (end, "end")):
        text = (
            short(tick)
            if end > 0.01 or not tick
            else "\N{MINUS SIGN}" * (tick < 0) + power(round(math.log2(abs(tick))))
        )
        out.append(Words(middle + half * tick / end, y + 41, text, anchor, size=12))
    return out


def value_line(fmt: FloatFormat, y: float, strokes: bool = True) -> list[Shape]:
    """Return the axis of a format's positive values, logarithmic from the smallest normal number on.

    Below it lies the subnormal range: linear, as wide as a power of two. strokes: one for each value (8 bits).
    """
    out: list[Shape] = [Line(((_LEFT, y + 26), (_RIGHT, y + 26)))]
    left, right = place_on_line(fmt, 0.0), place_on_line(fmt, fmt.smallest_normal)
    out.append(Box(left, y, max(right - left, 2), 26, "#DDDDDD", kind="subnormals"))
    if strokes:
        for code in range(fmt.max_code + 1):
            x, top = place_on_line(fmt, fmt.value(code)), y if code >> fmt.mantissa_bits else y + 10
            out.append(Line(((x, top), (x, y + 26)), PALETTE["weights"], kind="value", name=str(code)))
    first, last = 1 - fmt.bias, math.frexp(fmt.max)[1] - 1
    every = next(n for n in (2, 4, 8, 16, 32, 64) if n * (right - left) >= 34)
    out.append(Words(left, y + 41, "0", "middle", size=12))
    for exponent in range(-(-first // every) * every, last + 1, every):
        x = place_on_line(fmt, 2.0**exponent)
        if x - left < 12:
            continue
        out += [
            Line(((x, y + 30 if strokes else y + 8), (x, y + 26))),
            Words(x, y + 42, power(exponent), "middle", size=12),
        ]
    return out


def place_on_line(fmt: FloatFormat, size: float) -> float:
    """Return the pixel of a size (no sign) on the axis of `value_line`; its ends for what lies outside."""
    octaves = math.frexp(fmt.max)[1] + fmt.bias  # the subnormal range counts as one
    at = size / fmt.smallest_normal
    return _LEFT + (_RIGHT - _LEFT) * min(at if at < 1 else 1 + math.log2(at), octaves) / octaves


def format_errors(
    formats: Sequence[str] = tuple(_LOOKS), low: int = -28, high: int = 20, ax: Axes | None = None
) -> Axes:
    """Draw the largest relative rounding error near each number from 2^low to 2^high, both axes logarithmic.

    A line per format: level within its normal range (one tooth per power of two), rising to 100 % to the left, where
    numbers are subnormal (from the dot on), and to the right, where they saturate (from the square on).
    """
    from deepseek_lab.precision.rounding import worst_errors

    from .training import _axes

    ax = _axes(ax)
    for fmt in map(find_format, formats):
        where, errors = worst_errors(fmt, low, high, bins=min(8, 1 << fmt.mantissa_bits))
        colour, dash, side = _LOOKS.get(fmt.name, (GREY, "--", "top"))
        ax.plot(where, errors, color=colour, linestyle=dash, linewidth=1.6, label=fmt.name)
        unit, gap = fmt.epsilon / 2, 1.25 if side == "bottom" else 0.4
        ax.text(2.0**1, unit * gap, fmt.name, fontweight="bold", va=side, ha="center")
        for number, marker in ((fmt.smallest_normal, "o"), (fmt.max, "s")):
            if 2.0**low < number < 2.0**high:
                ax.plot([number], [unit], marker, color=colour, markersize=6, zorder=3)
    ax.set(yscale="log", xlabel="number", ylabel="relative error, at most", ylim=(1e-4, 1.6))
    ax.set_xscale("log", base=2)
    ax.set_title("● smallest normal number   ■ largest number", fontweight="normal")
    ax.set_yticks([1e-4, 1e-3, 1e-2, 0.1, 1], ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    ax.grid(axis="y")
    return ax


def code_histogram(codes: Mapping[str, Tensor], fmt: str | FloatFormat = "E4M3", ax: Axes | None = None) -> Axes:
    """Draw which share of its values each tensor gives to each code of an 8-bit format, signs aside.

    codes: up to three by name, uint8 or the float8 codes of a `BlockScaled`. Below the axis stands what codes mean.
    """
    import torch

    from .training import _axes

    fmt, ax = find_format(fmt), _axes(ax)
    if fmt.bits > 8 or not 1 <= len(codes) <= 3:
        raise ValueError(f"code_histogram got {fmt.name} and {len(codes)} tensors; give 1 to 3 in E4M3 or E5M2")
    looks = [(PALETTE["gradients"], 0.55, "//"), (PALETTE["weights"], 0.9, ""), (PALETTE["cache"], 0.7, "..")]
    for row, (name, tensor) in enumerate(codes.items()):
        colour, alpha, hatch = looks[row]
        sizes = tensor.view(torch.uint8).flatten() & fmt.nan_code
        shares = 100 * torch.bincount(sizes.long(), minlength=fmt.nan_code + 1) / max(sizes.numel(), 1)
        where = dict(step="mid", color=colour, alpha=alpha, hatch=hatch, linewidth=0)
        ax.fill_between(range(len(shares)), shares, label=name, **where)
        words = f"{name}: {(shares > 0).sum()} of {fmt.max_code + 1} codes, {shares[0]:.2g} % are 0"
        ax.text(0.02, 0.97 - 0.1 * row, words, transform=ax.transAxes, va="top", color=colour, fontweight="bold")
    ticks = [fmt.code(2.0**e) for e in range(1 - fmt.bias, math.frexp(fmt.max)[1], 2 if fmt.bias < 10 else 4)]
    ax.set_xticks([0, *ticks], ["0", *(power(math.frexp(fmt.value(code))[1] - 1) for code in ticks)])
    ax.set(xlabel="value of the code", ylabel="share of values (%)", xlim=(-1, fmt.max_code + 1))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.3)
    return ax
