"""Exercises of notebook 06, sharing heads."""

from __future__ import annotations

from . import Exercise, Slip, close, same_letter, same_number


def _share(keys, heads):
    return keys.repeat_interleave(heads // keys.shape[1], dim=1)


def _dealt_out(keys, heads):
    return keys.repeat(1, heads // keys.shape[1], 1, 1)


def _along_tokens(keys, heads):
    return keys.repeat_interleave(heads // keys.shape[1], dim=2)


def _too_many(keys, heads):
    return keys.repeat_interleave(heads, dim=1)


def _same_shares(given, wanted) -> bool:
    """Whether two functions hand out keys alike, for MHA, GQA and MQA."""
    import torch

    generator = torch.Generator().manual_seed(6)
    for heads, groups in ((8, 2), (6, 3), (4, 1), (4, 4)):
        keys = torch.randn(2, groups, 5, 3, generator=generator)
        if not torch.equal(given(keys, heads), wanted(keys, heads)):
            return False
    return True


EXERCISES = {
    "06.1": Exercise(
        todo="How many groups of GQA keep 576 numbers per token and layer?",
        solution=576 / (2 * 128),
        praise="2.25 groups for 128 heads, where GQA models have 8.",
        agrees=close,
        slips=(
            Slip(576 / 128, "A group keeps a key and a value, both of 128 numbers."),
            Slip(
                2, "576 is a little more than two groups keep: 512 of the latent and 64 of the rope key. Do not round."
            ),
            Slip(128 * 256 / 576, "That is how many times less than MHA with 128 heads. How many groups keep 576?"),
        ),
        fallback="One group keeps 2 times 128 numbers per token and layer.",
    ),
    "06.2": Exercise(
        todo="Which key does query head 13 look at? Give its number, counted from 0.",
        solution=13 // (32 // 8),
        praise="Neighbours share: heads 12 to 15 look at key 3.",
        agrees=same_number,
        slips=(
            Slip(13 % 8, "That deals the keys out like cards. Neighbours share: heads 0 to 3 look at key 0."),
            Slip(13 // 8, "8 is the number of keys. Divide by how many heads share one."),
            Slip(4, "Counted from 0: heads 0 to 3 look at key 0."),
            Slip(13, "Head 13 has a query of its own, but there are only keys 0 to 7."),
        ),
        fallback="How many heads share a key? Count them off from head 0.",
    ),
    "06.3": Exercise(
        todo="Write a function of keys [text, group, token, width] and heads that gives each head its key.",
        solution=_share,
        praise="Neighbours get the same key. Never cache the result: it is as large as if nothing were shared.",
        slips=(
            Slip(_dealt_out, "Right shape, wrong keys: 0, 1, 0, 1. Neighbours share: 0, 0, 1, 1."),
            Slip(_along_tokens, "You repeated the tokens. The heads are dimension 1."),
            Slip(_too_many, "Too many: each key is repeated for the heads of its group, heads / groups of them."),
        ),
        fallback="Repeat each of the groups, dimension 1, heads / groups times in place.",
        agrees=_same_shares,
    ),
    "06.4": Exercise(
        todo="How many seeds for each of the two models?",
        solution=32,
        praise="Each digit more costs a hundred times as many runs.",
        agrees=close,  # the root of 2, squared again, is not quite 2
        slips=(
            Slip(16, "Both means are uncertain: the variance of their difference is the sum of both."),
            Slip(8, "The doubt falls with the root of the number of runs: the ratio is squared."),
            Slip(4, "The doubt falls with the root of the number of runs, and both means have one."),
            Slip(64, "64 runs in all. How many for each model?"),
        ),
        fallback="The difference of two means of n runs has the standard deviation 0.04 times the root of 2 / n.",
    ),
    "06.5": Exercise(
        todo='Which check catches the careless estimate? Answer "a", "b" or "c".',
        solution="c",
        praise="Predicted equals measured, for more than one setting: at 4 and 4 both meanings agree.",
        slips=(
            Slip("a", "16 / 4 = 4: there both meanings of the word give the same number. Compute it."),
            Slip("b", "With 2 and 4 the careless estimate is a half and a quarter of it: both smaller."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
