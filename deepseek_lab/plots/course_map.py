"""The map of the course: every notebook in its part, with the one the reader is in marked."""

from __future__ import annotations

from .style import GREY, INK, PALETTE

#: Parts and their notebooks, in reading order; the title is the file's name without its number.
COURSE: dict[str, tuple[str, ...]] = {
    "Start": ("00 start here",),
    "I  Smaller vehicles": ("01 number formats", "02 block scaling", "03 fp8 matmul", "04 fp8 training"),
    "II  The compressed cache": (
        "05 prefill and decode", "06 sharing heads", "07 latent attention", "08 long context",
    ),
    "III  Only the relevant part": ("09 sparse experts", "10 balancing experts"),
    "IV  The model": (
        "11 assemble the model", "12 train the model", "13 multi-token prediction", "14 serving",
    ),
    "V  The bill": ("15 memory budget", "16 the bill", "17 many GPUs"),
    "VI  Reasoning": ("18 R1-Zero", "19 distillation"),
    "VII  What came next": ("20 sparse attention", "21 compressed attention", "22 a real model"),
}  # fmt: skip
#: Notebooks that can be opened today.
READY = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13")
_COLUMNS, _ROW = 4, 0.165


def course_map(here: str, ax=None):
    """Draw the map with notebook `here` ("00" to "22") marked, and return the Axes.

    Notebooks that exist are printed dark, those to come grey. Raises ValueError for a number that is not on the map.
    """
    import matplotlib.pyplot as plt

    numbers = [title[:2] for titles in COURSE.values() for title in titles]
    if here not in numbers:
        raise ValueError(f"notebook {here!r} is not on the map; choose one of {', '.join(numbers)}")
    ax = ax if ax is not None else plt.subplots(figsize=(12, 3.4))[1]
    for index, (part, titles) in enumerate(COURSE.items()):
        left, top = index % _COLUMNS, -(index // _COLUMNS)
        inside = any(title.startswith(here) for title in titles)
        edge = PALETTE["weights"] if inside else "#CCCCCC"
        box = plt.Rectangle((left + 0.02, top - 0.93), 0.96, 0.9, facecolor="white", edgecolor=edge, linewidth=2)
        ax.add_patch(box)
        ax.text(left + 0.07, top - 0.14, part, weight="bold", va="center", color=INK)
        for row, title in enumerate(titles):
            _title(ax, left + 0.07, top - 0.31 - _ROW * row, title, here)
    ax.set(xlim=(0, _COLUMNS), ylim=(-1.98, 0.02))
    ax.axis("off")
    return ax


def _title(ax, x: float, y: float, title: str, here: str) -> None:
    if title.startswith(here):
        look = dict(facecolor=PALETTE["weights"], edgecolor="none", boxstyle="round,pad=0.25")
        ax.text(x + 0.02, y, f"▸ {title}", va="center", color="white", weight="bold", bbox=look)
    else:
        ax.text(x, y, title, va="center", color=INK if title[:2] in READY else GREY)
