"""Pictures of what something consists of, and of what a cache grows to."""

from __future__ import annotations

from collections.abc import Mapping

from deepseek_lab.units import byte_unit, format_bytes

from .style import INK, PALETTE, part_colour


def parts_bar(parts: Mapping[str, float], total_text: str, spoken: Mapping[str, str], ax=None):
    """Draw one horizontal bar per part, longest first, each with its amount in words, and return the Axes.

    parts: amounts by name. spoken: the same amounts as text. total_text: what stands above the bars.
    """
    import matplotlib.pyplot as plt

    ordered = sorted(parts, key=parts.get, reverse=True)
    if ax is None:
        ax = plt.subplots(figsize=(7.2, 0.6 + 0.46 * len(parts)))[1]
    largest = max(parts.values())
    for row, name in enumerate(ordered):
        ax.barh(row, parts[name], color=part_colour(name), height=0.62)
        ax.text(parts[name] + 0.012 * largest, row, spoken[name], va="center", color=INK)
    ax.set_yticks(range(len(ordered)), ordered)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.28 * largest), xticks=[], title=total_text)
    ax.tick_params(axis="y", length=0)
    ax.spines[["bottom", "left"]].set_visible(False)
    return ax


def cache_growth(tokens: list[int], sizes: Mapping[str, list[int]], ax=None):
    """Draw the bytes of several caches over the number of tokens, each line with its name at its end; return the Axes.

    tokens: how many tokens were read. sizes: bytes at each of them, by the name of the cache.
    Raises ValueError for no cache and for more than can be told apart.
    """
    import matplotlib.pyplot as plt

    colours = [PALETTE["weights"], PALETTE["cache"], PALETTE["gradients"]]
    looks = [dict(color=colour, linestyle=dash) for dash in ("-", "--", "-.", ":") for colour in colours]
    if not 1 <= len(sizes) <= len(looks):
        raise ValueError(f"cache_growth got {len(sizes)} caches; give 1 to {len(looks)}, which can be told apart")
    ax = ax if ax is not None else plt.subplots()[1]
    lowest = min(values[-1] for values in sizes.values())
    unit, size = byte_unit(max(max(values) for values in sizes.values()))
    for look, (name, values) in zip(looks, sizes.items(), strict=False):
        ax.plot(tokens, [v / size for v in values], **look)
        label = f"{name}\n{format_bytes(values[-1])}"
        side = "bottom" if values[-1] == lowest else "center"  # clear of the axis and its last tick
        ax.annotate(label, (tokens[-1], values[-1] / size), xytext=(6, 0), textcoords="offset points", va=side)
    ax.set(xlabel="tokens read", ylabel=f"cache ({unit})", xlim=(0, tokens[-1] * 1.3), ylim=(0, None))
    ax.set_xticks([tokens[-1] * i // 4 for i in range(5)])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.grid(axis="y")
    return ax
