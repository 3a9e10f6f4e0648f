"""The memory bar's static twin: lengths and places equal the ledger, settings stand for a state, nothing touches."""

import re

import matplotlib
import pytest
from matplotlib import pyplot as plt

from deepseek_lab import plots
from deepseek_lab.accounting import MemoryState
from deepseek_lab.plots import memory
from deepseek_lab.plots.sheet import png
from deepseek_lab.units import GIB

NOW, BEFORE = MemoryState(), MemoryState(cache="expanded")


def bars(ax):
    """The bars by name: "ghost" and the parts."""
    return {
        p.get_label().removeprefix("part "): p for p in ax.patches if p.get_label().split(" ")[0] in ("part", "ghost")
    }


def gib_per_pixel(ax):
    """By the axis as it is drawn: what its last tick says, and where it stands."""
    (last,) = (text for text in ax.texts if re.fullmatch(r"[\d,]+ GiB", text.get_text()))
    return int(re.sub(r"\D", "", last.get_text())) / (last.get_position()[0] - memory.LEFT)


def test_bars_are_as_long_as_the_ledger_says():
    ax = plots.memory_bar(NOW, previous=BEFORE)
    scale = gib_per_pixel(ax) * GIB
    for name, size in NOW.parts.items():
        assert bars(ax)[name].get_width() * scale == pytest.approx(size, rel=1e-9)
    assert bars(ax)["ghost"].get_width() * scale == pytest.approx(BEFORE.total, rel=1e-9)
    last = bars(ax)["cache"]
    assert (last.get_x() + last.get_width() - memory.LEFT) * scale == pytest.approx(NOW.total, rel=1e-9)


def test_the_capacity_line_stands_at_the_memory_of_the_gpus():
    ax = plots.memory_bar(NOW)
    (line,) = (line for line in ax.lines if line.get_label() == "capacity")
    assert (line.get_xdata()[0] - memory.LEFT) * gib_per_pixel(ax) * GIB == pytest.approx(640e9)


def test_the_axis_names_its_unit():
    assert "1,500 GiB" in [text.get_text() for text in plots.memory_bar(NOW, BEFORE).texts]


def test_settings_can_stand_for_a_state_but_not_beside_one():
    ax = plots.memory_bar(model="llama-3.1-8b", weights="bf16", cache="grouped", context=8_192)
    assert set(bars(ax)) == {"weights", "cache"}
    with pytest.raises(ValueError, match="got a state and also cache; give one or the other"):
        plots.memory_bar(NOW, cache="latent")


def test_no_word_is_clipped_and_none_touch():
    plots.use_style()
    for state, previous in ((NOW, BEFORE), (BEFORE, NOW), (MemoryState("tiny", context=1_024), None)):
        ax = plots.memory_bar(state, previous)
        ax.figure.canvas.draw()
        boxes = [text.get_window_extent() for text in ax.texts]
        frame = ax.figure.bbox
        assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
        shrunk = [b.padded(-1) for b in boxes]
        assert not any(a.overlaps(b) for i, a in enumerate(shrunk) for b in shrunk[:i])


def test_the_png_leaves_no_figure_open_and_is_the_same_twice():
    picture = png(memory.memory_sheet(NOW, BEFORE))
    assert picture.startswith(b"\x89PNG") and plt.get_fignums() == []
    assert png(memory.memory_sheet(NOW, BEFORE)) == picture


def test_a_part_has_one_colour_everywhere_and_the_ground_is_white():
    colours = [plots.PALETTE[name] for name in ("weights", "gradients", "moments", "activations", "cache", "experts")]
    assert len(set(plots.PALETTE.values())) == len(plots.PALETTE)
    assert all(matplotlib.colors.is_color_like(colour) for colour in colours)
    plots.use_style()
    assert matplotlib.colors.to_hex(plt.figure().get_facecolor()) == "#ffffff"
    for name, role in (("routed experts", "experts"), ("other weights", "weights"), ("cache", "cache")):
        (box,) = (shape for shape in memory.memory_sheet(NOW).shapes if getattr(shape, "name", "") == name)
        assert box.fill == plots.PALETTE[role]
