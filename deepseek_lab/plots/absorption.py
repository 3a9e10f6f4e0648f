"""Three ways to decode from latents: what is kept, computed and read for one token, and which way is fastest where."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deepseek_lab import facts
from deepseek_lab.accounting.decode import LATENT_WAYS, DecodeStep, decode_step, equal_ridge
from deepseek_lab.config import ModelConfig
from deepseek_lab.presets import PRESETS
from deepseek_lab.units import format_bytes, format_flops, format_seconds

from .sheet import Box, Line, Shape, Sheet, Words, draw
from .style import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 452
LEFT, BARS, RIGHT = 14, 108, 384  # of the names and the bars; beside the longest bar is room for its number
_TOP, _PANEL, _ROW, _BAR = 62, 78, 17, 12
_LOOKS = dict(zip(LATENT_WAYS, (PALETTE["gradients"], PALETTE["other"], PALETTE["attention"]), strict=True))
_DECADES = (-1, 5)  # of FLOP per byte
_PEAK, _BANDWIDTH = facts.H800_BF16_PEAK.value, facts.H800_BANDWIDTH.value


def absorption_explorer(
    config: ModelConfig | None = None, context: int = 4_096, batch: int = 1, ax: Axes | None = None
) -> Axes:
    """Draw what one decode step costs in one layer in the expanded, re-expanded and absorbed ways.

    config: a model with latent attention, V3 unless told. context: tokens per sequence. batch: sequences.
    The static twin of the widget; the Axes count in pixels of a picture 580 wide. ValueError as in `decode_step`.
    """
    return draw(absorption_sheet(PRESETS["deepseek-v3"] if config is None else config, context, batch), ax)


def absorption_sheet(config: ModelConfig, context: int, batch: int = 1) -> Sheet:
    """Plan the picture: one panel for each quantity, one bar for each way."""
    steps = {way: decode_step(config, context, way, batch) for way in LATENT_WAYS}
    sequences = "1 sequence" if batch == 1 else f"{batch:,} sequences"
    tokens = "1 token" if context == 1 else f"{context:,} tokens"
    title = f"{config.num_attention_heads} heads, latent {config.kv_lora_rank:,}: one step of {sequences} of {tokens}"
    ridge, times = _PEAK / _BANDWIDTH, {way: step.seconds(_PEAK, _BANDWIDTH) for way, step in steps.items()}
    panels = (
        ("numbers kept per token and layer", {w: (s.kept,) for w, s in steps.items()}, "{:,}".format),
        ("FLOP in one layer", {w: (s.flops.total,) for w, s in steps.items()}, format_flops),
        ("bytes read in one layer: cache, and hatched the weights of the up-projection",
         {w: (s.reads["cache"].total, s.reads["weights"].total) for w, s in steps.items()}, format_bytes),
        ("least time in one layer on an H800", {w: (t,) for w, t in times.items()}, format_seconds),
    )  # fmt: skip
    shapes: list[Shape] = [
        Words(LEFT, 22, title, bold=True, kind="headline"),
        Words(LEFT, 41, crossing(steps["expanded"], steps["absorbed"]), size=12, kind="crossing"),
    ]
    for place, (words, values, text) in zip((0, 1, 2, 4), panels, strict=True):
        shapes += _bars(words, values, text, _TOP + place * _PANEL)
    shapes += _intensities({way: step.intensity for way, step in steps.items()}, ridge, _TOP + 3 * _PANEL)
    said = "; ".join(
        f"{way}: {s.kept:,} kept, {format_flops(s.flops.total)}, {format_bytes(s.reads.total)} read, "
        f"{_number(s.intensity)} FLOP per byte, {format_seconds(times[way])}"
        for way, s in steps.items()
    )
    return Sheet(HEIGHT, f"{title}: {said}. {crossing(steps['expanded'], steps['absorbed'])}", tuple(shapes))


def crossing(expanded: DecodeStep, absorbed: DecodeStep) -> str:
    """Return in words which machines decode faster from expanded keys and which with absorbed projections."""
    ridge, pair = equal_ridge(expanded, absorbed), (expanded, absorbed)
    first = min(pair, key=lambda step: (step.reads.total, step.flops.total)).way
    if ridge is None:
        return f"{first} wins on every machine: it computes and reads no more"
    return f"crossing: {first} is faster on machines with a ridge above {_number(ridge)} FLOP per byte"


def _bars(title: str, values: dict[str, tuple[float, ...]], text, y: float) -> list[Shape]:
    """One panel: a bar from zero for each way, its parts behind each other, its sum beside it."""
    largest, out = max(map(sum, values.values())), [Words(LEFT, y + 12, title, bold=True, size=12, kind="panel")]
    for number, (way, parts) in enumerate(values.items()):
        top, x = y + 19 + number * _ROW, float(BARS)
        out.append(Words(LEFT, top + 11, way, size=12))
        for part, hatch in zip(parts, ("", "down"), strict=False):
            width = (RIGHT - BARS) * part / largest
            fill = "#E8E8E8" if hatch else _LOOKS[way]
            out.append(Box(x, top, width, _BAR, fill, hatch=hatch, kind="bar", name=f"{title.split()[0]} {way}"))
            x += width
        out.append(Words(max(x, BARS) + 6, top + 11, text(sum(parts)), size=12, kind="amount"))
    return [*out, Line(((BARS, y + 16), (BARS, y + 19 + 3 * _ROW)))]


def _intensities(values: dict[str, float], ridge: float, y: float) -> list[Shape]:
    """A logarithmic axis of FLOP per byte with a mark for each way and a dashed line at the ridge of an H800."""

    def x(value: float) -> float:
        low, high = _DECADES
        return BARS + (RIGHT - BARS) * min(max((math.log10(value) - low) / (high - low), 0), 1)

    bottom = y + 19 + 3 * _ROW
    title = f"FLOP per byte (0.1 to 100,000); dashed: ridge of an H800, {_number(ridge)}"
    out: list[Shape] = [Words(LEFT, y + 12, title, bold=True, size=12, kind="panel")]
    out += [Line(((x(10.0**n), y + 18), (x(10.0**n), bottom)), "#DDDDDD") for n in range(_DECADES[0], _DECADES[1] + 1)]
    out.append(Line(((x(ridge), y + 16), (x(ridge), bottom)), dashes=(4, 3), line=1.6, kind="ridge"))
    for number, (way, value) in enumerate(values.items()):
        top, bound = y + 19 + number * _ROW, "memory" if value < ridge else "arithmetic"
        out.append(Words(LEFT, top + 11, way, size=12))
        out.append(Box(x(value) - 5, top + 1, 10, 10, _LOOKS[way], INK, kind="intensity", name=way))
        out.append(Words(RIGHT + 8, top + 11, f"{_number(value)}, bound by {bound}", size=12, kind="amount"))
    return out


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
