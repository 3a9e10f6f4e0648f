"""The accumulator widget: its controls choose among the records, and it says in words what it shows."""

from types import SimpleNamespace

import pytest

from deepseek_lab.plots.accumulation import accumulator_sheet
from deepseek_lab.widgets import accumulator


def record(end: float):
    return SimpleNamespace(products=[32, 64], exact=[5.0, 10.0], register=[5.0, end], error=[0.0, end / 10 - 1])


KEYS = [(data, bits, every) for data in ("positive", "centred") for bits in (13, 7) for every in (0, 32)]
RECORDS = {key: record(9.0 - 0.25 * place) for place, key in enumerate(KEYS)}


def test_it_starts_at_the_first_record_or_where_it_is_told():
    assert accumulator(RECORDS).summary() == accumulator_sheet(RECORDS, "positive", 13, 0).label
    told = accumulator(RECORDS, data="centred", bits=7, every=32)
    assert told.summary() == accumulator_sheet(RECORDS, "centred", 7, 32).label


def test_every_combination_of_the_controls_shows_its_own_record():
    widget = accumulator(RECORDS)
    seen = set()
    for data, bits, every in RECORDS:
        for name, value in (("data", data), ("bits", bits), ("every", every)):
            widget.controls[name].value = value
        assert widget.summary() == accumulator_sheet(RECORDS, data, bits, every).label
        assert widget.summary() in widget.picture.value.replace("&#x27;", "'")
        seen.add(widget.summary())
    assert len(seen) == len(RECORDS)


def test_each_control_has_a_label_and_lengths_go_upwards():
    widget = accumulator(RECORDS)
    assert [control.description for control in widget.controls.values()] == ["fraction bits", "promoted", "data"]
    assert [label for label, _ in widget.controls["bits"].options] == ["7", "13"]
    assert [label for label, _ in widget.controls["every"].options] == ["never", "every 32 products"]


def test_without_a_kernel_there_is_a_picture_and_a_line_of_text():
    bundle = accumulator(RECORDS)._repr_mimebundle_()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert (
        bundle["text/plain"]
        == "positive data, 13 fraction bits, never promoted: error −10 %, after 64 products 9.0, exact 10.0"
    )


def test_a_combination_without_a_record_is_refused_before_anybody_can_choose_it():
    missing = {key: value for key, value in RECORDS.items() if key != ("centred", 7, 32)}
    with pytest.raises(ValueError, match=r"no record of \('centred', 7, 32\)"):
        accumulator(missing)
