"""Exercises of notebook 03, FP8 products."""

from __future__ import annotations

from . import Exercise, Slip, close, same_letter, same_number


def _products(a, b, scale_of_b=lambda scales, tile: scales[:, tile], scale_of_a=lambda scales, tile: scales[:, tile]):
    """a times b transposed, both in 1 x 128 tiles; the last two arguments say which scales a tile takes."""
    import torch

    x, y = a.codes.double(), b.codes.double()
    total = torch.zeros(len(x), len(y))
    for tile in range(a.scales.shape[1]):
        k = slice(128 * tile, 128 * tile + 128)
        total += (x[:, k] @ y[:, k].T).float() * scale_of_a(a.scales, tile)[:, None] * scale_of_b(b.scales, tile)
    return total


def _first_tile(a, b):
    return _products(a, b, lambda scales, _: scales[:, 0], lambda scales, _: scales[:, 0])


def _no_scale_of_b(a, b):
    return _products(a, b, lambda scales, tile: scales[:, tile] * 0 + 1)


def _as_blocks(a, b):
    return _products(a, b, lambda scales, tile: scales.repeat_interleave(128, 0)[: len(scales), tile])


def _not_transposed(a, b):
    return _products(b, a)


def _same_products(given, wanted) -> bool:
    """Whether two functions multiply several pairs of matrices alike."""
    import torch

    from ..precision import quantize_tiles

    generator = torch.Generator().manual_seed(3)
    for rows, columns, length in ((5, 3, 256), (130, 140, 384)):
        a = torch.randn(rows, length, generator=generator) * torch.rand(rows, length, generator=generator).mul(4).exp()
        b = torch.randn(columns, length, generator=generator) * torch.arange(1, columns + 1)[:, None]
        a, b = quantize_tiles(a), quantize_tiles(b)
        ours, theirs = given(a, b), wanted(a, b)
        if ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs, rtol=1e-4, atol=1e-2):
            return False
    return True


EXERCISES = {
    "03.1": Exercise(
        todo="Multiply the two rows by hand, tile by tile, and give the number.",
        solution=(4 * 3 + 2 * 5) * 0.5 * 4 + (6 * 2 + 1 * 8) * 3 * 0.1,
        praise="22 times 2 and 20 times 0.3: each tile's sum is multiplied by its own two scales, once.",
        agrees=close,
        slips=(
            Slip(42, "Those are the codes alone. Each tile's sum has still to be multiplied by two scales."),
            Slip(84, "You used the scales of tile 0 for both tiles. Tile 1 has its own."),
            Slip(71, "You used the scales of a only; b is scaled too."),
            Slip(90, "You used the scales of b only; a is scaled too."),
            Slip(46.6, "The scales changed places: tile 0 has 0.5 and 4, tile 1 has 3 and 0.1."),
        ),
        fallback="In each tile add up the products of codes and multiply by its two scales; then add the two tiles.",
    ),
    "03.2": Exercise(
        todo="What does the register hold after the five products? Give the number.",
        solution=22,
        praise="In steps of 2: 20 + 2 + 2 + 2 - 4. Each product lost its own part before anything was added.",
        agrees=same_number,
        slips=(
            Slip(24.5, "That is the exact sum. The register keeps three bits behind the leading 1 of 20."),
            Slip(24, "Every product is cut before it is added, and the step is 16 / 8 = 2: 3 becomes 2."),
            Slip(20, "Cut towards zero, as the model does: -5 in steps of 2 becomes -4, not -6."),
            Slip(28, "The model cuts off and does not round: 3.5 in steps of 2 becomes 2, not 4."),
        ),
        fallback="The step is 2: the leading 1 of 20 is worth 16. Cut all five towards zero in such steps, then add.",
    ),
    "03.3": Exercise(
        todo="At which number does the count stand still?",
        solution=2**11,
        praise="From 2,048 on the steps are 2, and 2,049 is cut back to 2,048. With 13 fraction bits it is 16,384.",
        agrees=same_number,
        slips=(
            Slip(2**10, "From 1,024 on the steps are 1: that still counts. One doubling more."),
            Slip(2**11 - 1, "2,047 + 1 is a power of two, which any register can say."),
            Slip(2**12, "At 4,096 the steps would be 4. They are 2, too large to add 1, before that."),
            Slip(2**14, "That is the register with 13 fraction bits. This one has 10."),
        ),
        fallback="With f fraction bits the steps are 1 from 2^f on and 2 from 2^(f+1) on. Where is 1 too small?",
    ),
    "03.4": Exercise(
        todo="Write a function of a and b, both in 1 x 128 tiles, that returns a times b transposed.",
        solution=_products,
        praise="Now b has a scale for each row and tile, as gradients do: notebook 04 multiplies them so.",
        slips=(
            Slip(_as_blocks, "Each row of b has scales of its own here: nothing is shared by 128 rows."),
            Slip(_first_tile, "Every tile along K has scales of its own; you used those of the first for all."),
            Slip(_no_scale_of_b, "The scales of b are missing."),
            Slip(_not_transposed, "That is the transposed result: rows belong to a, columns to b."),
        ),
        fallback="In each tile: the product of codes, times a.scales[:, tile, None], times b.scales[:, tile]; add up.",
        agrees=_same_products,
    ),
    "03.5": Exercise(
        todo='Which check catches the careless product? Answer "a", "b" or "c".',
        solution="c",
        praise="A wrong scale is some ten per cent on a few rows. Bits see it, where the mistake can happen at all.",
        slips=(
            Slip("a", "With 256 and 512 rows the division has no remainder, and nothing is wrong yet."),
            Slip(
                "b", "Few rows are wrong, and random blocks have nearly equal scales: within the tolerance. Compute it."
            ),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
