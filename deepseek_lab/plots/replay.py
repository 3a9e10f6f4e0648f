"""One moment of a training run: what the model wrote, where its loss stood, how busy its experts were."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .arrange import Scale, one_in, printable, scale, wrap, y_axis
from .sheet import WIDTH, Box, Line, Shape, Sheet, Words, draw
from .style import INK, PALETTE
from .training import _running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 436
LOSS_LEFT, LOSS_RIGHT, LOAD_LEFT, LOAD_RIGHT, TOP, BOTTOM = 44, 286, 334, 566, 256, 366
COLUMNS, LINES = 64, 8  # of the sample
_MARGIN, _FRAME_Y, _FRAME_HEIGHT, _LINE = 14, 56, 156, 18
_TITLE_Y, _NUMBER_Y, _KEY_Y, _LAST_Y = 238, 382, 402, 426
_POINTS = 240  # of the curve: one for every pixel


def training_replay(
    records: Sequence,
    samples: Mapping[int, str],
    losses: Mapping[int, float] | None = None,
    step: int | None = None,
    layer: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw one moment of a training run and return the Axes; the static twin of the widget.

    records: `StepRecord`s in order. samples: what the model wrote, by step. losses: held-out loss in nats per token, by
    step. step: one of the samples' steps, the last unless told. layer: which mixture-of-experts layer, from 0 as in
    `load_map`. The Axes count in pixels of a picture 580 wide.
    """
    return draw(replay_sheet(records, samples, losses, step, layer), ax)


def replay_sheet(
    records: Sequence,
    samples: Mapping[int, str],
    losses: Mapping[int, float] | None = None,
    step: int | None = None,
    layer: int = 0,
) -> Sheet:
    """Plan the picture. Raises ValueError without records or samples, for a step without a sample, an unknown layer."""
    losses = losses or {}
    step = check(records, samples, step, layer)
    text = printable(samples[step].expandtabs(4))
    record = at_step(records, step)
    shapes = [
        Words(_MARGIN, 22, loss_words(record, losses, step), bold=True, kind="headline"),
        *_sample(text),
        *_loss(records, samples, losses, step),
        *_load(records, samples, step, layer),
    ]
    return Sheet(HEIGHT, summary(record, text, losses, step, layer), tuple(shapes), detail=text)


def summary(record, text: str, losses: Mapping[int, float], step: int, layer: int) -> str:
    """Return one line: the step, its loss, the balance of the layer, and how the sample begins."""
    balance = f" {load_words(record, layer)}" if len(record.load) else ""
    begin = " ".join(text.split())
    begin = begin if len(begin) <= 60 else begin[:59] + "…"
    return f"{loss_words(record, losses, step)}.{balance} The model wrote: {begin}"


def loss_words(record, losses: Mapping[int, float], step: int) -> str:
    kind, loss = _loss_at(record, losses, step)
    return f"step {step:,}: {kind} loss {loss:.2f} nats per token"


def load_words(record, layer: int) -> str:
    """Return MaxVio of one layer in words: how much more than the fair share the busiest expert got."""
    shares = fair_shares(record, layer)
    busiest = shares.index(max(shares))
    return (
        f"Expert layer {layer + 1} of {len(record.load)}: MaxVio {shares[busiest] - 1:.2f}, expert {busiest} got "
        f"{shares[busiest]:.2f} times its fair share."
    )


def fair_shares(record, layer: int) -> list[float]:
    """Return what each expert of a layer received, in multiples of the mean: [expert]."""
    load = record.load[layer].tolist()
    return [tokens * len(load) / sum(load) for tokens in load]


def at_step(records: Sequence, step: int):
    """Return the record of this step, or the last one before it; the first where there is none."""
    return records[max(bisect_right(records, step, key=lambda record: record.step) - 1, 0)]


def check(records: Sequence, samples: Mapping[int, str], step: int | None, layer: int) -> int:
    """Return the step to show. Raises ValueError for what cannot be shown."""
    if not records or not samples:
        raise ValueError(
            f"training_replay got {len(records)} records and {len(samples)} samples; give one of each at least"
        )
    step = max(samples) if step is None else step
    if step not in samples:
        raise ValueError(f"there is no sample of step {step}; choose one of {', '.join(map(str, sorted(samples)))}")
    rows = len(records[0].load)
    if not 0 <= layer < max(rows, 1):
        raise ValueError(f"layer={layer} is not among the {rows} expert layers; choose 0 to {rows - 1}")
    return step


def _loss_at(record, losses: Mapping[int, float], step: int) -> tuple[str, float]:
    return ("held-out", losses[step]) if step in losses else ("training", record.loss)


def _sample(text: str) -> list[Shape]:
    frame = Box(_MARGIN, _FRAME_Y, WIDTH - 2 * _MARGIN, _FRAME_HEIGHT, "none", INK, kind="frame")
    out = [Words(_MARGIN, _FRAME_Y - 8, "The model wrote:"), frame]
    for i, line in enumerate(wrap(text, COLUMNS, LINES)):
        out.append(Words(_MARGIN + 10, _FRAME_Y + 20 + _LINE * i, line, mono=True, kind="sample"))
    return out


def _loss(records: Sequence, samples: Mapping[int, str], losses: Mapping[int, float], step: int) -> list[Shape]:
    """The smoothed training loss as a line, held-out losses as dots, and a line at the step with its loss above."""
    steps, raw = [r.step for r in records], [r.loss for r in records]
    smooth = _running_mean(raw, max(len(raw) // 40, 1))
    first, last = min(steps[0], *samples), max(steps[-1], *samples, 1)
    marked = _loss_at(at_step(records, step), losses, step)[1]
    plan = scale(0, max(*smooth, *losses.values(), marked), BOTTOM, TOP, most=4)

    def x(at: float) -> float:
        return LOSS_LEFT + (at - first) / max(last - first, 1) * (LOSS_RIGHT - LOSS_LEFT)

    every = len(steps) // _POINTS + 1
    kept = sorted({*range(0, len(steps), every), len(steps) - 1})
    here = x(step)
    side, beside = ("start", here + 5) if here < (LOSS_LEFT + LOSS_RIGHT) / 2 else ("end", here - 5)
    curve = tuple((x(steps[i]), plan.pixel(smooth[i])) for i in kept)
    return [
        Words(_MARGIN, _TITLE_Y - 4, "loss (nats per token)", bold=True),
        *y_axis(plan, LOSS_LEFT, LOSS_RIGHT),
        Line(((LOSS_LEFT, BOTTOM), (LOSS_RIGHT, BOTTOM))),
        Line(curve, PALETTE["weights"], 2.2, kind="curve"),
        *(_dot(x(at), plan.pixel(loss), 3, PALETTE["gradients"], "held-out", str(at)) for at, loss in losses.items()),
        Line(((here, TOP - 6), (here, BOTTOM)), line=1.4, dashes=(4, 3), kind="moment"),
        _dot(here, plan.pixel(marked), 4.5, INK, "marked", str(step)),
        Words(beside, TOP - 2, f"{marked:.2f}", side, bold=True, size=12, kind="loss"),
        Words(x(first), _NUMBER_Y, f"{first:,}", "middle", size=12),
        Words(x(last), _NUMBER_Y, f"step {last:,}", "end", size=12),
        *_loss_key(bool(losses)),
    ]


def _loss_key(held_out: bool) -> list[Shape]:
    y = _KEY_Y - 4
    out = [Line(((44, y), (60, y)), PALETTE["weights"], 2.2), Words(66, _KEY_Y, "training text, smoothed", size=12)]
    if held_out:
        out += [_dot(216, y, 3, PALETTE["gradients"]), Words(224, _KEY_Y, "held-out text", size=12)]
    return out


def _dot(x: float, y: float, half: float, colour: str, kind: str = "", name: str = "") -> Shape:
    corners = ((x - half, y), (x, y - half), (x + half, y), (x, y + half))
    return Line(corners, colour, 1.0, fill=colour, kind=kind, name=name)


def _load(records: Sequence, samples: Mapping[int, str], step: int, layer: int) -> list[Shape]:
    """One bar per expert in multiples of the fair share; the scale is that of all moments, so bars can be compared."""
    record, seen = at_step(records, step), [at_step(records, at) for at in samples]
    if not len(record.load):
        return [Words((LOAD_LEFT + LOAD_RIGHT) / 2, (TOP + BOTTOM) / 2, "this model has no experts", "middle")]
    plan = scale(0, max(2.0, *(max(fair_shares(r, row)) for r in seen for row in range(len(r.load)))), BOTTOM, TOP, 4)
    shares, fair = fair_shares(record, layer), plan.pixel(1)
    slot = (LOAD_RIGHT - LOAD_LEFT) / len(shares)
    return [
        Words(LOAD_LEFT - 22, _TITLE_Y - 4, f"load of expert layer {layer + 1} of {len(record.load)}", bold=True),
        *y_axis(plan, LOAD_LEFT, LOAD_RIGHT),
        *_load_bars(shares, slot, plan),
        Line(((LOAD_LEFT, BOTTOM), (LOAD_RIGHT, BOTTOM))),
        Line(((LOAD_LEFT, fair), (LOAD_RIGHT, fair)), line=1.6, dashes=(6, 3), kind="fair"),
        Line(((LOAD_LEFT, _KEY_Y - 4), (LOAD_LEFT + 22, _KEY_Y - 4)), line=1.6, dashes=(6, 3)),
        Words(LOAD_LEFT + 28, _KEY_Y, "1 = the fair share", size=12),
        Words(LOAD_RIGHT, _KEY_Y, "expert", "end", size=12),
        Words(_MARGIN, _LAST_Y, load_words(record, layer), kind="balance"),
    ]


def _load_bars(shares: list[float], slot: float, plan: Scale) -> list[Shape]:
    out: list[Shape] = []
    busiest, every = shares.index(max(shares)), one_in(slot)
    for expert, share in enumerate(shares):
        left, top, bold = LOAD_LEFT + slot * (expert + 0.12), plan.pixel(share), expert == busiest
        edge = dict(edge=INK, line=2.0) if bold else {}
        out.append(Box(left, top, slot * 0.76, BOTTOM - top, PALETTE["experts"], kind="load", name=str(expert), **edge))
        if bold or (expert % every == 0 and abs(expert - busiest) >= every):
            out.append(Words(left + slot * 0.38, _NUMBER_Y, str(expert), "middle", bold=bold, size=12, kind="number"))
    return out
