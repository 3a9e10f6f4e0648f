"""Which numbers of a matrix share a scale in each of a linear layer's three products, and which way one adds up."""

from __future__ import annotations

from .style import GREY, INK, PALETTE

_TILE = 0.25  # what 128 numbers are long, in a matrix of width or height 1
_THIN = 1 / 24  # one row of a 1 x 128 tile
# Product, and its two factors: name, axes [down, right], tile [high, wide], the axis that is summed over.
_PRODUCTS = (
    ("forward:  y = x W\u1d40", ("x", "tokens", "channels", (_THIN, _TILE), "right"),
     ("W", "outputs", "channels", (_TILE, _TILE), "right")),
    ("gradient of x:  g W", ("g", "tokens", "outputs", (_THIN, _TILE), "right"),
     ("W", "outputs", "channels", (_TILE, _TILE), "down")),
    ("gradient of W:  g\u1d40 x", ("g", "tokens", "outputs", (_TILE, _THIN), "down"),
     ("x", "tokens", "channels", (_TILE, _THIN), "down")),
)  # fmt: skip


def shared_scales():
    """Draw the three products of a linear layer, the cells that share a scale and the axis summed over; return Axes.

    Cells are 1 x 128, 128 x 128 and 128 x 1, as in the DeepSeek-V3 report, section 3.3.2. One Axes for each product.
    """
    import matplotlib.pyplot as plt

    axes = plt.subplots(1, 3, figsize=(11, 2.5))[1]
    for ax, (title, *factors) in zip(axes, _PRODUCTS, strict=True):
        ax.set_title(title)
        for left, factor in zip((0.0, 1.55), factors, strict=True):
            _matrix(ax, left, *factor)
        ax.set(xlim=(-0.25, 2.75), ylim=(-1.15, 0.16), aspect="equal")
        ax.axis("off")
    return axes


def _matrix(ax, left: float, name: str, down: str, right: str, tile: tuple[float, float], summed: str) -> None:
    import matplotlib.pyplot as plt

    high, wide = tile
    for y in range(round(1 / high)):
        for x in range(round(1 / wide)):
            shade = PALETTE["weights"] if (x, y) == (1, 1) else "white"
            cell = dict(facecolor=shade, edgecolor=GREY, linewidth=0.5)
            ax.add_patch(plt.Rectangle((left + x * wide, -(y + 1) * high), wide, high, **cell))
    ax.add_patch(plt.Rectangle((left, -1), 1, 1, fill=False, edgecolor=INK, linewidth=1.4))
    start, end = ((left, -1.07), (left + 1, -1.07)) if summed == "right" else ((left + 1.07, 0), (left + 1.07, -1))
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=PALETTE["gradients"], linewidth=2.2))
    ax.text(left, 0.04, name, weight="bold", color=INK)
    ax.text(left + 1, 0.04, right, ha="right", color=INK)
    ax.text(left - 0.04, -0.5, down, rotation=90, ha="right", va="center", color=INK)
