"""Exercises of notebook 12, train the model."""

from __future__ import annotations

import math

from . import Exercise, Slip, close, same_letter

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
        todo="How many bytes do weights, gradients and moments of 3,769,216 parameters take, in FP32?",
        solution=16 * 3_769_216,
        praise="Four numbers of four bytes per parameter: training takes four times the memory of the weights.",
        slips=(
            Slip(4 * 3_769_216, "That holds the weights. Gradients and two moments come on top."),
            Slip(8 * 3_769_216, "Weights and gradients. AdamW keeps two more numbers per parameter."),
            Slip(12 * 3_769_216, "AdamW keeps two moments, not one: mean and mean square of the gradient."),
        ),
        fallback="Per parameter: the weight, its gradient, and the two moments of AdamW, four bytes each.",
        agrees=close,
    ),
    "12.3": Exercise(
        todo="By how much does AdamW's first step move a weight with gradient 0.002, at learning rate 0.01?",
        solution=0.01,
        praise="The first step divides the gradient by its own size: only its sign is left, times the learning rate.",
        slips=(
            Slip(0.01 * 0.002, "That is plain gradient descent. AdamW divides by the root of the mean square."),
            Slip(0.01 * 0.1, "The bias correction undoes the factor 1 - beta1 = 0.1 in the first step."),
            Slip(0.002, "The size of the gradient cancels; what sets the size of the step?"),
        ),
        fallback="Write down m and v after one step, with bias correction, and divide m by the root of v.",
        agrees=lambda given, wanted: close(abs(float(given)), wanted),
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
