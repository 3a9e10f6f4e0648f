"""The bit explorer: a number sets the bits, a bit changes the number, and nonsense is explained in place."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from deepseek_lab.plots.bits import bits_sheet
from deepseek_lab.precision import FORMATS, Code, FloatFormat, round_number
from deepseek_lab.widgets import bit_explorer


def shown(widget) -> str:
    return "".join(button.description for button in widget.bits)


def test_a_number_sets_the_bits_of_every_format():
    widget = bit_explorer("E4M3", 0.1)
    assert shown(widget) == "00011101" and widget.summary() == bits_sheet(round_number(0.1, "E4M3")).label
    for name, fmt in FORMATS.items():
        widget.controls["fmt"].value = name
        for text, number in (("0.1", 0.1), ("-3e-5", -3e-5), ("inf", math.inf), ("1e9", 1e9)):
            widget.controls["number"].value = text
            assert shown(widget) == f"{fmt.code(number):0{fmt.bits}b}"
            assert widget.summary() == bits_sheet(round_number(number, fmt)).label


def test_a_bit_changes_the_number_and_is_drawn_once():
    widget, seen = bit_explorer("E4M3", 0.1), []
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.bits[-1].value = False
    assert (widget.code, widget.number, widget.controls["number"].value) == (0x1C, 0.09375, "0.09375")
    assert len(seen) == 1
    assert (
        ElementTree.fromstring(seen[0]).get("aria-label")
        == widget.summary()
        == bits_sheet(Code(widget.format, 0x1C)).label
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_can_be_set_and_cleared(name):
    widget, fmt = bit_explorer(name, 0.0), FORMATS[name]
    for place, button in enumerate(widget.bits):
        button.value = True
        assert widget.code == 1 << (fmt.bits - 1 - place)
        assert shown(widget) == f"{widget.code:0{fmt.bits}b}"
        button.value = False
        assert widget.code == 0


def test_codes_that_no_typed_number_has_are_reached_by_bits():
    widget = bit_explorer("E5M2", math.nan)
    assert widget.code == 0x7F
    widget.bits[-1].value = False
    assert widget.code == 0x7E and shown(widget) == "01111110" and math.isnan(widget.number)
    widget.bits[-2].value = False
    assert widget.code == 0x7C and widget.number == math.inf and widget.controls["number"].value == "inf"
    widget.controls["fmt"].value = "E4M3"
    assert widget.code == 0x7E and "infinity becomes 448" in widget.summary()


def test_what_is_no_number_is_explained_beside_it_and_the_picture_stays():
    widget = bit_explorer("E4M3", 0.1)
    before = widget.summary()
    for text in ("abc", "", "-", "1,5", "<b>"):
        widget.controls["number"].value = text
        assert "is not a number.</b>" in widget.note.value and "shown is still 0.1." in widget.note.value
        assert widget.summary() == before
    assert "“&lt;b&gt;”" in widget.note.value
    widget.controls["number"].value = "0.2"
    assert "not a number" not in widget.note.value and widget.code == FORMATS["E4M3"].code(0.2)


def test_every_button_says_what_it_is_and_the_tab_key_meets_them_in_order():
    widget = bit_explorer("FP16", 1.0)
    assert [c.description for c in widget.controls.values()] == ["format", "number"]
    said = [button.tooltip for button in widget.bits]
    assert (
        said[0] == "bit 15, sign, is 0" and said[5] == "bit 10, exponent, is 1" and said[15] == "bit 0, mantissa, is 0"
    )
    met = [child for row in widget.rows for child in row.children if hasattr(child, "field")]
    assert met == widget.bits


def test_no_format_moves_the_picture():
    widgets = [bit_explorer(name) for name in FORMATS]
    heights = {(*(part.layout.height for part in (*w.rows, w.note)), w.sheet.height) for w in widgets}
    assert len(heights) == 1


@pytest.mark.parametrize("fmt", [FloatFormat("E3M4", 3, 4, 3), FloatFormat("E4M3", 4, 3, 8),
                                 FloatFormat("E10M30", 10, 30, 511)], ids=["new", "namesake", "longer"])  # fmt: skip
def test_a_format_of_ones_own_is_shown_beside_the_others(fmt):
    widget = bit_explorer(fmt, 0.1)
    label = bits_sheet(round_number(0.1, fmt)).label
    assert widget.format is fmt and widget.summary() == label and shown(widget) == f"{fmt.code(0.1):0{fmt.bits}b}"
    widget.controls["fmt"].value = "E5M2"
    assert widget.format is FORMATS["E5M2"]
    widget.controls["fmt"].value = fmt.name
    assert widget.summary() == label


def test_without_a_kernel_the_widget_is_a_picture_and_a_line():
    bundle = bit_explorer("BF16", 3.0)._repr_mimebundle_()
    assert bundle["text/plain"].startswith("BF16, code 0x4040: 3; sign 0, exponent 128, mantissa 64")
    assert bundle["image/png"].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="format 'FP8' is unknown"):
        bit_explorer("FP8")
