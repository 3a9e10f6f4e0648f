"""The memory timeline's picture: areas are bytes stacked, the peak is marked where it was, nothing is clipped."""

import itertools

import matplotlib
import pytest
from matplotlib import pyplot as plt

from deepseek_lab import plots
from deepseek_lab.accounting.measured import PARTS, Moment, Timeline
from deepseek_lab.plots.memory_timeline import (
    BOTTOM,
    COLOURS,
    LEFT,
    RIGHT,
    TOP,
    check_timelines,
    memory_timeline,
    peak_event,
    phase_of,
    short_name,
    timeline_sheet,
)  # fmt: skip
from deepseek_lab.plots.sheet import WIDTH, Box, Words
from deepseek_lab.plots.style import PALETTE

MIB = 2**20
LABELS = ["start", "forward embed_tokens", "forward layers.0", "forward layers.1", "forward lm_head", "loss",
          "backward loss", "backward lm_head", "backward layers.1", "backward layers.0", "backward embed_tokens",
          "clip", "optimiser", "zero_grad"]  # fmt: skip


def timeline(activations=10, narrow=0, moments_in_event=7, labels=LABELS):
    """A step whose activations grow and fall, with one operation in the backward pass that takes workspace."""
    moments, seconds = [], 0.0
    for number, label in enumerate(labels):
        level = min(number, len(labels) - 1 - number)
        for i in range(1 if label in ("start", "clip") else moments_in_event):
            seconds += 0.001
            sizes = dict.fromkeys(PARTS, 0) | {
                "weights": 4 * MIB, "moments": 8 * MIB, "activations": level * activations * MIB,
                "narrow weights": narrow * MIB, "gradients": (number > 7) * MIB,
                "workspace": (label == "backward layers.1" and i == 3) * 9 * MIB,
            }  # fmt: skip
            moments.append(Moment(label, seconds, sizes))
    return Timeline(tuple(moments), 1_000_000, 0.0)


TIMELINES = {("FP32", False): timeline(), ("FP32", True): timeline(4), ("FP8", False): timeline(6, 1),
             ("FP8", True): timeline(3, 1)}  # fmt: skip


@pytest.fixture(autouse=True)
def closed_figures():
    with matplotlib.rc_context():
        yield
    plt.close("all")


def named(sheet, kind):
    return [shape for shape in sheet.shapes if shape.kind == kind]


def test_areas_stack_the_parts_from_the_weights_up_on_one_scale_for_all():
    for key, line in TIMELINES.items():
        sheet = timeline_sheet(TIMELINES, *key, 5)
        areas = named(sheet, "part")
        assert [a.name for a in areas] == [part for part in COLOURS if line.largest(part)]
        tops = [min(y for _, y in a.points) for a in areas]
        pixel = (BOTTOM - TOP) / 80 / MIB  # the axis ends at 80 MiB: the fullest of all has 72
        assert tops[-1] == pytest.approx(BOTTOM - line.peak.total * pixel)
        assert tops[0] == pytest.approx(BOTTOM - 4 * MIB * pixel)
        for below, above in itertools.pairwise(areas):
            count = len(below.points) // 2
            assert below.points[:count] == tuple(reversed(above.points[count:]))
        assert {x for a in areas for x, _ in a.points} <= {x for a in areas for x, _ in areas[0].points}
        assert all(LEFT <= x <= RIGHT for a in areas for x, _ in a.points)


def test_every_part_of_the_palette_has_its_own_colour():
    for part in ("weights", "gradients", "moments", "activations", "cache"):
        assert COLOURS[part] == PALETTE[part]
    assert len(set(COLOURS.values())) == len(COLOURS) == len(PARTS) and set(COLOURS) == set(PARTS)


def test_the_peak_is_marked_where_it_was_and_the_other_way_is_dashed():
    sheet = timeline_sheet(TIMELINES, "FP32", False, 2)
    line = TIMELINES["FP32", False]
    number = peak_event(line)
    assert line.events[number].fullest is line.peak
    (left, y), *_ = named(sheet, "peak")[0].points
    slot = (RIGHT - LEFT) / len(LABELS)
    assert LEFT + slot * number < left + 5 < LEFT + slot * (number + 1)
    assert y == pytest.approx(BOTTOM - line.peak.total / MIB * (BOTTOM - TOP) / 80)
    ghost = min(y for _, y in named(sheet, "ghost")[0].points)
    assert ghost == pytest.approx(BOTTOM - TIMELINES["FP32", True].peak.total / MIB * (BOTTOM - TOP) / 80)
    assert not named(timeline_sheet({("FP32", False): line}, "FP32", False, 2), "ghost")


def test_the_table_has_the_bytes_of_the_fullest_moment_of_the_event():
    sheet = timeline_sheet(TIMELINES, "FP8", False, 8)
    event = TIMELINES["FP8", False].events[8]
    assert event.fullest.bytes["workspace"] == 9 * MIB
    words = [w.text for w in named(sheet, "amount")]
    assert words == ["4.0 MiB", "1.0 MiB", "8.0 MiB", "1.0 MiB", "30.0 MiB", "9.0 MiB"]
    bars = {b.name: b.width for b in named(sheet, "bar")}
    assert bars["moments"] == pytest.approx(2 * bars["weights"]) and bars["activations"] > 7 * bars["weights"]
    assert named(sheet, "event")[0].text == "backward layers.1: 53.0 MiB at its fullest, 7.0 ms"
    framed = [b.name for b in named(sheet, "slot") if b.line > 1]
    assert framed == ["8"]


def test_the_label_says_what_the_picture_shows():
    sheet = timeline_sheet(TIMELINES, *check_timelines(TIMELINES, None, True, None))
    assert sheet.label == (
        "FP32 with recomputation: peak 42.0 MiB in backward layers.1. backward layers.1: 42.0 MiB at its fullest, "
        "7.0 ms: weights 4.0 MiB, gradients 1.0 MiB, moments 8.0 MiB, activations 20.0 MiB, workspace 9.0 MiB"
    )
    assert named(sheet, "compared")[0].text == "0.58 of the peak without it (dashed), 72.0 MiB"
    assert named(timeline_sheet(TIMELINES, "FP32", False, 0), "compared")[0].text == (
        "with it (dashed) the peak is 42.0 MiB, 0.58 of this"
    )
    alone = timeline_sheet({("FP32", False): TIMELINES["FP32", False]}, "FP32", False, 0)
    assert named(alone, "compared")[0].text == "75.5 bytes per parameter at the peak"
    assert sheet.detail.count(";") == len(LABELS) - 1


def test_phases_and_short_names():
    assert [phase_of(label) for label in LABELS] == ["forward"] * 6 + ["backward"] * 5 + ["update"] * 3
    names = [short_name(label) for label in LABELS]
    assert names == ["s", "e", "0", "1", "h", "l", "l", "h", "1", "0", "e", "c", "o", "z"]
    assert [short_name(f"backward multi_token.{i}") for i in (0, 1)] == ["m", "m1"]


def test_a_prediction_module_is_not_taken_for_a_layer():
    labels = [*LABELS[:5], "forward multi_token.0", "forward lm_head", *LABELS[5:]]
    sheet = timeline_sheet({("FP32", False): timeline(labels=labels)}, "FP32", False, 5)
    words = named(sheet, "names")[0].text
    assert words == "s start, e embed_tokens, h lm_head, m multi_token, l loss, c clip, o optimiser, z zero_grad"


@pytest.mark.parametrize("layers", [1, 4, 12, 27])
def test_every_moment_has_one_size_and_nothing_is_clipped(layers):
    plots.use_style()
    inner = [f"layers.{i}" for i in range(layers)]
    labels = ["start", "forward embed_tokens", *(f"forward {n}" for n in inner), "forward norm", "forward lm_head",
              "loss", "backward loss", "backward lm_head", "backward norm", *(f"backward {n}" for n in inner[::-1]),
              "backward embed_tokens", "clip", "optimiser", "zero_grad"]  # fmt: skip
    many = {("BF16", way): timeline(700 + 300 * way, 3, 40, labels) for way in (False, True)}
    sizes = set()
    for event in (0, 2, len(labels) // 2, len(labels) - 1):
        sheet = timeline_sheet(many, "BF16", True, event)
        sizes.add(sheet.height)
        ax = memory_timeline(many, "BF16", True, event)
        ax.figure.canvas.draw()
        frame = ax.figure.bbox
        for text in ax.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, text
        assert sum(len(getattr(s, "points", ())) for s in sheet.shapes) < 5_000
        plt.close("all")
    assert len(sizes) == 1


def test_the_twin_has_the_boxes_and_words_of_the_sheet():
    ax = plots.memory_timeline(TIMELINES, "FP8", event=3)
    sheet = timeline_sheet(TIMELINES, "FP8", False, 3)
    boxes = [(b.x, b.y, b.width, b.height) for b in sheet.shapes if isinstance(b, Box) and b.kind == "bar"]
    patches = [p for p in ax.patches if p.get_label().startswith("bar")]
    assert [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in patches] == boxes
    assert [t.get_text() for t in ax.texts] == [s.text for s in sheet.shapes if isinstance(s, Words)]
    assert ax.get_xlim() == (0, WIDTH)


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="got no timelines"):
        plots.memory_timeline({})
    with pytest.raises(ValueError, match=r"no timeline for precision='FP4', recompute=False; choose one of \('FP32'"):
        plots.memory_timeline(TIMELINES, "FP4")
    with pytest.raises(ValueError, match="event=14 is not in this step; choose 0 to 13"):
        plots.memory_timeline(TIMELINES, event=14)
    with pytest.raises(ValueError, match=r"steps of \[14, 13\] events that do not compare"):
        plots.memory_timeline({("A", False): timeline(), ("B", False): timeline(labels=LABELS[1:])})
