"""Bars of parts and lines of caches show the amounts they were given, each with its own words."""

import pytest

from deepseek_lab import plots
from deepseek_lab.plots.style import PALETTE

PARTS = {"norms": 3.0, "routed experts": 120.0, "attention": 40.0, "token embedding": 7.5}
SPOKEN = {name: f"{amount:g} B" for name, amount in PARTS.items()}


@pytest.fixture
def bars():
    ax = plots.parts_bar(PARTS, "what it holds", SPOKEN)
    yield ax
    _close(ax)


def _close(ax):
    import matplotlib.pyplot as plt

    plt.close(ax.figure)


def test_bars_are_as_long_as_their_parts_and_the_longest_comes_first(bars):
    assert [patch.get_width() for patch in bars.patches] == sorted(PARTS.values(), reverse=True)
    assert [label.get_text() for label in bars.get_yticklabels()] == sorted(PARTS, key=PARTS.get, reverse=True)


def test_every_bar_has_its_amount_in_words_at_its_end(bars):
    for patch, words in zip(bars.patches, bars.texts, strict=True):
        assert words.get_text() == f"{patch.get_width():g} B"
        assert words.get_position()[0] > patch.get_width()
    assert bars.get_title(loc="left") == "what it holds"


def test_a_part_keeps_its_colour_in_every_figure(bars):
    from matplotlib.colors import to_hex

    colours = {
        row.get_text(): to_hex(bar.get_facecolor())
        for row, bar in zip(bars.get_yticklabels(), bars.patches, strict=True)
    }
    wanted = {"routed experts": "experts", "attention": "attention", "token embedding": "embedding", "norms": "other"}
    assert colours == {name: PALETTE[key].lower() for name, key in wanted.items()}


def test_lines_of_caches_pass_through_their_bytes_in_the_unit_of_the_axis():
    tokens, sizes = [0, 1024, 4096], {"expanded": [0, 5 * 2**30, 20 * 2**30], "latent": [0, 2**28, 2**30]}
    ax = plots.cache_growth(tokens, sizes)
    assert ax.get_ylabel() == "cache (GiB)"
    drawn = {text.get_text().split("\n")[0]: line for text, line in zip(ax.texts, ax.lines, strict=True)}
    for name, values in sizes.items():
        assert drawn[name].get_xdata().tolist() == tokens
        assert drawn[name].get_ydata().tolist() == [value / 2**30 for value in values]
    assert [text.get_text().split("\n")[1] for text in ax.texts] == ["20.0 GiB", "1.0 GiB"]
    _close(ax)


def test_every_cache_has_a_line_that_no_other_looks_like():
    sizes = {f"cache {i}": [0, (i + 1) * 2**30] for i in range(12)}
    ax = plots.cache_growth([0, 1024], sizes)
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(ax.lines) == len(ax.texts) == len(looks) == 12
    assert {line.get_linestyle() for line in ax.lines[:3]} == {"-"}
    _close(ax)
    for wrong in ({}, {**sizes, "one more": [0, 1]}):
        with pytest.raises(ValueError, match=f"cache_growth got {len(wrong)} caches; give 1 to 12"):
            plots.cache_growth([0, 1024], wrong)
