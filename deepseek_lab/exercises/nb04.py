"""Exercises of notebook 04, training in FP8."""

from __future__ import annotations

from . import Exercise, Slip, close, same_letter, same_number


def _weight_gradient(dy, x8):
    from ..precision import quantize_tiles

    along_tokens = quantize_tiles(x8.dequantize(), axis=-2).dequantize()
    return quantize_tiles(dy, axis=-2).dequantize().T @ along_tokens


def _tiles_of_the_forward_pass(dy, x8):
    return _with_axes(dy, x8, -1, None)


def _x_as_it_was_kept(dy, x8):
    return _with_axes(dy, x8, -2, None)


def _dy_along_the_channels(dy, x8):
    return _with_axes(dy, x8, -1, -2)


def _transposed(dy, x8):
    return _weight_gradient(dy, x8).T


def _not_rounded(dy, x8):
    return dy.T @ x8.dequantize()


def _with_axes(dy, x8, of_dy, of_x):
    from ..precision import quantize_tiles

    x = x8.dequantize()
    x = x if of_x is None else quantize_tiles(x, axis=of_x).dequantize()
    return quantize_tiles(dy, axis=of_dy).dequantize().T @ x


def _same_gradient(given, wanted) -> bool:
    """Whether two functions give one weight gradient; tokens and channels differ in size, so that axes matter."""
    import torch

    from ..precision import quantize_tiles

    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(192, width, generator=generator) for width in (160, 144))
    dy[::5], x[::3], x[:, 7] = 40 * dy[::5], 25 * x[::3], 60 * x[:, 7]
    ours, theirs = wanted(dy, quantize_tiles(x)), torch.as_tensor(given(dy.clone(), quantize_tiles(x)))
    return theirs.shape == ours.shape and torch.allclose(theirs.float(), ours, rtol=1e-4, atol=1e-2)


EXERCISES = {
    "04.1": Exercise(
        todo="How many bytes do the codes and scales of 4,096 tokens of 7,168 channels take in 1 x 128 tiles?",
        solution=4096 * 7168 + 4096 * 56 * 4,
        agrees=same_number,
        praise="29,360,128 codes and 56 scales of 4 bytes for each token: 30.3 MB, where FP32 would keep 117.4 MB.",
        slips=(
            Slip(4096 * 7168, "Those are the codes. Each tile of 128 has a scale too."),
            Slip(4096 * 7168 + 4096 * 56, "There are 56 scales for each token, but a scale is FP32: four bytes."),
            Slip(
                4096 * 7168 + 32 * 56 * 4, "That is a scale for each 128 x 128 block, as weights have. Here: 1 x 128."
            ),
            Slip(4096 * 7168 * 2, "That is BF16 without scales. A code has one byte."),
            Slip(4096 * 7168 * 4, "That is FP32, as a plain layer keeps it."),
        ),
        fallback="Tokens times channels is the number of codes, one byte each; then a scale for each 128 of a token.",
    ),
    "04.2": Exercise(
        todo="Write a function of dy [token, out] and x8 (1 x 128 tiles) that returns the gradient [out, in].",
        solution=_weight_gradient,
        agrees=_same_gradient,
        praise="The sum runs over the tokens, so both operands carry their scales along the tokens.",
        slips=(
            Slip(_tiles_of_the_forward_pass, "Both operands have tiles along the channels. Over which axis is summed?"),
            Slip(_x_as_it_was_kept, "dy is right, but x still has the 1 x 128 tiles of the forward pass."),
            Slip(_dy_along_the_channels, "x is right, but the tiles of dy run along the outputs, as for dx."),
            Slip(_transposed, "The numbers are right, but the gradient has the shape of the weight: [out, in]."),
            Slip(_not_rounded, "That is the product of the wide numbers. Both operands have to become narrow first."),
        ),
        fallback="Dequantise x8, quantise it again with quantize_tiles(…, axis=-2), dy likewise, then dy.T @ x.",
    ),
    "04.3": Exercise(
        todo="Bytes per parameter while DeepSeek-V3 trains: master weight, gradient, two moments, FP8 weight?",
        solution=4 + 4 + 2 + 2 + 1,
        agrees=same_number,
        praise="4 + 4 + 2 + 2 + 1 = 13; with BF16 weights and FP32 moments it would be 4 + 4 + 4 + 4 + 2 = 18.",
        slips=(
            Slip(12, "You left out the FP8 copy that the products read: one byte more."),
            Slip(18, "That is the usual recipe: moments in FP32 and a BF16 weight. V3's moments are BF16."),
            Slip(17, "The two moments are in BF16 here, two bytes each."),
            Slip(
                16, "That is what our own runs keep. V3's moments are BF16, and it has an FP8 weight beside the master."
            ),
            Slip(9, "Adam has two moments for each weight, and the master weight stays in FP32."),
        ),
        fallback="FP32 has 4 bytes, BF16 2, FP8 1: master 4, gradient 4, then two moments and the FP8 weight.",
    ),
    "04.4": Exercise(
        todo="A weight is 0.05 and stored in BF16. Below which size is an update lost?",
        solution=2.0**-13,
        agrees=close,
        praise="0.05 lies between 2^-5 and 2^-4, where BF16 steps by 2^-12; less than half a step is rounded away.",
        slips=(
            Slip(2.0**-12, "That is the step of BF16 there. An update of more than half of it already rounds up."),
            Slip(2.0**-8, "That is half a step between 1 and 2. 0.05 lies between 2^-5 and 2^-4."),
            Slip(2.0**-9, "That is half a step just below 1. 0.05 lies between 2^-5 and 2^-4."),
            Slip(2.0**-14, "That is half a step below 2^-5. 0.05 is above it: 2^-5 is 0.03125."),
            Slip(0.05 * 2.0**-8, "Steps do not grow with every number, only from one power of two to the next."),
        ),
        fallback="Find the power of two below 0.05; a step of BF16 is 1/128 of that, and half of it decides.",
    ),
    "04.5": Exercise(
        todo='Which check catches the rule that does not arrive? Answer "a", "b" or "c".',
        solution="c",
        praise="Ask the numbers themselves whether they keep the rule: results that look alike say nothing about it.",
        slips=(
            Slip("a", "Both kinds of scale are right to a few per cent, so the loss hardly sees which one was used."),
            Slip("b", "Nothing in the stored file changes: scales of activations are made anew in every step."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
