"""One checker per exercise: it says what to do, or what probably went wrong, or that the answer is right.

`lab.check("00.1", answer)` prints one line. An exercise is data: what to do, a solution, a test of an answer, and the
usual slips with the hint that each deserves. Tests hold every exercise to its own solution and slips.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slip:
    """A usual wrong answer and what to say to somebody who gives it."""

    answer: Any
    hint: str


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook.

    todo: what to do, shown while the answer is still `...`. solution: an answer that is right. praise: one sentence to
    remember. slips: usual wrong answers. agrees(given, wanted): whether two answers are the same, for the solution and
    the slips alike; fallback: the hint for any other wrong answer.
    """

    todo: str
    solution: Any
    praise: str
    slips: tuple[Slip, ...]
    fallback: str
    agrees: Callable[[Any, Any], bool] = lambda given, wanted: given == wanted

    def verdict(self, answer: Any) -> tuple[bool | None, str]:
        """Return (right, what to say); right is None while nothing was answered."""
        if answer is ... or answer is None:
            return None, f"waits for your answer. {self.todo}"
        if self._same(answer, self.solution):
            return True, f"right. {self.praise}"
        hint = next((slip.hint for slip in self.slips if self._same(answer, slip.answer)), self.fallback)
        return False, f"not yet. {hint}"

    def _same(self, given: Any, wanted: Any) -> bool:
        try:
            return bool(self.agrees(given, wanted))
        except Exception:  # a reader's function may raise anything; then it is simply not the same
            return False


def close(given: Any, wanted: Any) -> bool:
    """Whether two numbers agree to half a per cent, so that an answer may be rounded to three digits."""
    return abs(float(given) - float(wanted)) <= 5e-3 * abs(float(wanted))


def same_number(given: Any, wanted: float) -> bool:
    """Whether two numbers are equal, however they are written: 9, 9.0 and "9" are one number."""
    return float(given) == float(wanted)


def same_letter(given: Any, wanted: str) -> bool:
    """Whether an answer is the wanted letter, in either case."""
    return str(given).strip().lower() == wanted


def find(number: str) -> Exercise:
    """Return an exercise by its number, "NN.k". Raises ValueError for one that does not exist."""
    number = _spelled(number)
    notebook = number.partition(".")[0]
    try:
        exercises = importlib.import_module(f".nb{notebook}", __name__).EXERCISES
    except ModuleNotFoundError:
        exercises = {}
    if number not in exercises:
        known = ", ".join(exercises) or "none: there is no such notebook"
        raise ValueError(f"there is no exercise {number!r}; notebook {notebook} has {known}")
    return exercises[number]


def _spelled(number: Any) -> str:
    """Return the number as exercises are named: 11.2 and " 11.2" are "11.2", 00.1 (to Python 0.1) is "00.1"."""
    notebook, point, which = str(number).strip().partition(".")
    return f"{notebook.zfill(2)}{point}{which}"


def check(number: str, answer: Any = ...) -> None:
    """Print what is to be said about an answer to exercise `number`, for example `lab.check("00.1", 70_272)`."""
    print(f"Exercise {_spelled(number)} {find(number).verdict(answer)[1]}")
