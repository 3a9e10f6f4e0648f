"""Exercises of notebook 01, number formats."""

from __future__ import annotations

import math

from . import Exercise, Slip, same_letter, same_number


def _nearest(number, mantissa_bits=2, bias=15, to_whole=round, subnormal=True):
    """The nearest number of a format, wrong in one way where an argument says so."""
    exponent = math.frexp(number)[1] - 1
    step = 2.0 ** ((max(exponent, 1 - bias) if subnormal else exponent) - mantissa_bits)
    return to_whole(number / step) * step


def _up(number):
    return _nearest(number, to_whole=lambda steps: math.floor(steps + 0.5))


def _cut(number):
    return _nearest(number, to_whole=math.floor)


def _as_e4m3(number):
    return _nearest(number, mantissa_bits=3)


def _bias_off_by_one(number):
    return _nearest(number, bias=16)


def _without_subnormals(number):
    return _nearest(number, subnormal=False)


# Plain numbers, ties of both kinds, subnormal numbers and the largest.
_NUMBERS = (0.1, 0.3, 1.0, 1.125, 1.375, 3.3, 17.0, 19.0, 1e-3, 1e-6, 7.6e-6, 2e-5, 3e-5, 5e-5, 50_000.0, 57_344.0)


def _same_rounding(given, wanted) -> bool:
    """Whether two functions round a choice of numbers alike."""
    return all(float(given(number)) == wanted(number) for number in _NUMBERS)


def _clamped(x, cast, limit=448.0):
    return cast(x.clamp(-limit, limit))


def _clamped_after(x, cast):
    return cast(x).clamp(-448, 448)


def _repaired_after(x, cast):
    return cast(x).nan_to_num(448.0)


def _clamped_at_240(x, cast):
    return _clamped(x, cast, 240.0)


def _clamped_above(x, cast):
    return cast(x.clamp(max=448))


def _same_cast(given, wanted) -> bool:
    """Whether two functions bring the same tensor through a cast that answers NaN to what is too large."""
    import torch

    from ..precision import E4M3, round_to

    x = torch.tensor([0.1, -3.3, 300.0, 448.0, 465.0, -465.0, 1e30, -1e30])
    ours, theirs = (torch.as_tensor(f(x.clone(), lambda y: round_to(y, E4M3, "nan"))) for f in (wanted, given))
    return torch.allclose(theirs.float(), ours, rtol=0, atol=0, equal_nan=True)


EXERCISES = {
    "01.1": Exercise(
        todo="Which number is the E4M3 code 0 1000 110?",
        solution=3.5,
        agrees=same_number,
        praise="Exponent 8 - 7 = 1, mantissa 1 + 6/8: 2 x 1.75.",
        slips=(
            Slip(1.75, "That would be a bias of 8. Four exponent bits count to 15, and the bias is 7."),
            Slip(7, "That would be a bias of 6. Four exponent bits count to 15, and the bias is 7."),
            Slip(1.5, "The 1 before the point is not stored, but it counts: the mantissa is 1 + 6/8."),
            Slip(448, "That is 0 1111 110. Here the exponent field is 8."),
        ),
        fallback="Exponent: the four bits as a whole number, less 7. Mantissa: 1 + the last three bits as eighths.",
    ),
    "01.2": Exercise(
        todo="To which E4M3 code, from 0 to 255, does -0.3 round?",
        solution=170,
        agrees=same_number,
        praise="Ten steps of 0.03125 are 0.3125: mantissa 010, exponent field 5, and the sign adds 128.",
        slips=(
            Slip(42, "That is +0.3. The sign bit is the first of eight: it adds 128."),
            Slip(169, "0.3 is 9.6 steps of 0.03125. Round to the nearest, do not cut off."),
            Slip(
                178,
                "The exponent field of 0.25 is -2 + 7 = 5. If you had that: eight of the ten steps are the "
                "hidden 1, and only two go into the mantissa.",
            ),
            Slip(162, "The exponent field is one too small: 0.25 is 2 to the power of -2, and -2 + 7 is 5."),
        ),
        fallback="Between which powers of two is 0.3? A step is an eighth of the lower one. How many steps is it?",
    ),
    "01.3": Exercise(
        todo="Write a function of one positive number that returns the nearest number of E5M2.",
        solution=_nearest,
        praise="Find the power of two below, take a quarter of it as the step, round the number of steps.",
        agrees=_same_rounding,
        slips=(
            Slip(
                _up, "Right but for ties: floor(steps + 0.5) always goes up, and 1.125 should become 1, the even one."
            ),
            Slip(_cut, "That cuts off. 1.9 steps are nearer to 2 than to 1: round the number of steps."),
            Slip(_as_e4m3, "Those are eighths: three mantissa bits. E5M2 has two, so a step is a quarter."),
            Slip(_bias_off_by_one, "Right but for tiny numbers: the smallest exponent is 1 - bias, and bias is 15."),
            Slip(_without_subnormals, "Right but for tiny numbers: below 2 to the power of -14 steps stop shrinking."),
        ),
        fallback="Try 0.1: between 0.0625 and 0.125 a step is 0.015625, and 6.4 steps round to 6: 0.09375.",
    ),
    "01.4": Exercise(
        todo="Write a function of x and cast that gives 448 or -448 for finite numbers that are too large.",
        solution=_clamped,
        praise="Clamp before the cast: then it does not matter what the cast does with large numbers.",
        agrees=_same_cast,
        slips=(
            Slip(_clamped_after, "Clamping after the cast comes too late: NaN stays NaN."),
            Slip(_repaired_after, "After the cast the sign is gone: -465 came back as +448. Clamp before."),
            Slip(_clamped_at_240, "240 is where E4M3 would end if it kept codes for infinity. This one reaches 448."),
            Slip(_clamped_above, "Numbers below -448 are too large as well: clamp on both sides."),
        ),
        fallback="x.clamp(low, high) brings numbers into range; then hand the result to cast.",
    ),
    "01.5": Exercise(
        todo='Which check catches rounding every tie up? Answer "a", "b" or "c".',
        solution="c",
        praise="63 of the 126 midpoints go the wrong way, and only numbers that are midpoints can show it.",
        agrees=same_letter,
        slips=(
            Slip("a", "Numbers that are in the format need no rounding, so any way of rounding passes."),
            Slip(
                "b", "A random FP32 number is hardly ever exactly half way: 20,000 of them, cast to E4M3, meet no tie."
            ),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
    ),
}
