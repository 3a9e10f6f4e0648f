"""Time several things in turns: everybody once per round, so that a busy moment of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable


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


def report(seconds: dict[str, list[float]], unit: str = "") -> None:
    """Print each median, and what share of every other run's time the first one takes."""
    first, *others = seconds
    print()
    for name, times in seconds.items():
        print(f"{name:34} {statistics.median(times) * 1e3:9.2f} ms{unit}")
    for name in others:
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        print(f"{first} takes {statistics.median(ratios):.3f} of {name} ({min(ratios):.3f} to {max(ratios):.3f})")
