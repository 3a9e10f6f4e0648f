"""Exercises of notebook 11, assemble the model."""

from __future__ import annotations

import math

from . import Exercise, Slip, close, same_letter, same_number


def _turned(pair, angle):
    import torch

    x, y = pair
    return torch.stack([x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)])


def _same_turn(given, wanted) -> bool:
    """Whether two functions turn several points by several angles alike."""
    import torch

    points = torch.tensor([[1.0, 0.0], [0.3, -2.0], [-1.5, 0.7]])
    pairs = [(point, angle) for point in points for angle in (0.4, -1.1, 2.5)]
    return all(torch.allclose(torch.as_tensor(given(*pair)), wanted(*pair), atol=1e-5) for pair in pairs)


def _by_degrees(pair, angle):
    return _turned(pair, -math.radians(angle))


def _swapped(pair, angle):
    return _turned(pair, -angle).flip(0)


EXERCISES = {
    "11.1": Exercise(
        todo="Write a function of a pair and an angle that undoes `turn`.",
        solution=lambda pair, angle: _turned(pair, -angle),
        praise="Turning back is turning by minus the angle: the inverse of a rotation costs nothing.",
        slips=(
            Slip(_turned, "That turns further in the same direction. Which angle brings the point back?"),
            Slip(_swapped, "The angle is right, but the two values come back in the wrong order."),
            Slip(_by_degrees, "`turn` takes radians, as math.cos does; no conversion is needed."),
        ),
        fallback="Check it on (1, 0) and a quarter turn: turn_back(turn(p, a), a) should be p again.",
        agrees=_same_turn,
    ),
    "11.2": Exercise(
        todo="How many parameters has one routed expert of DeepSeek-V3?",
        solution=3 * 7168 * 2048,
        praise="Three matrices of 7168 x 2048: 44,040,192, and DeepSeek-V3 has 256 of them in each of 58 layers.",
        agrees=same_number,
        slips=(
            Slip(2 * 7168 * 2048, "That is a plain two-matrix network. SwiGLU has a gate beside up and down."),
            Slip(7168 * 2048, "That is one matrix; an expert has three: gate, up and down."),
            Slip(3 * 7168 * 18432, "18432 is the width of the dense layers. An expert is 2048 wide."),
        ),
        fallback="Count its matrices (gate, up, down) and multiply by the size of one.",
    ),
    "11.3": Exercise(
        todo="Which three experts are chosen? Answer with a set such as {1, 2, 3}.",
        solution={0, 1, 4},
        praise="Groups 0 and 2 stay, and expert 1 with its -0.1 is the third best inside them.",
        slips=(
            Slip({0, 4, 5}, "Both are below zero, but -0.1 is more than -0.2: compare experts 1 and 5 again."),
            Slip({0, 4, 2}, "Expert 2 is in group 1, which was dropped. Did you skip the groups, or fill with 0?"),
            Slip({0, 4, 3}, "Expert 3 is in group 1, which was dropped. Did you fill dropped experts with 0?"),
            Slip({0, 4, 6}, "Expert 6 is in group 3, which was dropped. Did you fill dropped experts with 0?"),
            Slip({0, 4, 7}, "Expert 7 is in group 3, which was dropped. Did you fill dropped experts with 0?"),
        ),
        fallback="Add the two scores of each group, keep the two best groups, then take the best three experts.",
        agrees=lambda given, wanted: set(given) == wanted,
    ),
    "11.4": Exercise(
        todo="How many times smaller is V2-Lite's latent cache than an expanded one?",
        solution=16 * (192 + 128) / (512 + 64),
        praise="5,120 values against 576: 8.9 times. With V3's 128 heads the same latent saves 71 times.",
        slips=(
            Slip(71.1, "That is DeepSeek-V3 with 128 heads. V2-Lite has 16."),
            Slip(16 * (192 + 128) / 512, "The rope key is cached too: 512 + 64 values."),
            Slip(16 * 2 * 128 / (512 + 64), "A key has 128 values without and 64 with position: 192 in all."),
            Slip((512 + 64) / (16 * (192 + 128)), "That is the inverse: how large the latent cache is, not how small."),
            Slip(0.11, "That is the inverse: how large the latent cache is, not how small."),
        ),
        fallback="Expanded: heads x (key width + value width). Latent: latent + rope key. Divide.",
        agrees=close,
    ),
    "11.5": Exercise(
        todo='Which check catches the leaky router? Answer "a", "b" or "c".',
        solution="c",
        praise="What only chooses must not count: if the bias moves and the choice does not, nothing else may move.",
        slips=(
            Slip("a", "The leaky weights are normalised too, so they add up to the scale as well."),
            Slip("b", "The leaky router chooses exactly the same experts. What differs is how much they count."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
