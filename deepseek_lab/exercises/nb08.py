"""Exercises of notebook 08, long context."""

from __future__ import annotations

import torch

from . import Exercise, Slip, close, same_letter, same_number


class _Pages:
    """As much of the notebook's `Pages` as cutting touches."""

    def __init__(self):
        self.size, self.free, self.references = 4, [7, 8], [2, 2, 2, 1, 1, 1, 1, 0, 0]
        self.tables = {"a": [0, 1, 2, 3], "b": [0, 1, 2, 4, 5, 6]}
        self.lengths = {"a": 15, "b": 24}
        self.storage = torch.zeros(9, 4, 8)


def _cut(pages, text, length):
    """Keep the first `length` tokens of a text; give back the blocks behind them that nobody else names."""
    kept = -(-length // pages.size)
    for block in pages.tables[text][kept:]:
        pages.references[block] -= 1
        if not pages.references[block]:
            pages.free.append(block)
    del pages.tables[text][kept:]
    pages.lengths[text] = length


def _cut_shared_too(pages, text, length):
    kept = -(-length // pages.size)
    for block in pages.tables[text][kept:]:
        pages.references[block] = 0
        pages.free.append(block)
    del pages.tables[text][kept:]
    pages.lengths[text] = length


def _cut_rounded_down(pages, text, length):
    before = pages.lengths[text]
    _cut(pages, text, length // pages.size * pages.size)
    pages.lengths[text] = min(length, before)


def _cut_one_too_many(pages, text, length):
    _cut(pages, text, (length // pages.size + 1) * pages.size)
    pages.lengths[text] = length


def _cut_table_alone(pages, text, length):
    before = pages.lengths[text]
    _cut(pages, text, length)
    pages.lengths[text] = before


def _cut_length_alone(pages, text, length):
    pages.lengths[text] = length


def _cut_never_free(pages, text, length):
    kept = -(-length // pages.size)
    for block in pages.tables[text][kept:]:
        pages.references[block] -= 1
    del pages.tables[text][kept:]
    pages.lengths[text] = length


def _same_cuts(given, wanted) -> bool:
    """Whether two functions leave the same tables, lengths, references and free blocks behind, in any order."""
    for cuts in ([("b", 24)], [("b", 17)], [("b", 6), ("a", 6)], [("a", 3), ("b", 0)], [("b", 20), ("b", 9)]):
        states = []
        for cut in (given, wanted):
            pages = _Pages()
            for text, length in cuts:
                cut(pages, text, length)
            states.append((pages.tables, pages.lengths, pages.references, sorted(pages.free)))
        if states[0] != states[1]:
            return False
    return True


EXERCISES = {
    "08.1": Exercise(
        todo="How many bytes does a token leave in one layer? Give a whole number.",
        solution=256 + 2 * 4 + 32 * 2,
        praise="256 codes, 8 bytes of scales, 64 of a rope key that stays in BF16.",
        agrees=same_number,
        slips=(
            Slip(288, "Eight bits are not one byte for each number: scales come with them, and the rope key is BF16."),
            Slip(320, "The scales are missing: four bytes for each tile of 128."),
            Slip(296, "The rope key stays in BF16: two bytes for each of its numbers."),
            Slip(336, "A latent of 256 has two tiles of 128, so two scales, not four."),
            Slip(656, "That is DeepSeek-V3, with a latent of 512 and a rope key of 64."),
        ),
        fallback="Codes (one byte each), scales (four bytes for each tile of 128), rope key (two bytes each).",
    ),
    "08.2": Exercise(
        todo="By how much does pair 16 turn per position after YaRN? Give the number, in radians.",
        solution=0.01 * 7 / 13 + 0.00025 * 6 / 13,
        praise="Six thirteenths of the way from 0.01 to 0.01 / 40.",
        agrees=close,
        slips=(
            Slip(0.01, "Pair 16 lies between the bounds 10 and 23, so it is slowed down in part."),
            Slip(0.00025, "That is the full factor of 40, which only pairs from 23 on get."),
            Slip(
                0.01 * 6 / 13 + 0.00025 * 7 / 13,
                "The shares are exchanged: 6/13 of the way to slow leaves 7/13 of 0.01.",
            ),
            Slip(0.01 / (1 + 39 * 6 / 13), "Blend the turns, not the wavelengths: 7/13 of 0.01 and 6/13 of 0.00025."),
        ),
        fallback="The share of slow is (16 - 10) / (23 - 10). Blend 0.01 and 0.01 / 40 with it.",
    ),
    "08.3": Exercise(
        todo="How many blocks are in use? Give a whole number.",
        solution=15 + 8 * 5,
        praise="Fifteen full blocks once, five for each answer; apart it would be 160.",
        agrees=same_number,
        slips=(
            Slip(160, "That is without sharing. The full blocks of the question are stored once."),
            Slip(47, "The answers go on in the question's last block: 40 + 220 tokens each, not 220."),
            Slip(48, "The question's last block is not full: each answer writes into a copy of it, 40 + 220 tokens."),
            Slip(56, "The question's text has ended, so the block that only it named is free again."),
            Slip(20, "That is one answer with its question. The other seven have blocks of their own too."),
        ),
        fallback="1,000 = 15 x 64 + 40. Who shares the full blocks, and where do 40 + 220 tokens go?",
    ),
    "08.4": Exercise(
        todo="Write a function of pages, text and length that shortens a text.",
        solution=_cut,
        praise="A block is free when nobody names it, not when somebody lets go of it.",
        agrees=_same_cuts,
        slips=(
            Slip(_cut_shared_too, "A block that another text names must stay: count back its references first."),
            Slip(_cut_rounded_down, "A block that is filled in part is still needed: round the number of blocks up."),
            Slip(_cut_one_too_many, "A multiple of the block size needs no further block: round up, do not add one."),
            Slip(_cut_table_alone, "The blocks are right, but `pages.lengths` still says what it said before."),
            Slip(_cut_length_alone, "The blocks behind the cut are still in the table: nobody else can ever use them."),
            Slip(_cut_never_free, "Blocks that nobody names any more belong into pages.free."),
        ),
        fallback="Keep ceil(length / size) blocks of the table; for the others do what `end` does; set the length.",
    ),
    "08.5": Exercise(
        todo='Which check catches the silently unstretched model? Answer "a", "b" or "c".',
        solution="b",
        praise="A setting that only reserves room must not change an answer: give it two values and compare.",
        agrees=same_letter,
        slips=(
            Slip("a", "Both ways of reading use the same wrong frequencies. Compare with the other setting."),
            Slip("c", "The loss on short texts is near 1.2 either way. It must be equal, not near."),
        ),
        fallback='Answer with one letter, "a", "b" or "c".',
    ),
}
