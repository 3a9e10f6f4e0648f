"""The pictures in figures/ are those that one command makes, and the map tells the truth about what exists."""

import re
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

from deepseek_lab import plots
from deepseek_lab.plots.build import build
from deepseek_lab.plots.course_map import READY

ROOT = Path(__file__).resolve().parents[2]


def test_one_command_makes_every_picture_that_is_stored(tmp_path):
    made = {path.name: matplotlib.image.imread(path).shape for path in build(tmp_path)}
    stored = {path.name: matplotlib.image.imread(path).shape for path in (ROOT / "figures").glob("*.png")}
    assert made == stored


def test_the_map_prints_what_exists_dark_and_the_rest_grey():
    ax = plots.course_map("11")
    colours = {text.get_text(): text.get_color() for text in ax.texts if text.get_text()[:2].isdigit()}
    dark = {name[:2] for name, colour in colours.items() if colour == plots.INK}
    assert dark | {"11"} == set(READY)
    assert "▸ 11 assemble the model" in [text.get_text() for text in ax.texts]
    plt.close(ax.figure)


def test_the_map_and_readme_name_the_notebooks_that_exist():
    files = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert tuple(name[:2] for name in files) == READY
    linked = re.findall(r"\(notebooks/([\w]+\.ipynb)\)", (ROOT / "README.md").read_text("utf-8"))
    assert sorted(linked) == files


def test_a_notebook_that_is_not_on_the_map_is_refused():
    with pytest.raises(ValueError, match="notebook '23' is not on the map; choose one of 00, 01"):
        plots.course_map("23")
