"""Every stored notebook keeps the rules; nbval then runs each one cell by cell."""

from pathlib import Path

import pytest

from deepseek_lab.notebook_rules import problems

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path):
    """Among them: each code cell says whether its output is compared or only executed."""
    assert problems(path) == []
