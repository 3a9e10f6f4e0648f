"""Pictures of formats say the format's own numbers: bits, values, neighbours, errors, codes."""

import itertools
import math
import random

import pytest
import torch

from deepseek_lab import plots
from deepseek_lab.plots.bits import HEIGHT, bits_sheet, exact
from deepseek_lab.plots.formats import FIELDS, place_on_line, power, short
from deepseek_lab.plots.sheet import WIDTH, Words
from deepseek_lab.precision import E4M3, E5M2, FORMATS, FP32, Code, quantize_tensor, quantize_tiles, round_number

RANDOM = random.Random(5)
SOME = {name: sorted({0, 1, f.max_code, f.nan_code, f.max_code + 1, 1 << (f.bits - 1), (1 << f.bits) - 1,
                      1 << f.mantissa_bits, *(RANDOM.randrange(1 << f.bits) for _ in range(20))})
        for name, f in FORMATS.items()}  # fmt: skip


def said(sheet, kind):
    return [shape.text for shape in sheet.shapes if shape.kind == kind and isinstance(shape, Words)]


def named(sheet, kind):
    return [shape for shape in sheet.shapes if shape.kind == kind]


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_stands_in_its_field(name):
    fmt = FORMATS[name]
    for number in SOME[name]:
        sheet = bits_sheet(Code(fmt, number))
        digits = "".join(s.text for s in sheet.shapes if isinstance(s, Words) and s.mono)
        assert digits == f"{number:0{fmt.bits}b}"
        fields = [box.name for box in named(sheet, "bit")]
        assert fields == ["sign"] + ["exponent"] * fmt.exponent_bits + ["mantissa"] * fmt.mantissa_bits
        assert said(sheet, "field") == [f"{f} {b:,}" for f, b in zip(FIELDS, fmt.fields(number), strict=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_the_formula_comes_to_the_value(name):
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹\N{MINUS SIGN}", "-0123456789-")
    for number in SOME[name]:
        code = Code(FORMATS[name], number)
        asked, result = said(bits_sheet(code), "formula")
        assert result.endswith(f"= {exact(code.value)}")
        if code.kind in ("infinity", "NaN"):
            assert asked == "no formula: this code is set aside"
            continue
        sign, scale, part = asked.split(" × ", 2)
        turned, bias = scale[1:].translate(digits).rsplit("-", 1)
        one, _, fraction = part.strip("()").rpartition(" + ")
        top, bottom = fraction.split(" / ")
        mantissa = int(one or 0) + int(top.replace(",", "")) / 2 ** int(bottom[1:].translate(digits))
        value = (-1) ** int(sign[-1].translate(digits)) * 2.0 ** (int(turned) - int(bias)) * mantissa
        assert value == code.value


def test_numbers_are_written_with_all_their_digits():
    assert [exact(v) for v in (448.0, -0.0, 0.1015625, 2.0**-133, math.inf, -math.inf)] == [
        "448", "−0", "0.1015625", "9.183549615799121e−41", "infinity", "−infinity"]  # fmt: skip
    assert exact(math.nan) == "NaN" and exact(FP32.max) == "3.4028234663852886e38"
    assert (short(57344.0), short(2.0**-6), short(FP32.max), short(-1e-7)) == ("57,344", "0.015625", "3.4e38", "−1e−7")
    assert (power(-9), power("3-7")) == ("2⁻⁹", "2³⁻⁷")


@pytest.mark.parametrize(
    ("fmt", "number", "words"),
    [
        ("E4M3", 0.1, "rounding error 0.0015625, 1.56 % of the number; no tie"),
        ("E4M3", 1.0625, "rounding error −0.0625, 5.88 % of the number; a tie: the even mantissa wins"),
        ("E4M3", 0.5, "no rounding error: E4M3 has this value"),
        ("E4M3", 1000.0, "too large: E4M3 ends at 448, so it saturates: 55.2 % of the number is lost"),
        ("E4M3", math.inf, "too large: E4M3 ends at 448, so it saturates"),
        ("E5M2", 1e6, "too large: from 61,440 on a number rounds to infinity"),
        ("FP16", 65520.0, "too large: from 65,520 on a number rounds to infinity"),
        ("FP16", 65519.0, "rounding error −15, 0.0229 % of the number; no tie"),
        ("E5M2", math.nan, "no rounding error: NaN stays NaN"),
        ("FP16", 1e-30, "rounding error −1e−30, 100 % of the number; no tie"),
    ],
)
def test_what_rounding_did_is_said_in_words_and_in_the_text_alternative(fmt, number, words):
    sheet = bits_sheet(round_number(number, fmt))
    assert said(sheet, "error") == [words] and sheet.label.endswith(words)


def test_the_text_alternative_has_the_main_numbers():
    assert bits_sheet(round_number(0.1, "E4M3")).label == (
        "E4M3, code 0x1D: 0.1 becomes 0.1015625; sign 0, exponent 3, mantissa 5; "
        "rounding error 0.0015625, 1.56 % of the number; no tie"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_picture_of_bits_has_one_size_and_its_words_inside(name):
    fmt = FORMATS[name]
    numbers = [0.1, -1000.0, 1e39, -1e39, 1e-46, math.inf, -math.nan, 17.0]
    for shown in [*(Code(fmt, code) for code in SOME[name]), *(round_number(v, fmt) for v in numbers)]:
        sheet = bits_sheet(shown)
        assert sheet.height == HEIGHT
        for text in (s for s in sheet.shapes if isinstance(s, Words)):
            wide = len(text.text) * (7.0 if text.size > 12 else 6.4)
            start = text.x - {"start": 0, "middle": wide / 2, "end": wide}[text.anchor]
            assert start > -6 and start + wide < WIDTH + 6, text.text


def test_a_pointer_lies_where_the_number_lies():
    sheet = bits_sheet(round_number(0.1, "E4M3"))
    low, value, high = (line.points[0][0] for line in named(sheet, "value")[:3])
    zoom, among = (line.points[0][0] for line in named(sheet, "pointer"))
    assert (zoom - low) / (high - low) == pytest.approx((0.1 - 0.09375) / (0.109375 - 0.09375))
    assert (value - low) / (high - low) == pytest.approx(0.5)
    assert among == place_on_line(E4M3, 0.1015625)


def test_the_axis_of_values_ascends_and_gives_each_power_of_two_its_room():
    for fmt in (E4M3, E5M2):
        places = [place_on_line(fmt, fmt.value(code)) for code in range(fmt.max_code + 1)]
        assert all(a < b for a, b in itertools.pairwise(places))
        ones = [place_on_line(fmt, 2.0**e) for e in range(1 - fmt.bias, 6)]
        rooms = [b - a for a, b in itertools.pairwise([places[0], *ones])]
        assert rooms == pytest.approx([rooms[0]] * len(rooms))


def test_the_static_twin_takes_a_code_or_a_number():
    texts = [t.get_text() for t in plots.bit_explorer("E5M2", code=0x7C).texts]
    assert "E5M2, code 0x7C: infinity" in texts
    assert "E4M3, code 0x1D: 0.1 becomes 0.1015625" in [t.get_text() for t in plots.bit_explorer().texts]
    with pytest.raises(ValueError, match="give one or the other"):
        plots.bit_explorer(code=3, number=0.1)
    with pytest.raises(ValueError, match="E4M3 has codes 0 to 255, got 256"):
        plots.bit_explorer(code=256)
    with pytest.raises(ValueError, match="format 'FP8' is unknown"):
        plots.bit_explorer("FP8")


def patches(ax, kind):
    return [p for p in ax.patches if p.get_label().split(" ")[0] == kind]


def test_the_bars_of_formats_are_as_wide_as_their_fields():
    ax = plots.formats_bar()
    for field, attribute in (("exponent", "exponent_bits"), ("mantissa", "mantissa_bits")):
        widths = {p.get_label().split(" ")[1]: p.get_width() for p in patches(ax, field)}
        bits = patches(ax, "sign")[0].get_width()
        assert widths == {n: pytest.approx(bits * getattr(f, attribute)) for n, f in FORMATS.items()}
    assert {"448", "57,344", "65,504", "2⁻²³"} <= {t.get_text() for t in ax.texts}


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_the_picture_of_all_values_has_all_values(fmt):
    finite = {v for v in fmt.values() if math.isfinite(v)}
    ax = plots.format_values(fmt)
    strokes = [line for line in ax.lines if line.get_label().startswith("value ")]
    near = {v for v in finite if abs(v) <= 4 * fmt.smallest_normal}
    names = [float(line.get_label().split(" ")[1]) for line in strokes]
    assert len(names) == len(finite) + len(near) + fmt.max_code + 1 and set(names[: len(finite)]) == finite
    ends = {name: line.get_xdata()[0] for name, line in zip(names[: len(finite)], strokes, strict=False)}
    assert ends[fmt.max / 2] - ends[0] == pytest.approx((ends[fmt.max] - ends[0]) / 2)
    with pytest.raises(ValueError, match=r"FP16 has 2\^16 codes"):
        plots.format_values("FP16")


def test_the_curves_of_errors_are_the_worst_errors():
    from deepseek_lab.precision import worst_errors

    ax = plots.format_errors(("E4M3", "BF16"), low=-12, high=12)
    curves = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(curves) == ["E4M3", "BF16"]
    where, errors = worst_errors("E4M3", -12, 12)
    assert curves["E4M3"].get_xdata().tolist() == where.tolist()
    assert curves["E4M3"].get_ydata().tolist() == errors.tolist()
    assert {"E4M3", "BF16"} == {t.get_text() for t in ax.texts}


def test_the_histogram_counts_codes():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 3000
    ax = plots.code_histogram({"one scale": quantize_tensor(x).codes, "tiles": quantize_tiles(x).codes})
    for way, words, fill in zip((quantize_tensor, quantize_tiles), ax.texts, ax.collections, strict=True):
        codes = way(x).codes.view(torch.uint8) & 127
        used, zeros = codes.unique().numel(), 100 * (codes == 0).double().mean().item()
        assert words.get_text().endswith(f": {used} of 127 codes, {zeros:.2g} % are 0")
        top = 100 * codes.flatten().long().bincount().max().item() / codes.numel()
        assert fill.get_paths()[0].vertices[:, 1].max() == pytest.approx(top)
    with pytest.raises(ValueError, match="got E4M3 and 0 tensors"):
        plots.code_histogram({})
