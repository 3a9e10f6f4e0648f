"""Pictures of runs that differ in their arithmetic only: curves that should lie on each other, and errors of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .arrange import spread
from .style import GREY, PALETTE

_COLOURS = [PALETTE[part] for part in ("weights", "gradients", "cache", "moments", "activations")]
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))  # a second sign beside the colour, for grey
_LOOKS = [dict(color=colour, linestyle=dash) for colour, dash in zip(_COLOURS, _DASHES, strict=True)]
_APART = 0.075  # of the height: what one line of text needs


def run_curves(
    curves: Mapping[str, Sequence[float]], first: int, ylabel: str, bound: float | None = None, ax=None
):  # fmt: skip
    """Draw one curve per run over its steps, each with its name at its end, and return the Axes.

    curves: values by the name of the run, one per step from `first` on. bound: a grey band from -bound to bound, for
    curves of relative differences, which are then written in per cent.
    Raises ValueError for no run, more than can be told apart, and curves of different lengths.
    """
    import matplotlib.pyplot as plt

    _check(curves, "run_curves", "runs")
    ax = ax if ax is not None else plt.subplots()[1]
    steps = range(first, first + len(next(iter(curves.values()))))
    for look, (name, values) in zip(_LOOKS, curves.items(), strict=False):
        ax.plot(steps, values, linewidth=1.8, label=name, **look)
    if bound is not None:
        reach = 1.1 * max(1.3 * bound, *(abs(value) for values in curves.values() for value in values))
        ax.set_ylim(-reach, reach)
        ax.axhspan(-bound, bound, color="#E6E6E6", zorder=0)
        ax.axhline(0, color=GREY, linewidth=0.8, zorder=1, linestyle="-")
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.2f} %" if value else "0")
    ax.set(xlabel="step", ylabel=ylabel, xlim=(first, first + 1.3 * len(steps)))
    ax.set_xticks([tick for tick in ax.get_xticks() if first <= tick <= steps[-1] + 1])
    _name_ends(ax, steps[-1], curves)
    ax.grid(axis="y")
    return ax


def token_errors(errors: Mapping[str, Sequence[float]], ax=None):
    """Draw which share of the tokens has a relative error of at most how much, one curve per rule; return the Axes.

    errors: relative errors of the tokens, 0.02 is 2 %, by the name of the rule. Raises ValueError as `run_curves`.
    """
    import matplotlib.pyplot as plt

    _check(errors, "token_errors", "rules")
    ax = ax if ax is not None else plt.subplots()[1]
    count = len(next(iter(errors.values())))
    shares = [100 * (rank + 1) / count for rank in range(count)]
    for look, (name, values) in zip(_LOOKS, errors.items(), strict=False):
        ax.plot(sorted(values), shares, label=name, **look)
    ax.set_xscale("log")
    ax.set(xlabel="relative error of a token's gradient", ylabel="tokens with at most this error", ylim=(0, 101))
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    ax.grid()
    ax.legend(loc="lower right")
    return ax


def _name_ends(ax, last: int, curves: Mapping[str, Sequence[float]]) -> None:
    """Write each curve's name beside its end, moved apart where ends are close."""
    low, high = ax.get_ylim()
    ordered = sorted(enumerate(curves.items()), key=lambda item: item[1][1][-1])
    ends = [float(values[-1]) for _, (_, values) in ordered]
    for (index, (name, _)), at in zip(ordered, spread(ends, _APART * (high - low), low, high), strict=True):
        place = dict(xytext=(7, 0), textcoords="offset points", va="center", annotation_clip=False)
        ax.annotate(name, (last, at), color=_LOOKS[index]["color"], **place)


def _check(curves: Mapping[str, Sequence[float]], where: str, what: str) -> None:
    if not 1 <= len(curves) <= len(_LOOKS):
        raise ValueError(f"{where} got {len(curves)} {what}; give 1 to {len(_LOOKS)}, which can be told apart")
    if len(lengths := {len(values) for values in curves.values()}) > 1 or lengths == {0}:
        raise ValueError(f"{where} got curves of {sorted(lengths)} values; give each as many as the others")
