"""Exercises of notebook 11, assemble the model."""

from __future__ import annotations

import math

from . import Exercise, Slip, same_letter, same_number


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
        todo="How many numbers has V3's prediction module that the model does not have already?",
        solution=11_507_286_272 + 7168 * 14336 + 3 * 7168,
        praise="A whole layer, a projection and three norms: 11.6 B, 1.7 % of the model.",
        agrees=same_number,
        slips=(
            Slip(
                11_507_286_272,
                "That is its layer alone, as README_WEIGHTS.md counts. eh_proj and three norms are new too.",
            ),
            Slip(11_507_286_272 + 7168 * 14336, "Three norms are missing: enorm, hnorm and shared_head.norm."),
            Slip(11_507_286_272 + 7168 * 7168 + 3 * 7168, "eh_proj reads two vectors side by side: 7168 x (2 * 7168)."),
            Slip(13_463_426_304, "That is what the files hold: embedding and head stand there a second time."),
        ),
        fallback="Add up: a layer of experts, eh_proj of 7168 x 14336, and three norms of 7168.",
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
        agrees=lambda given, wanted: {int(expert) for expert in given} == wanted,
    ),
    "11.4": Exercise(
        todo="Which key of the config was not read? Answer with its name in quotes.",
        solution="first_k_dense_replace",
        praise="61 layers of experts instead of 58 make 703.8 B: the first three layers have one wide network each.",
        agrees=lambda given, wanted: str(given).strip() == wanted,
        slips=(
            Slip(
                "num_nextn_predict_layers",
                "With the prediction module it would be 682.6 B, or 684.5 B with its copies.",
            ),
            Slip("n_shared_experts", "Forgetting the shared experts makes the number smaller, not larger."),
            Slip("num_hidden_layers", "It did read the 61. But what is in each of them?"),
            Slip("moe_intermediate_size", "With experts as wide as the dense network it would be nine times as much."),
            Slip("tie_word_embeddings", "One table more or less is 0.9 B; the number is 32.8 B too large."),
        ),
        fallback="The number is 32.8 B too large, nearly three layers of experts. Which three layers are none?",
    ),
    "11.5": Exercise(
        todo='Which check catches the leaky router? Answer "a", "b" or "c".',
        solution="c",
        praise="What only chooses must not count: if the bias moves and the choice does not, nothing else may move.",
        slips=(
            Slip("a", "The leaky weights are normalised too, so they add up to the scale as well."),
            Slip("b", "Before training all biases are 0: what leaks is nothing, and both compute the same."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
