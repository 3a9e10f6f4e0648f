"""A router's training as a stage: how busy every expert was at a step, what its bias was, and the way of MaxVio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .arrange import Scale, one_in, scale, y_axis
from .replay import _dot
from .sheet import Box, Line, Shape, Sheet, Words, draw
from .style import GREY, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 508
LEFT, RIGHT = 52, 566
TOP = 4.0  # multiples of the fair share: a busier expert leaves the picture, its number stands above
LOADS, BIASES, CURVE = (88, 196), (240, 310), (370, 466)  # top and bottom pixel of the three panels
_MARGIN, _POINTS = 14, 260
_MINUS = "\N{MINUS SIGN}"


def balance_theatre(
    histories: Mapping[str, object], run: str | None = None, step: int | None = None, layer: int = 0,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Draw one step of one run among others and return the Axes; the static twin of the widget.

    histories: `LoadHistory`s of the same model and the same steps, by the name of the run. run: the first unless told.
    step: counted from 0, the last unless told. layer: which expert layer, from 0 as in `load_map`. The Axes count in
    pixels of a picture 580 wide. Raises ValueError as `check_histories`.
    """
    return draw(theatre_sheet(histories, *check_histories(histories, run, step, layer)), ax)


def check_histories(histories: Mapping, run: str | None, step: int | None, layer: int) -> tuple[str, int, int]:
    """Return run, step and layer to show. ValueError for what is not there, and for runs that do not compare."""
    shapes = {name: tuple(history.loads.shape) for name, history in histories.items()}
    if not shapes:
        raise ValueError("balance_theatre got no histories; give LoadHistory.of(records) of one run at least, by name")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"balance_theatre got histories of shapes {shapes}; give runs of the same steps, layers and "
                         "experts")  # fmt: skip
    run = next(iter(shapes)) if run is None else run
    if run not in shapes:
        raise ValueError(f"there is no run {run!r}; choose one of {', '.join(shapes)}")
    steps, layers, _ = shapes[run]
    step = steps - 1 if step is None else step
    if not 0 <= step < steps:
        raise ValueError(f"step={step} is not in this history; choose 0 to {steps - 1}")
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer} is not among the {layers} expert layers; choose 0 to {layers - 1}")
    return run, step, layer


def theatre_sheet(histories: Mapping, run: str, step: int, layer: int) -> Sheet:
    """Plan the picture of one step: loads over biases over the MaxVio of all runs."""
    history = histories[run]
    loads = history.loads[step, layer].tolist()
    ways = history.biases[:, layer] - history.biases[:, layer].mean(-1, keepdim=True)  # a common part chooses nothing
    biases = ways[step].tolist()
    shares = [tokens * len(loads) / sum(loads) for tokens in loads]
    violation, dead = history.max_violation[step, layer].item(), history.dead[step, layer].item()
    title = f"{run}, step {step:,}: MaxVio {violation:.2f}, {dead} of {len(loads)} experts without a token"
    busiest = shares.index(max(shares))
    label = f"{title}. Expert {busiest} got {shares[busiest]:.2f} times its fair share; {_bias_words(biases)}"
    shapes = [
        Words(_MARGIN, 22, title, bold=True, kind="headline"),
        *_load_bars(shares),
        *_bias_bars(biases, ways.abs().max().item()),
        *_curves(histories, run, step, layer),
    ]
    detail = "tokens of each expert: " + ", ".join(map(str, loads))
    return Sheet(HEIGHT, label, tuple(shapes), detail)


def _bias_words(biases: Sequence[float]) -> str:
    if not any(biases):
        return "every bias is 0"
    return f"biases from {_signed(min(biases))} to {_signed(max(biases))} around their mean"


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", _MINUS)


def _slot(count: int) -> float:
    return (RIGHT - LEFT) / count


def _load_bars(shares: Sequence[float]) -> list[Shape]:
    """One bar per expert; what is busier than TOP is cut there and says by how much."""
    top, bottom = LOADS
    plan, slot, busiest = Scale(0, TOP, bottom, top, 1), _slot(len(shares)), shares.index(max(shares))
    out: list[Shape] = [
        Words(_MARGIN, top - 40, "tokens, in multiples of the fair share", bold=True),
        Words(RIGHT, top - 40, f"beyond {TOP:g} times: the number", "end", size=12),
        *y_axis(plan, LEFT, RIGHT),
    ]
    written: list[float] = []
    for expert in sorted(range(len(shares)), key=lambda i: -shares[i]):
        share, left = shares[expert], LEFT + slot * (expert + 0.12)
        edge = dict(edge=INK, line=2.0) if expert == busiest else {}
        y = plan.pixel(min(share, TOP))
        box = Box(left, y, slot * 0.76, bottom - y, PALETTE["experts"], kind="load", name=str(expert), **edge)
        out.append(box)
        middle = left + slot * 0.38
        if share > TOP and all(abs(middle - other) >= 15 for other in written):
            written.append(middle)
            out.append(Words(middle, top - 7, f"{share:.0f}", "middle", expert == busiest, size=12, kind="beyond"))
    fair = plan.pixel(1)
    return [*out, Line(((LEFT, fair), (RIGHT, fair)), line=1.6, dashes=(6, 3), kind="fair")]


def _bias_bars(biases: Sequence[float], largest: float) -> list[Shape]:
    """One bar per expert from zero, up where it is favoured; the scale is that of the whole run."""
    top, bottom = BIASES
    plan, slot = scale(-largest, largest, bottom, top, 3), _slot(len(biases))
    out: list[Shape] = [
        Words(_MARGIN, top - 14, "bias, less their mean" if largest else "bias: always 0 in this run", bold=True),
        Words(RIGHT, top - 14, "up: preferred in choosing", "end", size=12),
        *(y_axis(plan, LEFT, RIGHT) if largest else []),
    ]
    zero, every = plan.pixel(0), one_in(slot)
    for expert, bias in enumerate(biases):
        left, y = LEFT + slot * (expert + 0.12), plan.pixel(bias)
        place = (left, min(y, zero), slot * 0.76, abs(y - zero))
        out.append(Box(*place, "#FFFFFF", INK, "up", kind="bias", name=str(expert)))
        if expert % every == 0:
            out.append(Words(left + slot * 0.38, bottom + 18, str(expert), "middle", size=12, kind="number"))
    return [*out, Line(((LEFT, zero), (RIGHT, zero))), Words(_MARGIN - 6, bottom + 18, "expert", size=12)]


def _curves(histories: Mapping, run: str, step: int, layer: int) -> list[Shape]:
    """MaxVio over the steps, this run dark over all others, and a marker at the step."""
    top, bottom = CURVE
    ways = {name: history.max_violation[:, layer].tolist() for name, history in histories.items()}
    last, here = len(ways[run]) - 1, ways[run][step]
    plan = scale(0, max(map(max, ways.values())), bottom, top, 4)

    def x(at: float) -> float:
        return LEFT + at / max(last, 1) * (RIGHT - LEFT)

    kept = sorted({*range(0, last + 1, last // _POINTS + 1), last})
    lines = {name: tuple((x(at), plan.pixel(way[at])) for at in kept) for name, way in ways.items()}
    others = [Line(line, "#BBBBBB", 1.2, kind="other", name=name) for name, line in lines.items() if name != run]
    side, beside = ("start", x(step) + 6) if step < last / 2 else ("end", x(step) - 6)
    return [
        Words(_MARGIN, top - 20, "MaxVio over the steps", bold=True),
        *([Line(((RIGHT - 128, top - 24), (RIGHT - 106, top - 24)), "#BBBBBB", 1.6)] if others else []),
        *([Words(RIGHT, top - 20, "the other runs", "end", size=12)] if others else []),
        *y_axis(plan, LEFT, RIGHT), Line(((LEFT, bottom), (RIGHT, bottom))), *others,
        Line(lines[run], PALETTE["weights"], 2.2, kind="curve"),
        Line(((x(step), top - 8), (x(step), bottom)), GREY, 1.4, (4, 3), kind="moment"),
        _dot(x(step), plan.pixel(here), 4.5, INK, "marked", str(step)),
        Words(beside, top - 2, f"{here:.2f}", side, bold=True, size=12, kind="violation"),
        Words(LEFT, bottom + 18, "0", "middle", size=12), Words(RIGHT, bottom + 18, f"step {last:,}", "end", size=12),
    ]  # fmt: skip
