"""A roofline shows the roofs of its machines, their ridges, and points where they were counted or measured."""

import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from deepseek_lab import facts, plots
from deepseek_lab.plots.style import style

H800 = (facts.H800_BF16_PEAK.value, facts.H800_BANDWIDTH.value)
HERE = (62e9, 13e9)
COUNTED = {"MHA": 1.0, "GQA-8": 8.0, "absorbed MLA": 241.8}


@pytest.fixture(autouse=True)
def course_style():
    with matplotlib.rc_context(style()):
        yield
    plt.close("all")


def drawn(ax, name):
    (line,) = (line for line in ax.lines if line.get_label() == name)
    return np.array(line.get_xydata())


def test_a_roof_rises_with_the_bandwidth_to_its_ridge_and_stays_at_the_peak():
    ax = plots.roofline({"H800": H800, "here": HERE})
    for name, (peak, bandwidth) in {"H800": H800, "here": HERE}.items():
        first, ridge, last = drawn(ax, name)
        assert first[1] == pytest.approx(first[0] * bandwidth)
        assert ridge.tolist() == pytest.approx([peak / bandwidth, peak]) and last[1] == peak
    said = [text.get_text() for text in ax.texts]
    assert "H800: 989.4 TFLOP/s, 3.35 TB/s\nridge 295 FLOP/byte" in said
    assert "here: 62.0 GFLOP/s, 13.00 GB/s\nridge 4.8 FLOP/byte" in said


def test_a_counted_point_lies_on_the_first_roof_and_a_measured_one_where_it_was_measured():
    ax = plots.roofline({"H800": H800, "here": HERE}, {**COUNTED, "beyond": 4_000.0, "decode": (10.6, 4.1e10)})
    for name, intensity in COUNTED.items():
        assert drawn(ax, name).tolist() == [[intensity, intensity * H800[1]]]
    assert drawn(ax, "beyond").tolist() == [[4_000.0, H800[0]]]
    assert drawn(ax, "decode").tolist() == [[10.6, 4.1e10]]
    said = [text.get_text() for text in ax.texts]
    assert {"absorbed MLA\n242 FLOP/byte", "decode: 41.0 GFLOP/s"} <= set(said)


@pytest.mark.parametrize(
    ("machines", "points"),
    [
        ({"H800": H800}, COUNTED),
        ({"H800": H800, "here": HERE}, {**COUNTED, "decode": (10.6, 4.1e10), "MHA here": (1.0, 1.1e10)}),
        ({"H800": H800, "H100": (7e14, 2.9e12)}, {**COUNTED, "absorbed, seen": (241.8, 5e14)}),
        ({"here": HERE}, {"a": (0.5, 6e9), "b": (0.5, 5.9e9), "c": (0.6, 5.8e9)}),
        (
            {"here": HERE, "H800": H800},
            {"1": (0.5, 9.9e9), "caches": (0.5, 1e10), "16": (8, 1.8e10), "128": (64, 5e10)},
        ),
        ({"here, ridge 2": (2e10, 1e10), "H800": H800}, {"one vector of many": (0.5, 4e9), "another": (0.5, 4e9)}),
    ],
)
def test_labels_do_not_touch_and_all_is_inside(machines, points):
    ax = plots.roofline(machines, points)
    ax.figure.canvas.draw()
    frame = ax.get_window_extent()
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]  # those without are thin lines
    for one, other in itertools.combinations(boxes, 2):
        touching = (
            min(one.x1, other.x1) - max(one.x0, other.x0) > 2 and min(one.y1, other.y1) - max(one.y0, other.y0) > 2
        )
        assert not touching
    assert all(box.x0 > frame.x0 and box.x1 < frame.x1 + 14 and box.y1 <= frame.y1 for box in boxes)
    for name in points:
        (x, y), (low, high) = drawn(ax, name)[0], ax.get_ylim()
        assert ax.get_xlim()[0] < x < ax.get_xlim()[1] and low < y < high
        at = ax.transData.transform((x, y))
        assert not any(box.x0 < at[0] < box.x1 and box.y0 < at[1] < box.y1 for box in boxes), "a name hides a point"


def test_a_name_that_stands_further_off_is_joined_to_its_point_by_a_line():
    for points, crowded in (
        ({"a": (8.0, 3e10), "b": (800.0, 3e10)}, False),
        (dict.fromkeys("abcd", (8.0, 3e10)), True),
    ):
        lines = [text.xy for text in plots.roofline({"here": HERE}, points).texts if not text.get_text()]
        assert bool(lines) == crowded and set(lines) <= {(8.0, 3e10)}


def test_it_draws_on_axes_that_are_given():
    _, own = plt.subplots()
    assert plots.roofline({"H800": H800}, COUNTED, ax=own) is own


@pytest.mark.parametrize(
    ("machines", "points", "says"),
    [
        ({}, {}, "got 0 machines"),
        (dict.fromkeys("abcde", HERE), {}, "got 5 machines; give 1 to 4"),
        ({"a": (1.0, 0.0)}, {}, r"'a' is \(1.0, 0.0\)"),
        ({"a": HERE}, {"b": -1.0}, "'b' is -1.0"),
        ({"a": HERE}, {"b": (1.0, float("nan"))}, "'b' is"),
        ({"a": HERE}, {"b": (1.0, 2.0, 3.0)}, "'b' is"),
        ({"a": 5.0}, {}, "'a' is 5.0"),
    ],
)
def test_numbers_that_have_no_place_are_refused(machines, points, says):
    with pytest.raises(ValueError, match=says):
        plots.roofline(machines, points)
