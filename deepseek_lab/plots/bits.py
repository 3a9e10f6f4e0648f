"""The bits of one number: its fields, its value, what rounding did to it, and where it lies among all values."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from deepseek_lab.precision import Code, FloatFormat, Rounded, find_format, round_number

from .formats import FIELDS, place_on_line, power, short, value_line
from .sheet import WIDTH, Box, Line, Shape, Sheet, Words, draw
from .style import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 352
_LEFT, _RIGHT = 14, WIDTH - 14
_BITS_Y, _FORMULA_Y, _KIND_Y, _ERROR_Y, _ZOOM_Y, _LINE_Y = 34, 106, 150, 172, 222, 298


def bit_explorer(
    fmt: str | FloatFormat = "E4M3", code: int | None = None, number: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw one code of a format with its fields, formula, neighbours and rounding; the static twin of the widget.

    code: the bits, as a whole number; or number: what is rounded to the format, 0.1 where neither is given. The Axes,
    which it returns, count in pixels of a picture 580 wide. Raises ValueError for both and for codes out of range.
    """
    if code is not None and number is not None:
        raise ValueError(f"bit_explorer got code={code} and number={number}; give one or the other")
    if code is not None:
        return draw(bits_sheet(Code(find_format(fmt), code)), ax)
    return draw(bits_sheet(round_number(0.1 if number is None else float(number), fmt)), ax)


def bits_sheet(shown: Code | Rounded) -> Sheet:
    """Plan the picture of a code, or of a number and the code that it was rounded to."""
    rounded = shown if isinstance(shown, Rounded) else None
    code = rounded.code if rounded else shown
    shapes = [
        Words(_LEFT, 22, headline(code, rounded), bold=True, kind="headline"),
        *_bits(code),
        *(Words(_LEFT, _FORMULA_Y + 20 * i, text, kind="formula") for i, text in enumerate(formula(code))),
        Words(_LEFT, _KIND_Y, kind_words(code), size=12, kind="kind"),
        Words(_LEFT, _ERROR_Y, error_words(code, rounded), kind="error"),
        *_neighbours(code, rounded),
        *_among_all(code),
    ]
    return Sheet(HEIGHT, summary(code, rounded), tuple(shapes))


def exact(number: float) -> str:
    """Return a number with all its digits: 0.1015625."""
    text = f"{int(number):,}" if abs(number) < 1e15 and number == int(number) else repr(number)
    text = "-0" if number == 0 and math.copysign(1, number) < 0 else text
    return _spelled(text.replace("nan", "NaN").replace("inf", "infinity"))


def _spelled(text: str) -> str:
    """Return a number as Python writes it with a proper minus and a short exponent."""
    return re.sub(r"e\+?(-?)0*", r"e\1", text).replace("-", "\N{MINUS SIGN}")


def headline(code: Code, rounded: Rounded | None) -> str:
    name = f"{code.format.name}, code 0x{code.code:0{-(-code.format.bits // 4)}X}: "
    if rounded is None or rounded.number == code.value or math.isnan(rounded.number):
        return name + exact(code.value)
    return f"{name}{exact(rounded.number)} becomes {exact(code.value)}"


def summary(code: Code, rounded: Rounded | None) -> str:
    """Return the picture in one line."""
    fields = ", ".join(f"{name} {bits}" for name, bits in zip(FIELDS, code.fields, strict=True))
    return f"{headline(code, rounded)}; {fields}; {error_words(code, rounded)}"


def formula(code: Code) -> tuple[str, str]:
    """Return the formula with the code's numbers filled in, and what it comes to."""
    fmt, (sign, exponent, mantissa) = code.format, code.fields
    if code.kind in ("infinity", "NaN"):
        return "no formula: this code is set aside", f"= {exact(code.value)}"
    minus, fraction = f"(\N{MINUS SIGN}1){'⁰¹'[sign]}", f"{mantissa:,} / {power(fmt.mantissa_bits)}"
    turned = power(f"{max(exponent, 1)}-{fmt.bias}")
    inside = f"(1 + {fraction})" if exponent else f"({fraction})"
    part = (exponent > 0) + mantissa / (1 << fmt.mantissa_bits)
    scale = power(max(exponent, 1) - fmt.bias)
    sign_text = "\N{MINUS SIGN}" * sign
    return f"{minus} × {turned} × {inside}", f"= {sign_text}{scale} × {part:.9g} = {exact(code.value)}"


def kind_words(code: Code) -> str:
    """Return in words which rule the code follows."""
    fmt = code.format
    if code.kind == "NaN" and not fmt.infinities:
        return f"not a number: all bits but the sign are 1, and {fmt.name} keeps nothing else for it"
    return {
        "normal": "normal: exponent bits are not all 0, so a 1 stands before the fraction",
        "subnormal": "subnormal: exponent bits are all 0, so no 1 before the fraction; they count as 1",
        "zero": "zero: all bits but the sign are 0",
        "infinity": "infinity: exponent bits are all 1, mantissa bits all 0",
        "NaN": "not a number: exponent bits are all 1, mantissa bits not all 0",
    }[code.kind]


def error_words(code: Code, rounded: Rounded | None) -> str:
    """Return what rounding did to the number."""
    if code.kind == "NaN":
        return "no rounding error: NaN stays NaN"
    if rounded is None or rounded.number == code.value:
        return f"no rounding error: {code.format.name} has this value"
    number, largest = rounded.number, code.format.max
    if abs(number) > largest and math.isinf(code.value):
        end = largest + Code(code.format, code.format.max_code).step / 2  # a tie, which goes on to the even code
        return f"too large: from {exact(end)} on a number rounds to infinity"
    share = f"{_spelled(f'{100 * abs(rounded.relative):.3g}')} % of the number" if rounded.relative is not None else ""
    if math.isinf(number) or abs(number) >= largest + code.step:
        return f"too large: {code.format.name} ends at {exact(largest)}, so it saturates" + f": {share} is lost" * bool(
            share
        )
    tie = "a tie: the even mantissa wins" if rounded.tie else "no tie"
    return f"rounding error {short(rounded.error)}, {share}; {tie}"


def _bits(code: Code) -> list[Shape]:
    """A box for each bit, its field's name and number below."""
    fmt, out, x = code.format, [], float(_LEFT)
    width = min(34.0, (_RIGHT - _LEFT) / fmt.bits)
    digits = iter(f"{code.code:0{fmt.bits}b}")
    lengths = (1, fmt.exponent_bits, fmt.mantissa_bits)
    for (name, (ground, ink)), length, number in zip(FIELDS.items(), lengths, code.fields, strict=True):
        middle, anchor = (x, "start") if name == "sign" else (x + width * length / 2, "middle")
        out.append(Words(middle, _BITS_Y + 45, f"{name} {number:,}", anchor, size=12, kind="field"))
        for _ in range(length):
            out.append(Box(x, _BITS_Y, width, 28, ground, INK, kind="bit", name=name))
            out.append(Words(x + width / 2, _BITS_Y + 19, next(digits), "middle", mono=True, size=14, colour=ink))
            x += width
    return out


def _neighbours(code: Code, rounded: Rounded | None) -> list[Shape]:
    """The value between the ones next to it on a linear axis, a dash at each middle, and the number where it lies."""
    y, step = _ZOOM_Y, code.step
    if step is None:
        return [Words(_LEFT, y, f"no neighbours: {exact(code.value)} is on no axis", size=12)]
    low, high = (v if v is not None and math.isfinite(v) else None for v in code.neighbours)
    ends = (code.value - step if low is None else low, code.value + step if high is None else high)

    def x(value: float) -> float:
        return 90 + (WIDTH - 180) * (value - ends[0]) / (ends[1] - ends[0])

    out: list[Shape] = [Line(((_LEFT, y), (_RIGHT, y)))]
    for value, bold in ((low, False), (code.value, True), (high, False)):
        if value is not None:
            place = x(value)
            out.append(Line(((place, y - 9), (place, y + 4)), PALETTE["weights"], 3 if bold else 1.6, kind="value"))
            out.append(Words(place, y + 19, _spelled(f"{value:,.9g}"), "middle", bold, size=12))
    for end, value, other in ((ends[0], low, code.neighbours[0]), (ends[1], high, code.neighbours[1])):
        if value is None:
            out.append(Words(x(end), y + 19, "none" if other is None else exact(other), "middle", size=12))
            continue
        middle = (x(end) + x(code.value)) / 2
        out.append(Line(((middle, y - 4), (middle, y + 4)), dashes=(2, 2), kind="middle"))
        out.append(Words(middle, y + 36, f"step {short(abs(value - code.value))}", "middle", size=12, kind="step"))
    number = code.value if rounded is None or math.isnan(rounded.number) else rounded.number
    place = x(number) if ends[0] <= number <= ends[1] else _RIGHT - 6 if number > 0 else _LEFT + 6
    anchor = "start" if place < 90 else "end" if place > WIDTH - 90 else "middle"
    return [*out, _pointer(place, y - 11), Words(place, y - 24, exact(number), anchor, size=12)]


def _pointer(x: float, y: float) -> Line:
    """A triangle that stands on its tip at (x, y)."""
    return Line(((x, y), (x - 5, y - 9), (x + 5, y - 9)), fill=INK, kind="pointer")


def _among_all(code: Code) -> list[Shape]:
    """The axis of all values, the sign aside, and a triangle at this one."""
    fmt, count = code.format, 1 << code.format.mantissa_bits
    if fmt.bits <= 8:
        where = f"step {code.size_code} of {fmt.max_code} from zero" if code.step else "not on it"
        title = f"among all values of {fmt.name}, signs aside: {where}"
    else:
        title = f"among all powers of two, signs aside: each holds {count:,} values of {fmt.name}"
    out = [Words(_LEFT, _LINE_Y - 12, title, size=12), *value_line(fmt, _LINE_Y + 4, strokes=fmt.bits <= 8)]
    return [*out, _pointer(place_on_line(fmt, abs(code.value)), _LINE_Y + 2)] if code.step else out
