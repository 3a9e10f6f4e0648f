"""Exercises of notebook 02, block scaling."""

from __future__ import annotations

from . import Exercise, Slip, close, same_letter, same_number


def _column_scales(x):
    return x.unflatten(0, (-1, 128)).abs().amax(1).clamp(min=1e-4) / 448


def _row_scales(x):
    return x.unflatten(1, (-1, 128)).abs().amax(2).clamp(min=1e-4) / 448


def _without_sizes(x):
    return x.unflatten(0, (-1, 128)).amax(1).clamp(min=1e-4) / 448


def _without_floor(x):
    return x.unflatten(0, (-1, 128)).abs().amax(1) / 448


def _floor_on_the_scale(x):
    return (x.unflatten(0, (-1, 128)).abs().amax(1) / 448).clamp(min=1e-4)


def _upside_down(x):
    return 1 / _column_scales(x)


def _same_scales(given, wanted) -> bool:
    """Whether two functions give the same scales; one column is small, one zero, one negative."""
    import torch

    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, 1], x[:, 2] = 1e-3 * x[:, 0], 0.0, -x[:, 2].abs()
    ours, theirs = wanted(x), torch.as_tensor(given(x.clone()))
    return theirs.shape == ours.shape and torch.allclose(theirs.float(), ours, rtol=1e-6, atol=0)


EXERCISES = {
    "02.1": Exercise(
        todo="The largest size in a tile is 3.5. What is its FP32 scale?",
        solution=3.5 / 448,
        agrees=close,
        praise="3.5 / 448 = 0.0078125: codes times this give the numbers back.",
        slips=(
            Slip(128, "That is the inverse. A scale is what numbers are divided by: 3.5 / scale should be 448."),
            Slip(3.5 / 240, "240 is where E4M3 would end if it kept codes for infinity. It ends at 448."),
            Slip(3.5 / 57_344, "57,344 is the largest number of E5M2. Tiles here are in E4M3."),
            Slip(3.5, "Divided by 3.5, the largest number becomes 1. It should become 448."),
        ),
        fallback="The largest size divided by the scale should be the largest number of E4M3.",
    ),
    "02.2": Exercise(
        todo="How many bytes do codes and FP32 scales of 1,000 x 2,048 values take in 128 x 128 blocks?",
        solution=1000 * 2048 + 8 * 16 * 4,
        agrees=same_number,
        praise="2,048,000 codes and 8 x 16 scales of four bytes: the ragged eighth row of blocks has scales too.",
        slips=(
            Slip(1000 * 2048, "Those are the codes. Each block has a scale of four bytes beside them."),
            Slip(1000 * 2048 + 7 * 16 * 4, "1,000 / 128 is 7.8: the ragged rest needs scales too. Round up."),
            Slip(1000 * 2048 + 8 * 16, "A scale is an FP32 number: four bytes, not one."),
            Slip(1000 * 2048 + 500, "1,000 / 128 is 7.8, and there is no 0.8 of a block: round up."),
            Slip(1000 * 2048 + 1000 * 16 * 4, "Those are 1 x 128 tiles. A block shares its scale among 128 rows too."),
            Slip(1024 * 2048 + 8 * 16 * 4, "The file holds no padding: 1,000 rows of codes, not 1,024."),
        ),
        fallback="One byte per value, and four for each block. How many blocks down, how many across?",
    ),
    "02.3": Exercise(
        todo="Write a function of x [token, channel] that returns the scales of its 128 x 1 tiles.",
        solution=_column_scales,
        praise="The axis that is summed over is the axis that is cut: here the tokens.",
        agrees=_same_scales,
        slips=(
            Slip(_row_scales, "Those are 1 x 128 tiles, along the channels. Cut the other axis, the tokens."),
            Slip(_without_sizes, "A tile of negative numbers has a size too: take absolute values first."),
            Slip(_without_floor, "A tile of zeros gets the scale 0, and 0/0 is NaN: the largest is at least 0.0001."),
            Slip(_floor_on_the_scale, "The floor belongs to the largest size, before it is divided by 448."),
            Slip(_upside_down, "That is 448 / largest. The scale is what codes are multiplied by: largest / 448."),
        ),
        fallback="Cut the tokens into groups of 128, unflatten(0, (-1, 128)); the result is [token / 128, channel].",
    ),
    "02.4": Exercise(
        todo="Up to how many times as large may an outlier be in E5M2?",
        solution=57_344 * 2**14,
        agrees=close,
        praise="939,524,096: the range of E5M2 is the square of that of E4M3, and more.",
        slips=(
            Slip(28_672, "That is E4M3. E5M2 reaches from 57,344 down to 2 to the power of -14."),
            Slip(57_344 * 2**16, "2 to the power of -16 is subnormal: there a number has one bit left."),
            Slip(57_344, "Divide by the smallest normal number, not by 1."),
        ),
        fallback="Largest number over smallest normal number.",
    ),
    "02.5": Exercise(
        todo='Which one check would have caught both mistakes? Answer "a", "b" or "c".',
        solution="b",
        praise="The case that a repair is made for is the first test it needs.",
        agrees=same_letter,
        slips=(
            Slip("a", "A random tile has a largest number above 0: the first release quantises it correctly."),
            Slip("c", "Too large values were clamped, and NaN > 448 is false: neither is caught."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
    ),
}
