"""Exercises of notebook 12, train the model."""

from __future__ import annotations

import math

from . import Exercise, Slip, same_letter

EXERCISES = {
    "12.1": Exercise(
        todo="What is V3's learning rate when 13T tokens are read? Two significant digits.",
        solution=2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * 3 / 4.3)),
        praise="6.3e-5: 3 of the 4.3T tokens of the cosine are done, and little more than a quarter is left.",
        slips=(
            Slip(2.2e-4, "The rate is constant up to 10T tokens only; at 13T it has been falling for 3T."),
            Slip(8.2e-5, "That is a straight line from 2.2e-4 to 2.2e-5. A cosine is below it in its second half."),
            Slip(4.1e-5, "That is the part above the floor; the cosine ends at 2.2e-5, so add that."),
            Slip(2.6e-5, "The cosine begins at 10T: 3T of 4.3T are done, not 13T of 14.3T."),
            Slip(4.6e-5, "A cosine to zero would be there. V3's ends at 2.2e-5: only the difference of the two falls."),
        ),
        fallback="The share that is done is (13 - 10) / 4.3; the rate is 2.2e-5 + half of 1.98e-4 (1 + cos(pi share)).",
        agrees=lambda given, wanted: abs(float(given) - wanted) <= 0.02 * wanted,
    ),
    "12.2": Exercise(
        todo="How many billion parameters fit, with gradients and moments, V3's way, into 80 GB? Two digits.",
        solution=80 / 13,
        praise="13 bytes each: 6.2 billion parameters, before a single activation. Plain FP32 stops at 5.0.",
        slips=(
            Slip(80 / 16, "16 bytes are plain FP32. V3 has BF16 moments, and a copy in FP8 for the products."),
            Slip(80 / 18, "18 bytes are BF16 products with FP32 moments, the usual way before."),
            Slip(80 / 12, "The FP8 copy that the products read is missing: one more byte."),
            Slip(6.0, "Too coarse to judge: give two significant digits."),
            Slip(80e9 / 13, "That is the number of parameters itself; give it in billions."),
            Slip(80.0, "That is the FP8 weights alone, which suffice to use the model, not to train it."),
            Slip(80 / 9, "The FP32 master weights are missing: AdamW moves them, and FP8 would lose its steps."),
        ),
        fallback="Master weight, gradient, two moments, FP8 copy: add up their bytes, and divide 80 by the sum.",
        agrees=lambda given, wanted: abs(float(given) - wanted) <= 0.01 * wanted,
    ),
    "12.3": Exercise(
        todo="How far does AdamW's second step move a weight whose gradient was 0.002 and is now 0, at rate 0.01?",
        solution=0.01 * (0.09 / 0.19) / math.sqrt(0.0475 / 0.0975),
        praise="0.0068: the means remember the first gradient, so the weight moves on without a new one.",
        slips=(
            Slip(0.0, "The gradient is zero, but the means m and v still remember the one before."),
            Slip(0.0168, "That is both steps together; only the second is asked for."),
            Slip(0.01, "That is the first step. Now both means have faded, m faster than the root of v."),
            Slip(0.01 * 0.09 / math.sqrt(0.0475), "The bias correction is missing: divide m by 0.19 and v by 0.0975."),
        ),
        fallback="Write down m and v after both steps, correct both by 1 - beta^2, then take m over the root of v.",
        agrees=lambda given, wanted: abs(abs(float(given)) - wanted) <= 0.03 * wanted,
    ),
    "12.4": Exercise(
        todo='Which check catches the forgotten balance loss? Reply "a", "b" or "c".',
        solution="c",
        praise="A loss acts through its gradient alone: if the gate does not feel it, it is not there.",
        slips=(
            Slip("a", "The loss of the text falls with or without it: it says nothing about the other term."),
            Slip("b", "It was computed, so it prints a sensible number. Does anything learn from it?"),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
        agrees=same_letter,
    ),
}
