"""Exercises of notebook 07, latent attention."""

from __future__ import annotations

from . import Exercise, Slip, same_number


def _merge(w_uq, w_uk):
    """The matrices that make absorbed queries from the query latent: [head, latent, query latent]."""
    return w_uk.mT @ w_uq


def _merge_turned_round(w_uq, w_uk):
    return w_uq.mT @ w_uk


def _merge_heads_added(w_uq, w_uk):
    return (w_uk.mT @ w_uq).sum(0)


def _merge_first_head(w_uq, w_uk):
    return w_uk[0].T @ w_uq


def _same_merge(given, wanted) -> bool:
    """Whether two functions merge random matrices of several heads alike."""
    import torch

    generator = torch.Generator().manual_seed(7)
    for heads, key, query_latent, latent in ((3, 4, 7, 5), (2, 6, 6, 6)):
        w_uq = torch.randn(heads, key, query_latent, generator=generator)
        w_uk = torch.randn(heads, key, latent, generator=generator)
        ours, theirs = given(w_uq, w_uk), wanted(w_uq, w_uk)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
            return False
    return True


def _same_letters(given, wanted) -> bool:
    """Whether the letters are the same, in either case and however set apart: "acc", "A, C, C", ["a", "c", "c"]."""
    return "".join(filter(str.isalpha, str(given).lower())) == wanted


EXERCISES = {
    "07.1": Exercise(
        todo="How many bytes does a token leave in the cache of DeepSeek-V2? Give a whole number.",
        solution=60 * (512 + 64) * 2,
        praise="576 numbers in each of 60 layers, two bytes each; the number of heads plays no part.",
        agrees=same_number,
        slips=(
            Slip(60 * (512 + 512) * 2, "One latent serves keys and values, so it is kept once; and mind the rope key."),
            Slip(60 * (512 + 64) * 2 * 2, "One latent serves keys and values: 576 numbers a layer, not twice 576."),
            Slip(60 * 512 * 2, "The rope key is cached beside the latent: 64 numbers more."),
            Slip(60 * (512 + 64), "Those are numbers; BF16 takes two bytes for each."),
            Slip((512 + 64) * 2, "That is one layer; there are 60."),
            Slip(60 * (512 + 128 * 64) * 2, "All heads share one rope key: 64 numbers, not 128 times 64."),
        ),
        fallback="Layers times (latent + rope key) times two bytes.",
    ),
    "07.2": Exercise(
        todo="Which multiple should stand in place of the misprint? Give it with two decimals.",
        solution=516_096 / 70_272,
        praise="516.096 / 70.272: the sizes in print are right, one quotient of them is not.",
        agrees=lambda given, wanted: abs(float(given) - wanted) < 0.005,
        slips=(
            Slip(7.28, "That is what is printed. Divide 516.096 by 70.272."),
            Slip(4.66, "4.66 is right: 327.680 / 70.272 = 4.663. Look at the other one."),
            Slip(516_096 / 327_680, "That compares Llama with Qwen; the table counts in multiples of DeepSeek-V3."),
            Slip(4_997_120 / 70_272, "That is the expanded cache, which is not in the printed table."),
        ),
        fallback="Divide each size by DeepSeek-V3's and compare with the third column.",
    ),
    "07.3": Exercise(
        todo="At how many new tokens do making keys and values and absorbing cost the same? Give a whole number.",
        solution=4096 / (144 - 80),
        praise="4,096 for each cached token against 64 for each pair of tokens. The number of heads cancels.",
        agrees=same_number,
        slips=(
            Slip(171, "That is DeepSeek-V3. Put in the small model's widths."),
            Slip(170, "That is DeepSeek-V3. Put in the small model's widths."),
            Slip(65, "With 65 making keys is already cheaper. Where exactly do the two meet?"),
            Slip(28, "Whole keys and values have to be read too: only the difference, 144 - 80, is saved."),
            Slip(51, "Absorbed attention costs too: divide by the difference, 144 - 80, not by 80."),
            Slip(32, "A key for each cached token is 32 wide, but a value of 32 is made as well: 64 x 64."),
            Slip(128, "The rope key is part of what absorbed scores read: 64 + 16, and 64 for the average."),
        ),
        fallback="For one head: latent x (key + value) made once, against what absorbing costs more for each pair.",
    ),
    "07.4": Exercise(
        todo="Write a function of w_uq [head, key, query latent] and w_uk [head, key, latent].",
        solution=_merge,
        praise="Three times as many numbers as the two that it replaces: released code keeps the two.",
        agrees=_same_merge,
        slips=(
            Slip(
                _merge_turned_round,
                "That is the transposed matrix: a latent must come out, so its axis stands first.",
            ),
            Slip(_merge_heads_added, "Each head has a matrix of its own: keep the head axis."),
            Slip(_merge_first_head, "You used one head's w_uk for all of them."),
        ),
        fallback="The absorbed query is w_uk transposed times (w_uq times the query latent). Move the brackets.",
    ),
    "07.5": Exercise(
        todo="Which check fails for the split scale, for the rope keys of all heads, for the cache of keys? "
        'Answer with three letters, as in "abc".',
        solution="acc",
        praise="A wrong number needs a comparison, a wasted byte needs counting. Neither finds the other.",
        agrees=_same_letters,
        slips=(
            Slip("ac", "There are three programs: give three letters."),
            Slip("caa", "The other way round: the split scale changes the output, the other two change the bytes."),
            Slip("aac", "Eight equal rope keys say what one says, so the output is right. What is there eight times?"),
            Slip("aca", "The cache of keys computes the right output. What is wrong with it, then?"),
            Slip("bcc", "The split scale is wrong in the same way with and without a cache. What does it differ from?"),
            Slip("acb", "Cached keys give exactly what keys made again give. What does this cache have too much of?"),
            Slip("ccc", "The split scale keeps the same memory as ours. What does it compute with it?"),
        ),
        fallback='Three letters of "a", "b" and "c": the split scale, the rope keys of all heads, the cache of keys.',
    ),
}
