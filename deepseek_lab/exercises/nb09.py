"""Exercises of notebook 09, sparse experts."""

from __future__ import annotations

from . import Exercise, Slip, same_letter, same_number


def _tokens_sorted(experts):
    """The token of every slot, sorted by expert and then by token: experts [token, choice] -> [slot]."""
    return experts.flatten().argsort(stable=True) // experts.shape[1]


def _slots_sorted(experts):
    return experts.flatten().argsort(stable=True)


def _choices_sorted(experts):
    return experts.flatten().argsort(stable=True) % experts.shape[1]


def _experts_sorted(experts):
    return experts.flatten().sort(stable=True).values


def _sorted_in_tokens(experts):
    return experts.argsort(dim=1, stable=True).flatten()


def _divided_by_tokens(experts):
    return experts.flatten().argsort(stable=True) // experts.shape[0]


def _same_order(given, wanted) -> bool:
    """Whether two functions put the tokens of random choices into the same order."""
    import torch

    generator = torch.Generator().manual_seed(9)
    for tokens, count, choices in ((7, 5, 2), (40, 16, 4), (1, 8, 3)):
        experts = torch.rand(tokens, count, generator=generator).argsort(1)[:, :choices]
        if torch.as_tensor(given(experts)).tolist() != wanted(experts).tolist():
            return False
    return True


EXERCISES = {
    "09.1": Exercise(
        todo="How many shared experts has DeepSeek-V2? Give a whole number.",
        solution=2,
        praise="12,288 / 1,536 = 8 experts do the work of the dense layer, and 6 of them are routed.",
        agrees=same_number,
        slips=(
            Slip(8, "Eight experts do the work of the dense layer. Six of them are routed; how many are left?"),
            Slip(1, "That is DeepSeek-V3. Divide 12,288 by 1,536 and take off the routed ones."),
            Slip(6, "Six are routed. How many more fit into 12,288?"),
            Slip(154, "Only the chosen experts work for a token: 6 of the 160."),
        ),
        fallback="Neurons at work for one token: (6 + shared) times 1,536 are to be 12,288.",
    ),
    "09.2": Exercise(
        todo="Among how many sets of 4 experts can our router choose for a token? Give a whole number.",
        solution=412,
        praise="6 pairs of groups with 70 sets each, less 8 that were counted too often. Without the limit: 1,820.",
        agrees=same_number,
        slips=(
            Slip(1820, "That is without the group limit: 4 of 16. All four must lie in two of the four groups."),
            Slip(420, "Nearly: a set that lies in a single group was counted with each of three pairs of groups."),
            Slip(70, "That is for one pair of groups. There are six pairs."),
            Slip(416, "A set inside a single group is in three pairs: take it off twice, for each of four groups."),
            Slip(408, "Sets inside a single group are allowed too: count each of the four once."),
        ),
        fallback="Count the sets inside two groups, 4 of 8, for each pair of groups. Which are counted more than once?",
    ),
    "09.3": Exercise(
        todo="Write a function of experts [token, choice] that returns the token of every slot, sorted by expert.",
        solution=_tokens_sorted,
        praise="A slot's number divided by the choices is its token: no loop, no list, no second sort.",
        agrees=_same_order,
        slips=(
            Slip(
                _slots_sorted, "Those are the numbers of the slots. Which token does slot 7 belong to, with 2 choices?"
            ),
            Slip(
                _choices_sorted, "The remainder says which choice of the token a slot is; the quotient says the token."
            ),
            Slip(_experts_sorted, "Those are the experts, sorted. Return the tokens that go to them."),
            Slip(_sorted_in_tokens, "You sorted inside each token. All slots are sorted together: flatten first."),
            Slip(_divided_by_tokens, "Divide by the number of choices, experts.shape[1], not by that of tokens."),
        ),
        fallback="Flatten, sort stably by expert with argsort, and turn the number of a slot into that of its token.",
    ),
    "09.4": Exercise(
        todo="By which factor is the estimate of the experts' memory too small? Give a number such as 12.3.",
        solution=257 / 9,
        praise="257 experts must be stored, 9 work. Memory asks for resident parameters, arithmetic for active ones.",
        agrees=lambda given, wanted: abs(float(given) - wanted) < 0.06,
        slips=(
            Slip(256 / 8, "That is without the shared expert, which is stored once and works for every token."),
            Slip(671 / 37, "That is the whole model, with attention and embedding. The experts of a layer alone?"),
            Slip(256 / 9, "The shared expert must be stored too."),
            Slip(257 / 8, "The shared expert works for every token too."),
            Slip(9 / 257, "The other way round: how many times as much is needed as was estimated?"),
        ),
        fallback="Experts that are stored, divided by experts that work for a token; mind the shared one.",
    ),
    "09.5": Exercise(
        todo='Which check fails for the zero alone, which for the maximum alone? Two letters, as in "ab".',
        solution="ca",
        praise="Each check sees what its inputs can show: positive scores never meet the zero.",
        agrees=same_letter,
        slips=(
            Slip("ac", "The other way round: can a zero win against scores that are all above zero?"),
            Slip("ba", "With negative scores both fail. Which check fails for the zero and holds for the maximum?"),
            Slip("cb", "With negative scores both fail. Which check fails for the maximum and holds for the zero?"),
            Slip("bb", "With negative scores both fail, so this check does not tell them apart."),
            Slip("cc", "The maximum keeps the wrong groups, but as many as it should."),
            Slip("aa", "Scores above zero win against every zero: check a cannot see it."),
        ),
        fallback='Two letters, as in "ab": first the zero alone, then the maximum alone. Which check fails for both?',
    ),
}
