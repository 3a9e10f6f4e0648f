"""Every exercise accepts its solution, answers the usual slips with their hints, and waits for an answer."""

import importlib
import json
from pathlib import Path

import pytest

import deepseek_lab as lab
from deepseek_lab.exercises import find

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBERS = [
    number
    for path in sorted((ROOT / "deepseek_lab/exercises").glob("nb*.py"))
    for number in importlib.import_module(f"deepseek_lab.exercises.{path.stem}").EXERCISES
]


def sources(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_is_accepted(number):
    exercise = find(number)
    right, said = exercise.verdict(exercise.solution)
    assert right is True
    assert said.endswith(exercise.praise)


@pytest.mark.parametrize("number", NUMBERS)
def test_usual_slips_are_rejected_with_their_own_hint(number):
    exercise = find(number)
    assert len(exercise.slips) >= 2
    for slip in exercise.slips:
        assert exercise.verdict(slip.answer) == (False, f"not yet. {slip.hint}")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("nonsense", ["no idea", object(), [], float("nan"), lambda *_: 1 / 0, {"a": 1}])
def test_nonsense_is_rejected_and_raises_nothing(number, nonsense):
    right, said = find(number).verdict(nonsense)
    assert right is False
    assert said.startswith("not yet. ")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("nothing", [..., None])
def test_an_unanswered_exercise_says_what_to_do(number, nothing, capsys):
    lab.check(number, nothing)
    assert capsys.readouterr().out == f"Exercise {number} waits for your answer. {find(number).todo}\n"


def test_an_unknown_exercise_names_those_that_exist():
    with pytest.raises(ValueError, match=r"no exercise '00\.9'; notebook 00 has 00\.1, 00\.2"):
        lab.check("00.9", 1)
    with pytest.raises(ValueError, match=r"no exercise '99\.1'.*there is no such notebook"):
        lab.check("99.1", 1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_each_of_its_exercises_once(path):
    asked = [n for n in NUMBERS for source in sources(path) if f'lab.check("{n}"' in source]
    assert asked == [n for n in NUMBERS if n.startswith(path.stem[:2] + ".")]
    assert 3 <= len(asked) <= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_which_check_catches_a_mistake(path):
    assert any("## Which check catches this?" in source for source in sources(path))


@pytest.mark.parametrize(("written", "number"), [(11.2, "11.2"), (" 11.2 ", "11.2"), (00.1, "00.1")])
def test_a_number_is_understood_however_it_is_written(written, number, capsys):
    lab.check(written)
    assert capsys.readouterr().out == f"Exercise {number} waits for your answer. {find(number).todo}\n"
