"""The absorption explorer: context, batch, heads and latent width over what three ways of decoding cost."""

from __future__ import annotations

from ipywidgets import SelectionSlider

from deepseek_lab.plots.absorption import absorption_sheet
from deepseek_lab.presets import PRESETS

from .base import PictureWidget, choice

#: Powers of two to choose from, and of what.
_SIZES = {"context": (18, "token"), "batch": (9, "sequence"), "heads": (9, "head"), "latent": (12, "number")}


def absorption_explorer(
    model: str = "deepseek-v3",
    context: int = 4_096,
    batch: int = 1,
    heads: int | None = None,
    latent: int | None = None,
) -> PictureWidget:
    """Return a widget on one decode step of latent attention: expanded, re-expanded, absorbed.

    model: a name in PRESETS with latent attention. context, batch, heads, latent: where to begin, heads and latent as
    the model has them unless told. Raises ValueError for an unknown model, one without a latent, and sizes below 1.
    """
    config = PRESETS.get(model)
    if config is None or not config.uses_latent_attention:
        known = ", ".join(name for name, preset in PRESETS.items() if preset.uses_latent_attention)
        raise ValueError(f"model={model!r} has no latent attention; choose one of {known}")
    heads = config.num_attention_heads if heads is None else heads
    latent = config.kv_lora_rank if latent is None else latent

    def plan(context: int, batch: int, heads: int, latent: int):
        shape = config.replace(num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=latent)
        return absorption_sheet(shape, context, batch)

    controls = {}
    for (name, (powers, word)), value in zip(_SIZES.items(), (context, batch, heads, latent), strict=True):
        sizes = sorted({*(2**power for power in range(powers)), value})
        options = [(f"{n:,} {word}{'s' * (n != 1)}", n) for n in sizes]
        controls[name] = choice(SelectionSlider, name, options, value, 284, 54)
    return PictureWidget("absorption-explorer", controls, plan)
