"""Exercises of notebook 13, multi-token prediction."""

from __future__ import annotations

import torch

from . import Exercise, Slip, close, same_letter


def _chances(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two distributions over five tokens, of the model and of its module."""
    return tuple(torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double().mul(1.5).softmax(-1))


EXERCISES = {
    "13.1": Exercise(
        todo="How many tokens does a pass write on average, if the first of two drafts is right with probability 0.9 "
        "and the second, where the first was right, with 0.7?",
        solution=1 + 0.9 + 0.9 * 0.7,
        agrees=close,
        praise="2.53: the model's own token is certain, and the second draft counts only where the first one stands.",
        slips=(
            Slip(1 + 0.9 + 0.7, "The second draft is looked at only where the first was right: 0.9 times 0.7."),
            Slip(0.9 + 0.9 * 0.7, "Those are the drafts. A pass also writes a token of the model's own, always."),
            Slip(1 + 0.9 * 0.7, "That counts passes with both drafts right. The first may stand alone."),
            Slip(1.9, "That is with one draft. How often does the second one stand as well?"),
        ),
        fallback="Add up: the model's own token, the first draft, and the second where the first is right too.",
    ),
    "13.2": Exercise(
        todo="Write a function accepted(p, q): how likely is it that a draft drawn from q is accepted by the model's "
        "p? Both are tensors [token] that sum to 1.",
        solution=lambda p, q: torch.minimum(p, q).sum(),
        praise="The sum of min(p, q) is what both distributions have in common: 1 if they are equal, 0 if nothing is.",
        slips=(
            Slip(
                lambda p, q: (p * q).sum(),
                "That is how often two separate draws would agree: with p = q it should be 1.",
            ),
            Slip(lambda p, q: (p / q).clamp(max=1).mean(), "The drafts are not equally likely: weigh each by q."),
            Slip(
                lambda p, q: (q * p / q.clamp(min=1e-9)).sum(),
                "Without the min every draft with p > q counts more than once: this is always 1.",
            ),
        ),
        fallback="A draft x comes with probability q[x] and is kept with min(1, p[x] / q[x]). Multiply, then add up.",
        agrees=lambda given, wanted: all(close(given(*_chances(s)), wanted(*_chances(s))) for s in range(4)),
    ),
    "13.3": Exercise(
        todo="The model's own loss is 1.2 on a sequence of 5 tokens; its one module's four losses add up to 6.0 nats. "
        "What is trained on, with weight 0.1?",
        solution=1.2 + 0.1 * 6.0 / 5,
        agrees=close,
        praise="1.32: the module's sum is divided by all 5 tokens, although it predicts only 4 of them.",
        slips=(
            Slip(
                1.2 + 0.1 * 6.0 / 4, "The report divides by T, the 5 tokens of the sequence, not by the 4 predictions."
            ),
            Slip(1.2 + 6.0 / 5, "The module's loss has a weight, 0.1 here."),
            Slip(1.2 + 0.1 * 6.0, "Divide the module's sum by the number of tokens first."),
            Slip(1.2 + 0.3 * 6.0 / 5, "0.3 was the weight of the first 10 T tokens. Here it is 0.1."),
        ),
        fallback="The model's loss, plus the weight times the module's sum over the number of tokens.",
    ),
    "13.4": Exercise(
        todo="A pass over two tokens takes 1.5 times as long as over one, a draft a quarter of a pass, and 80 % of the "
        "drafts are right. How many times faster is the text written?",
        solution=1.8 / 1.75,
        agrees=close,
        praise="1.03 times: 1.8 tokens for the price of 1.75. Acceptance alone says nothing about time.",
        slips=(
            Slip(1.8, "That is the tokens per pass. What does such a pass take, with its draft?"),
            Slip(1.8 / 1.5, "The draft takes time too: a quarter of a pass."),
            Slip(1.75 / 1.8, "That is the time per token. How many times faster is it?"),
            Slip(1.8 / 1.25, "The draft and the longer pass must both be paid."),
        ),
        fallback="Tokens per pass, divided by what a pass and its draft take in units of a plain pass.",
    ),
    "13.5": Exercise(
        todo='Which check catches the swapped halves of the projection? Reply "a", "b" or "c".',
        solution="c",
        agrees=same_letter,
        praise="The model corrects every bad guess, so the text stays right. Only the share of good guesses falls.",
        slips=(
            Slip("a", "Both halves are equally wide. Swapped, they still fit."),
            Slip("b", "The model checks every draft, so the text is right whatever the drafts are worth."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
    ),
}
