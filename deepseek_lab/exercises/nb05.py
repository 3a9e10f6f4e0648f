"""Exercises of notebook 05, prefill and decode."""

from __future__ import annotations

import math

from . import Exercise, Slip, close, same_letter

_EXP = [math.exp(score) for score in (1, 0, 1, 2)]
_ROOM = 24_000_000_000 - 16_060_522_496
_TOKEN = 32 * 8 * (128 + 128) * 2  # bytes that a token of Llama 3.1 8B leaves in BF16


def _visible(new, total, shift=0):
    import torch

    return torch.ones(new, total, dtype=torch.bool).tril(total - new + shift)


def _from_the_top_left(new, total):
    import torch

    return torch.ones(new, total, dtype=torch.bool).tril()


def _hidden(new, total):
    return ~_visible(new, total)


def _not_itself(new, total):
    return _visible(new, total, shift=-1)


def _everything(new, total):
    return _visible(new, total, shift=total)


def _near(given, wanted) -> bool:
    """Whether two numbers agree to the one decimal that section 1 prints."""
    return abs(float(given) - float(wanted)) <= 0.05


def _same_mask(given, wanted) -> bool:
    """Whether two functions make the same boolean masks for several sizes."""
    import torch

    pairs = [(given(n, t), wanted(n, t)) for n, t in ((1, 1), (1, 7), (3, 7), (6, 7), (5, 5))]
    return all(a.dtype == torch.bool and torch.equal(a, b) for a, b in pairs)


EXERCISES = {
    "05.1": Exercise(
        todo="Work out the first number of the fourth token's result by hand.",
        solution=10 * (_EXP[0] + _EXP[2]) / sum(_EXP),
        praise="Its own value is (0, 0), yet its own key takes more than half of the weight.",
        agrees=_near,
        slips=(
            Slip(10 * 2 * math.e / (2 * math.e + 1), "A token looks at itself too: the fourth score is 2."),
            Slip(
                10 * 2 * math.exp(2) / (2 * math.exp(2) + 1 + math.exp(4)),
                "The scores have still to be divided by the root of the width, 2.",
            ),
            Slip(20 * math.e, "The weights have to add up to 1: divide by the sum of all four exponentials."),
            Slip(10 * 2 / 4, "Those are the scores as weights. Softmax takes their exponentials first."),
        ),
        fallback="Scores 1, 0, 1 and 2; exponentials; divide by their sum; then the mean of 10, 0, 10 and 0.",
    ),
    "05.2": Exercise(
        todo="How many tokens of cache does the card hold beside the weights? Give the number.",
        solution=_ROOM / _TOKEN,
        praise="131,072 bytes a token: a third of the card holds less than half of what the model could read.",
        agrees=close,
        slips=(
            Slip(24e9 / _TOKEN, "The weights lie on the card as well; only what they leave is for the cache."),
            Slip((24 * 2**30 - 16_060_522_496) / _TOKEN, "That is 24 GiB. The card has 24 GB, 24,000,000,000 bytes."),
            Slip(2 * _ROOM / _TOKEN, "Twice too many: there are keys and values, and a number takes two bytes."),
            Slip(_ROOM / _TOKEN / 4, "The cache holds 8 keys and values per token and layer, not one per query head."),
            Slip(_ROOM / _TOKEN / 2, "Half of it: in BF16 a number takes two bytes, not four."),
            Slip(32 * _ROOM / _TOKEN, "All 32 layers have a cache of their own."),
        ),
        fallback="Bytes per token: layers times 8 times (128 + 128) times 2. Divide what the weights leave by them.",
    ),
    "05.3": Exercise(
        todo="What is the intensity of absorbed MLA with 656 bytes a token and layer? Give FLOP per byte.",
        solution=278_528 / 656,
        praise="Right of the ridge at 295: arithmetic is the limit, and fewer bytes would save room but no time.",
        agrees=close,
        slips=(
            Slip(278_528 / 1_152, "That is the cache in BF16. In FP8 the same operations need 656 bytes."),
            Slip(278_528 / 576, "A byte for each number: but scales, and a rope key in BF16, are read too. 656 bytes."),
            Slip(656 / 278_528, "Upside down: FLOP for each byte."),
            Slip(81_920 / 656, "Those are the operations of expanded attention. Absorbed are 278,528."),
        ),
        fallback="The operations stay at 278,528 for a cached token; divide them by the bytes that are read for it.",
    ),
    "05.4": Exercise(
        todo="Write a function of new and total that returns a boolean mask [new, total].",
        solution=_visible,
        praise="One row of ones for one new token: the whole past, and itself.",
        slips=(
            Slip(_from_the_top_left, "Row 0 is not token 0: the new tokens are the last ones. Shift the diagonal."),
            Slip(_hidden, "The other way round: true where a token may look."),
            Slip(_not_itself, "A token may look at itself too: one diagonal more."),
            Slip(_everything, "Several new tokens must not see those of them that come later."),
        ),
        fallback="Row i is token total - new + i and may look at the tokens 0 to total - new + i. Return torch.bool.",
        agrees=_same_mask,
    ),
    "05.5": Exercise(
        todo='Which check catches the careless attention? Answer "a", "b" or "c".',
        solution="c",
        praise="Whatever reads in one piece is right. Only a step that has a past in the cache shows it.",
        slips=(
            Slip("a", "In one piece the mask is a square, and there top left and bottom right agree."),
            Slip("b", "24 tokens into an empty cache: the mask is a square again."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
