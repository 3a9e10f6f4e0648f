"""The cache race: step or play through prompt and answer, five caches fill side by side."""

from __future__ import annotations

from ipywidgets import Dropdown, SelectionSlider

from deepseek_lab.accounting.cache_race import CacheRace
from deepseek_lab.accounting.memory_state import GPU_SETS
from deepseek_lab.plots.cache_race import race_sheet

from .base import PictureWidget, choice, player

_BATCHES = tuple(2**power for power in range(9))  # 1 to 256


def cache_race(
    model: str = "deepseek-v3", gpu: str = "8 x H200", batch: int = 1, prompt: int = 4_096, tokens: int = 0
) -> PictureWidget:
    """Return a widget on how MHA, GQA-8, MQA, MLA and MLA-FP8 caches of one model fill the memory of some GPUs.

    model, gpu, batch, prompt: as for `accounting.cache_race.CacheRace`, ValueError as there. tokens: where it begins,
    one of that race's `steps`, ValueError for another. The play button goes a step a second.
    """
    race = CacheRace(model, gpu, batch, prompt)
    if tokens not in race.steps:
        raise ValueError(f"tokens={tokens!r} is no step of this race; choose one of {', '.join(map(str, race.steps))}")
    words = ["nothing read", *(f"{prompt:,} + {n - prompt:,}" for n in race.steps[1:])]
    batches = [("1 sequence" if n == 1 else f"{n:,} sequences", n) for n in sorted({*_BATCHES, batch})]
    controls = {
        "tokens": choice(SelectionSlider, "tokens", list(zip(words, race.steps, strict=True)), tokens, 340, 44),
        "batch": choice(SelectionSlider, "batch", batches, batch, 284, 44),
        "gpu": choice(Dropdown, "gpu", [(name, name) for name in GPU_SETS], gpu, 200, 34),
    }

    def plan(tokens: int, batch: int, gpu: str):
        return race_sheet(CacheRace(model, gpu, batch, prompt), tokens)

    return PictureWidget("cache-race", controls, plan, (player(controls["tokens"]),))
