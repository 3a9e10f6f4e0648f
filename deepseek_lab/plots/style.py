"""One look for every figure of the course: one font size, one colour per part, white ground.

The colours are Okabe and Ito's, which people with the common kinds of colour blindness tell apart. A figure names its
parts in words as well, so that nothing is lost in grey. Source: jfly.uni-koeln.de/color (Okabe, Ito 2002).
"""

from __future__ import annotations

INK = "#111111"
GREY = "#8C8C8C"

#: One fixed colour per part, in every figure and widget.
PALETTE: dict[str, str] = {
    "weights": "#0072B2",
    "gradients": "#D55E00",
    "moments": "#CC79A7",
    "activations": "#E69F00",
    "cache": "#009E73",
    "experts": "#56B4E9",
    "attention": "#3B4CC0",
    "embedding": "#F0E442",
    "other": "#8C8C8C",
}
FONT_SIZE = 12  # points: a figure of 7.2 inches still reads at half its width

_RC = {
    "figure.figsize": (7.2, 3.8),
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": FONT_SIZE,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": FONT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "font.size": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "legend.frameon": False,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 2.2,
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "deepseek_lab",
}


def part_colour(name: str) -> str:
    """Return the colour of a part: that of the first word of the palette that occurs in its name."""
    return next((colour for word, colour in PALETTE.items() if word.rstrip("s") in name), PALETTE["other"])


def style() -> dict:
    """Return the course's settings as a dictionary for `matplotlib.rc_context`."""
    from cycler import cycler

    order = ("weights", "gradients", "cache", "activations", "moments", "experts", "attention")
    # A second sign beside the colour: lines stay apart in greyscale.
    dashes = ["-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
    return {**_RC, "axes.prop_cycle": cycler(color=[PALETTE[name] for name in order], linestyle=dashes)}


def use_style() -> None:
    """Give every figure made from now on the look of the course."""
    import matplotlib

    matplotlib.rcParams.update(style())
