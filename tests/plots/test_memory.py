"""The static twin shows what the widget shows: lengths equal the ledger, words equal the widget's words."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

from deepseek_lab import plots
from deepseek_lab.accounting import MemoryState
from deepseek_lab.plots import bar_layout
from deepseek_lab.plots.memory import memory_png
from deepseek_lab.units import GIB

NOW, BEFORE = MemoryState(), MemoryState(cache="expanded")


@pytest.fixture(autouse=True)
def closed_figures():
    with matplotlib.rc_context():
        yield
    plt.close("all")


def bars(ax):
    return {bar.get_label(): bar.patches[0] for bar in ax.containers}


def test_bars_are_as_long_as_the_ledger_says():
    ax = plots.memory_bar(NOW, previous=BEFORE)
    for part in NOW.parts:
        assert bars(ax)[part.name].get_width() * GIB == part.size_bytes
    assert bars(ax)["before"].get_width() * GIB == pytest.approx(BEFORE.total)
    last = bars(ax)["cache"]
    assert (last.get_x() + last.get_width()) * GIB == pytest.approx(NOW.total)


def test_the_capacity_line_stands_at_the_memory_of_the_gpus():
    (line,) = (line for line in plots.memory_bar(NOW).lines if line.get_label() == "capacity")
    assert line.get_xdata()[0] * GIB == pytest.approx(640e9)


def test_the_twin_says_the_words_of_the_widget_and_names_its_unit():
    ax = plots.memory_bar(NOW, BEFORE)
    assert [text.get_text() for text in ax.texts] == [w.text for w in bar_layout.bar_layout(NOW, BEFORE).words]
    assert ax.get_xticklabels()[-1].get_text() == "1,500 GiB"


def test_settings_can_stand_for_a_state_but_not_beside_one():
    ax = plots.memory_bar(model="llama-3.1-8b", weights="bf16", cache="grouped", context=8_192)
    assert set(bars(ax)) == {"weights", "cache"}
    with pytest.raises(ValueError, match="got a state and also cache; give one or the other"):
        plots.memory_bar(NOW, cache="latent")


def test_it_draws_on_the_axes_that_it_is_given():
    _, ax = plt.subplots()
    assert plots.memory_bar(NOW, ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_no_word_is_clipped_and_none_touch():
    plots.use_style()
    for state, previous in ((NOW, BEFORE), (BEFORE, NOW), (MemoryState("tiny", context=1_024), None)):
        ax = plots.memory_bar(state, previous)
        ax.figure.canvas.draw()
        boxes = [text.get_window_extent() for text in [*ax.texts, *ax.get_xticklabels()]]
        frame = ax.figure.bbox
        assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
        shrunk = [b.padded(-1) for b in boxes]
        assert not any(a.overlaps(b) for i, a in enumerate(shrunk) for b in shrunk[:i])


def test_the_png_leaves_no_figure_open_and_is_the_same_twice():
    png = memory_png(NOW, BEFORE)
    assert png.startswith(b"\x89PNG") and plt.get_fignums() == []
    assert memory_png(NOW, BEFORE) == png


def test_a_part_has_one_colour_everywhere_and_the_ground_is_white():
    colours = [plots.PALETTE[name] for name in ("weights", "gradients", "moments", "activations", "cache", "experts")]
    assert len(set(plots.PALETTE.values())) == len(plots.PALETTE)
    assert all(matplotlib.colors.is_color_like(colour) for colour in colours)
    plots.use_style()
    assert matplotlib.colors.to_hex(plt.figure().get_facecolor()) == "#ffffff"
    bar = bars(plots.memory_bar(NOW))["cache"]
    assert matplotlib.colors.to_hex(bar.get_facecolor()).upper() == plots.PALETTE["cache"]
