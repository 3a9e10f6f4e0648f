"""Pictures of long sums: curves are the errors they were given, the sheet shows the record that was chosen."""

from types import SimpleNamespace

import pytest
from matplotlib import pyplot as plt

from deepseek_lab import plots
from deepseek_lab.plots.accumulation import accumulator_sheet, choose
from deepseek_lab.plots.sheet import WIDTH, Line, Words

PRODUCTS = [32, 64, 96, 128]


def record(exact, register):
    error = [(r - e) / max(map(abs, exact[: i + 1])) for i, (e, r) in enumerate(zip(exact, register, strict=True))]
    return SimpleNamespace(products=PRODUCTS, exact=exact, register=register, error=error)


RECORDS = {
    ("positive", 13, 0): record([10.0, 21.0, 30.0, 44.0], [10.0, 20.5, 28.0, 40.0]),
    ("positive", 13, 128): record([10.0, 21.0, 30.0, 44.0], [10.0, 20.75, 29.5, 43.5]),
    ("centred", 13, 0): record([3.0, -4.0, 1.0, -2.0], [3.0, -4.0, 1.25, -1.75]),
    ("centred", 13, 128): record([3.0, -4.0, 1.0, -2.0], [3.0, -4.0, 1.0, -2.0]),
}


def points(sheet, kind):
    (line,) = (shape for shape in sheet.shapes if isinstance(shape, Line) and shape.kind == kind)
    return line.points


def texts(sheet):
    return [shape.text for shape in sheet.shapes if isinstance(shape, Words)]


def test_error_curves_show_every_error_under_its_name():
    errors = {"never": [0.001, 0.02, 0.3], "every 128": [0.0005, 0.0006, 0.0007]}
    ax = plots.error_curves([128, 256, 512], errors, "products")
    assert [line.get_ydata().tolist() for line in ax.lines] == list(errors.values())
    assert all(line.get_xdata().tolist() == [128, 256, 512] for line in ax.lines)
    assert [t.get_text() for t in ax.texts] == list(errors)
    assert [t.xy for t in ax.texts] == [(512, 0.3), (512, 0.0007)]
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "log", "products")
    assert len({line.get_linestyle() for line in ax.lines}) == 2  # told apart without colour


def test_errors_are_written_in_per_cent():
    ax = plots.error_curves([1, 2], {"a": [1e-4, 0.1]}, "products")
    assert [ax.yaxis.get_major_formatter()(value) for value in (1e-5, 0.01, 0.1)] == ["0.001 %", "1 %", "10 %"]


@pytest.mark.parametrize("count", [0, 5])
def test_no_curves_and_more_than_can_be_told_apart_are_refused(count):
    with pytest.raises(ValueError, match=f"got {count} curves; give 1 to 4"):
        plots.error_curves([1, 2], {str(i): [0.1, 0.2] for i in range(count)}, "products")


def test_a_curve_needs_one_error_for_each_size():
    with pytest.raises(ValueError, match="got 1 errors of 'a' for 2 sizes"):
        plots.error_curves([1, 2], {"a": [0.1]}, "products")
    assert not plt.get_fignums()


@pytest.mark.parametrize("key", RECORDS)
def test_the_curves_of_the_sheet_are_those_of_the_record(key):
    sheet, chosen = accumulator_sheet(RECORDS, *key), RECORDS[key]
    exact, register, error = (points(sheet, kind) for kind in ("exact", "register", "error"))
    per_unit = (exact[1][1] - exact[0][1]) / (chosen.exact[1] - chosen.exact[0])
    assert per_unit < 0  # larger is higher
    for drawn, values in ((exact, chosen.exact), (register, chosen.register)):
        assert [y for _, y in drawn] == pytest.approx([exact[0][1] + per_unit * (v - chosen.exact[0]) for v in values])
    assert [x for x, _ in error] == [x for x, _ in exact]
    assert exact[-1][0] - exact[0][0] == pytest.approx(3 * (exact[1][0] - exact[0][0]))
    if any(chosen.error):
        lowest = min(range(4), key=lambda i: chosen.error[i])
        assert max(range(4), key=lambda i: error[i][1]) == lowest


def test_the_words_say_setting_error_and_both_sums():
    sheet = accumulator_sheet(RECORDS, "positive", 13, 0)
    headline = "positive data, 13 fraction bits, never promoted"
    assert f"{headline}: −9.1 %" in texts(sheet)
    assert sheet.label == f"{headline}: error −9.1 %, after 128 products 40.0, exact 44.0"
    assert "promoted every 128: below 0.0001 %" in accumulator_sheet(RECORDS, "centred", 13, 128).shapes[0].text


def test_the_size_of_the_picture_and_the_axis_of_the_sums_do_not_move_between_settings():
    first, second = (accumulator_sheet(RECORDS, "positive", 13, every) for every in (0, 128))
    assert first.height == second.height
    assert points(first, "exact") == points(second, "exact")


def test_the_first_record_is_shown_unless_told_and_unknown_ones_are_refused():
    assert choose(RECORDS) == ("positive", 13, 0)
    assert choose(RECORDS, every=128, data="centred") == ("centred", 13, 128)
    with pytest.raises(ValueError, match=r"no record of \('positive', 9, 0\); choose one of"):
        choose(RECORDS, bits=9)
    with pytest.raises(ValueError, match="got no records"):
        plots.accumulator({})


def test_other_keys_and_empty_records_are_refused():
    some = record([1.0], [1.0])
    with pytest.raises(ValueError, match=r"a record under \('a', 1\); give \{\(data, bits, every\): record\}"):
        plots.accumulator({("a", 1): some})
    with pytest.raises(ValueError, match="a record under 'abc'"):
        plots.accumulator({**RECORDS, "abc": some})
    for none in ([], [0]):
        empty = SimpleNamespace(products=none, exact=none, register=none, error=none)
        with pytest.raises(ValueError, match=r"record of \('a', 13, 0\) is of no products"):
            plots.accumulator({("a", 13, 0): empty})


def test_an_error_that_is_no_number_is_not_called_small():
    nan = float("nan")
    lost = SimpleNamespace(products=[32], exact=[nan], register=[1.0], error=[nan])
    assert "error not a number, after 32" in accumulator_sheet({("a", 13, 0): lost}, "a", 13, 0).label


def test_the_twin_draws_the_sheet_on_the_axes_it_is_given_and_clips_no_word():
    plots.use_style()
    _, ax = plt.subplots()
    assert plots.accumulator(RECORDS, every=128, ax=ax) is ax
    ax = plots.accumulator(RECORDS, "centred")
    sheet = accumulator_sheet(RECORDS, "centred", 13, 0)
    assert [t.get_text() for t in ax.texts] == texts(sheet)
    assert ax.get_xlim() == (0, WIDTH)
    ax.figure.canvas.draw()
    frame = ax.figure.bbox
    for box in (text.get_window_extent() for text in ax.texts):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
