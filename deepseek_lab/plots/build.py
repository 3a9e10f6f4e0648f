"""Rebuild every static picture in figures/: `python -m deepseek_lab.plots.build`, from the root of the checkout."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .course_map import READY, course_map
from .style import use_style


def build(folder: Path = Path("figures")) -> list[Path]:
    """Write the pictures into `folder` and return their paths."""
    import matplotlib.pyplot as plt

    use_style()
    folder.mkdir(exist_ok=True)
    paths = []
    for number in READY:
        figure = course_map(number).figure
        paths.append(folder / f"map_{number}.png")
        figure.savefig(paths[-1], dpi=100, metadata={"Software": None})
        plt.close(figure)
    return paths


if __name__ == "__main__":
    matplotlib.use("Agg")
    for path in build():
        print(path)
