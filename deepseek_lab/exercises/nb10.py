"""Exercises of notebook 10, balancing experts."""

from __future__ import annotations

from math import comb

from . import Exercise, Slip, close, same_number


def _numbers(answer) -> list[float]:
    """An answer as a list of numbers: a list, a tuple or a tensor."""
    return [float(value) for value in answer]


def _same_list(given, wanted) -> bool:
    ours, theirs = _numbers(given), _numbers(wanted)
    return len(ours) == len(theirs) and all(abs(a - b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def _kind(scores) -> str:
    """What is to be said about scores [token, 2] as an answer to 10.4; a tensor or a list of rows."""
    rows = [_numbers(row) for row in scores]
    if not rows or any(len(row) != 2 for row in rows):
        return "shape"
    if not all(0 <= score <= 1 for row in rows for score in row) or not all(sum(row) for row in rows):
        return "range"
    if any(row[0] == row[1] for row in rows):
        return "tie"
    chosen = [sum(row[i] > row[1 - i] for row in rows) for i in range(2)]
    mean = [sum(row[i] / sum(row) for row in rows) / len(rows) for i in range(2)]
    loss = sum(2 * c / len(rows) * m for c, m in zip(chosen, mean, strict=True))
    return "below" if loss < 1 - 1e-6 else "one" if loss < 1 + 1e-6 else "above"


EXERCISES = {
    "10.1": Exercise(
        todo="Give the four biases after the step as a list.",
        solution=[-0.001, 0, 0.001, 0],
        praise="Only the sign counts: seven tokens would have moved it as far as nine, and the mean moves nothing.",
        agrees=_same_list,
        slips=(
            Slip([0.001, 0, -0.001, 0], "The other way round: what is too busy must become less attractive."),
            Slip([-0.003, 0, 0.003, 0], "With the sign rule it does not matter how far a load is from the mean."),
            Slip([-0.0005, 0, 0.0005, 0], "That is the proportional rule; here only the sign counts."),
            Slip([-0.001, -0.001, 0.001, -0.001], "The mean is 6, and sign(0) is 0: those at the mean stay."),
            Slip([-0.001, 0.001, 0.001, 0.001], "The mean is 6, and sign(0) is 0: those at the mean stay."),
        ),
        fallback="The mean load is 6. Above it a bias falls by 0.001, below it it rises by 0.001, at it it stays.",
    ),
    "10.2": Exercise(
        todo="After how many steps do the two stand equal? Give a whole number.",
        solution=150,
        praise="Both biases move, so the gap closes by 2 u a step, however unequal the loads are.",
        agrees=same_number,
        slips=(
            Slip(300, "One bias goes down while the other goes up: the gap closes by 0.002 a step."),
            Slip(750, "The gap is 0.75 - 0.45, not the whole score."),
            Slip(375, "The gap is 0.75 - 0.45, not the whole score."),
            Slip(225, "Half of 0.45 is not the gap: it is 0.75 - 0.45."),
            Slip(15, "u is 0.001: the gap of 0.30 closes by 0.002 a step."),
        ),
        fallback="The gap of 0.30 closes by twice the update speed in each step.",
    ),
    "10.3": Exercise(
        todo="On how many nodes on average? Give a number such as 1.23.",
        solution=4 * (1 - comb(12, 4) / comb(16, 4)),
        praise="Four nodes, each missed with probability 495/1820; the limit of two nodes takes off nearly a third.",
        agrees=close,
        slips=(
            Slip(
                4 * (1 - 0.75**4), "Nearly: four *different* experts. After one miss only 15 experts are left to draw."
            ),
            Slip(4 * comb(12, 4) / comb(16, 4), "That many nodes are missed; how many are met?"),
            Slip(1 - comb(12, 4) / comb(16, 4), "That is the chance of one node to be met; there are four."),
            Slip(2, "That is what the limit allows. Without it?"),
            Slip(4, "Sometimes two experts share a node, so it is fewer than four on average."),
        ),
        fallback="A node is missed if all four experts are among the 12 of the others: C(12, 4) / C(16, 4).",
    ),
    "10.4": Exercise(
        todo="Give scores as a list of pairs, one for each token, such as [(0.8, 0.2), (0.3, 0.7)].",
        solution=[(0.55, 0.45), (0.55, 0.45), (0.55, 0.45), (0.05, 0.95)],
        praise="One expert wins often and barely, the other seldom and clearly. 1 is balance, not the least value.",
        agrees=lambda given, wanted: _kind(given) == _kind(wanted),
        slips=(
            Slip(
                [(0.8, 0.2), (0.2, 0.8)],
                "That is balance, and exactly 1. Let an expert that is chosen often win barely.",
            ),
            Slip(
                [(0.8, 0.2), (0.7, 0.3)],
                "Above 1: the busy expert has the higher scores too. How can it have lower ones?",
            ),
            Slip([(0.8, 0.8), (0.2, 0.8)], "Two equal scores leave open who is chosen; make them different."),
            Slip([(2.0, -1.0), (0.2, 0.8)], "A score lies between 0 and 1, and a token's two scores are not both 0."),
            Slip([(0.8, 0.1, 0.1)], "Two experts: two scores for each token."),
        ),
        fallback="A list of pairs of scores between 0 and 1, one pair for each token.",
    ),
    "10.5": Exercise(
        todo='Which check fails for the leak, which for the loss, which for the sign? Three letters, as in "abc".',
        solution="bca",
        praise="The leak trains and balances like the right one: only the output of one token gives it away.",
        agrees=lambda given, wanted: "".join(filter(str.isalpha, str(given).lower())) == wanted,
        slips=(
            Slip("cba", "The loss that is never added plays no part in check b, which trains nothing."),
            Slip("acb", "The leak balances perfectly well: biases still choose. What do they do besides?"),
            Slip("bac", "Check a trains with the bias alone: a loss plays no part in it."),
            Slip("abc", "The leak balances perfectly well: biases still choose. What do they do besides?"),
            Slip("cab", "The gate has a gradient with and without the leak. Where does the leak show?"),
            Slip(
                "bcb",
                "The wrong sign chooses badly, but it says nothing wrong. Which check lets it choose for a while?",
            ),
        ),
        fallback='Answer with three letters of "a", "b" and "c": for the leak, the loss, the sign.',
    ),
}
