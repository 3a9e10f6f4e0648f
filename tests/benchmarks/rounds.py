"""Time several things in turns: everybody once per round, so that a busy moment of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable

#: What was asked for and measured in this run: (what, against, measured, at most, aim).
TABLE: list[tuple] = []


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every run, by name, one per round, after one round that does not count."""
    seconds = {name: [] for name in runs}
    for counted in [False] + [True] * rounds:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(
    seconds: dict[str, list[float]], unit: str = "", asked: dict[str, tuple[float, float]] | None = None
) -> None:
    """Print each median, and what share of every other run's time the first one takes.

    asked: for some of the others, the largest share that the course accepts and the one it aims at. They go into TABLE.
    """
    first, *others = seconds
    print()
    for name, times in seconds.items():
        print(f"{name:34} {statistics.median(times) * 1e3:9.2f} ms{unit}")
    for name in others:
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        print(f"{first} takes {statistics.median(ratios):.3f} of {name} ({min(ratios):.3f} to {max(ratios):.3f})")
        if asked and name in asked:
            TABLE.append((first, name, statistics.median(ratios), *asked[name]))
