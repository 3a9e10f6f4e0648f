"""Pictures of a training run: its schedules, its loss, and how busy its experts were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from deepseek_lab.units import format_count

from .style import INK, PALETTE

_POINTS = 2_000  # of a curve: several for every pixel


def schedules(runs: Mapping[str, tuple]):
    """Draw what a recipe changes during a run, one row per setting and one column per run; return Axes [row, column].

    runs: (recipe, sequences of a whole batch, tokens of a sequence) by name. The horizontal axis counts tokens read.
    Raises ValueError without a run.
    """
    import matplotlib.pyplot as plt

    if not runs:
        raise ValueError("schedules got no runs; give (recipe, batch, length) by name")
    axes = plt.subplots(4, len(runs), figsize=(7.2, 6.4), squeeze=False, sharex="col")[1]
    for column, (name, (recipe, batch, length)) in zip(axes.T, runs.items(), strict=True):
        sizes = [recipe.batch_at(step, batch) for step in range(recipe.steps)]
        read = [length * done for done in accumulate(sizes)]
        steps = sorted({*range(0, recipe.steps, -(-recipe.steps // _POINTS)), recipe.steps - 1})
        rows = {
            "learning rate": recipe.learning_rate_at,
            "sequences\nper step": sizes.__getitem__,
            "speed of\nthe biases": recipe.balance_speed_at,
            "weight of the\nmodule's loss": recipe.multi_token_weight_at,
        }
        for ax, (label, value_at) in zip(column, rows.items(), strict=True):
            values = [value_at(step) for step in steps]
            ax.plot([read[step] for step in steps], values, color=PALETTE["weights"])
            ax.set_ylim(0, 1.15 * max(values) or 1)
            ax.set_yticks(sorted({0, max(values)} | ({values[-1]} if values[-1] > 0.2 * max(values) else set())))
            ax.yaxis.set_major_formatter(lambda value, _: _number(value))
            ax.grid(axis="y")
            if ax in axes[:, 0]:
                ax.set_ylabel(label)
        column[0].set_title(name, loc="left")
        ax.set(xlabel="tokens read", xlim=(0, read[-1] * 1.02), xticks=[read[-1] * i / 2 for i in range(3)])
        ax.xaxis.set_major_formatter(lambda value, _: format_count(value) if value else "0")
    axes[0, 0].figure.align_ylabels()
    return axes


def _number(value: float) -> str:
    """A tick as it is said: 0.0025, 15,360, but 2.2e-4."""
    if 0 < value < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:,.0f}" if value >= 1 else f"{value:.3g}"


def loss_curve(records: Sequence, marks: dict[int, float] | None = None, ax=None):
    """Draw the training loss over steps and return the Axes.

    records: `StepRecord`s, or anything with `.step` and `.loss` (nats per token). marks: {step: held-out loss} as dots.
    """
    _refuse_none(records, "loss_curve")
    ax = _axes(ax)
    steps, losses = [r.step for r in records], [r.loss for r in records]
    ax.plot(steps, losses, color=PALETTE["weights"], linewidth=0.8, alpha=0.45, linestyle="-")
    smooth = _running_mean(losses, max(len(losses) // 40, 1))
    ax.plot(steps, smooth, color=PALETTE["weights"], linestyle="-")
    ax.annotate("training text", (steps[-1], smooth[-1]), xytext=(6, -2), textcoords="offset points", va="top")
    if marks:
        ax.plot(list(marks), list(marks.values()), "o", color=PALETTE["gradients"])
        last = max(marks)
        ax.annotate("held-out text", (last, marks[last]), xytext=(6, 4), textcoords="offset points")
    ax.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, steps[-1] * 1.2 + 1))
    ax.grid(axis="y")
    return ax


def load_map(records: Sequence, layer: int = 0, ax=None):
    """Draw which share of the tokens each expert of a layer received, step by step, and return the Axes.

    records: `StepRecord`s with `.load` [layer, expert]. The scale ends at three times the fair share.
    """
    _refuse_none(records, "load_map")
    layers = len(records[0].load)
    if not layers:
        raise ValueError("load_map got records of a dense model; only one with n_routed_experts has experts to show")
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer} is not one of the {layers} expert layers; choose 0 to {layers - 1}, which "
                         "count expert layers and not all layers")  # fmt: skip
    ax = _axes(ax)
    shares = [[n / sum(row) for n in row] for row in (r.load[layer].tolist() for r in records)]
    fair = 1 / len(shares[0])
    extent = (records[0].step - 0.5, records[-1].step + 0.5, len(shares[0]) - 0.5, -0.5)
    image = ax.imshow(
        list(zip(*shares, strict=True)), aspect="auto", cmap="cividis", vmin=0, vmax=3 * fair, extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    bar = ax.figure.colorbar(image, ax=ax, ticks=[0, fair, 2 * fair, 3 * fair])
    bar.ax.set_yticklabels(["0", "fair share", "2 x", "3 x"])
    bar.outline.set_edgecolor(INK)
    ax.set(xlabel="step", ylabel="expert")
    return ax


def _refuse_none(records: Sequence, where: str) -> None:
    if not len(records):
        raise ValueError(f"{where} got no records; give those of a run, for example list(training.train(...))")


def _axes(ax):
    import matplotlib.pyplot as plt

    return ax if ax is not None else plt.subplots()[1]


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width` before it."""
    return [sum(values[max(0, i - width) : i + 1]) / len(values[max(0, i - width) : i + 1]) for i in range(len(values))]
