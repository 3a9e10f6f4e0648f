"""Rebuild every static picture in figures/: `python -m deepseek_lab.plots.build`, from the root of the checkout."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from ..accounting import MemoryState
from .course_map import READY, course_map
from .memory import memory_bar
from .style import use_style


def build(folder: Path = Path("figures")) -> list[Path]:
    """Write the pictures into `folder` and return their paths."""
    import matplotlib.pyplot as plt

    use_style()
    folder.mkdir(exist_ok=True)
    setting = MemoryState("deepseek-v3", "fp8", "latent", 131_072, 8, "16 x H800")
    before = MemoryState("deepseek-v3", "fp8", "expanded", 131_072, 8, "16 x H800")
    pictures = {f"map_{number}": lambda number=number: course_map(number) for number in READY}
    pictures["memory_bar"] = lambda: memory_bar(setting, previous=before)
    paths = []
    for name, draw in pictures.items():
        figure = draw().figure
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=100, metadata={"Software": None})
        plt.close(figure)
    return paths


if __name__ == "__main__":
    matplotlib.use("Agg")
    for path in build():
        print(path)
