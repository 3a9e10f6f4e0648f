"""Exercises of notebook 12, train the model."""

from __future__ import annotations

import math

from . import Exercise, Slip, close, same_letter, same_number

EXERCISES = {
    "12.1": Exercise(
        todo="Write a function that turns a loss in nats into the number of equally likely choices it stands for.",
        solution=math.exp,
        praise="exp(loss) is called perplexity: 5.56 nats are 260 choices, 1.3 nats fewer than four.",
        slips=(
            Slip(lambda loss: 2**loss, "2 ** loss would be right for a loss in bits. These are nats: the base is e."),
            Slip(math.log, "That is the way back: from the number of choices to the loss."),
            Slip(lambda loss: 1 / math.exp(loss), "That is the probability given to the true byte, not its inverse."),
        ),
        fallback="The loss is minus the logarithm of a probability; what is one over that probability?",
        agrees=lambda given, wanted: all(close(given(x), wanted(x)) for x in (0.5, 1.3, 5.56)),
    ),
    "12.2": Exercise(
        todo="How many GPUs of 80 GB hold the 15.7 B weights of V2-Lite, their gradients and moments, in FP32?",
        solution=4,
        agrees=same_number,
        praise="16 bytes per parameter make 251 GB, 3.14 GPUs, so four; using the model needs a quarter of that.",
        slips=(
            Slip(1, "That holds the weights alone, 63 GB. Gradients and two moments come on top."),
            Slip(2, "Weights and gradients fit on two. AdamW keeps two more numbers per parameter."),
            Slip(3, "3.14 GPUs are needed: round up, or count both moments."),
        ),
        fallback="Per parameter: weight, gradient and two moments, four bytes each. Divide by 80 GB and round up.",
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
