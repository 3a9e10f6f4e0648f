"""A model drawn as the stack of its blocks, and one layer of it from within."""

from __future__ import annotations

from math import gcd

from deepseek_lab.config import ModelConfig

from .model_blocks import DENSE, EXPERT, FINAL, MODULE, block, block_names, pieces
from .sheet import Box, Line, Shape, Words
from .style import GREY, INK, PALETTE

TOP, BOTTOM = 58, 334
#: Roles that the palette has no colour of its own for are shades of the blue of experts, or grey.
COLOURS = {
    "embedding": PALETTE["embedding"], "embedding and output head": PALETTE["embedding"],
    "output head": PALETTE["embedding"], "norms": "#8C8C8C", FINAL: "#8C8C8C", "attention": PALETTE["attention"],
    "dense feed-forward": "#1F6F9F", "gate": "#0A3D5C", "shared experts": "#A9D6F2",
    "routed experts": PALETTE["experts"], MODULE: "#C9B8DC",
}  # fmt: skip
_STACK_LEFT, _STACK_RIGHT, _ROOM_LEFT, _ROOM_RIGHT = 30, 160, 190, 566
_GAP = 13

Lit = dict[str, bool]  # names of what is drawn in full colour, and whether it is the chosen block


def pale(colour: str) -> str:
    """Return the colour mixed with three parts of white."""
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 3 * 255) // 4:02X}" for i in (1, 3, 5))


def drawing(config: ModelConfig, name: str) -> list[Shape]:
    """Return the model on the left, from the tokens down, and on the right what is in a layer; block `name` marked.

    Boxes of the kind "block" carry the name of the block that they stand for.
    """
    names = block_names(config)
    lit = dict.fromkeys((piece.role for piece in block(config, name)), False) | {name: True}
    stack, layers = _stack(config, names, lit)
    return [*_zoom(layers), *stack, *_layer(config, names, lit)]


def _block(x: float, y: float, wide: float, high: float, name: str, lit: Lit, words: tuple[str, ...]) -> list[Shape]:
    """A box with its name in it, line by line; what is lit in full colour, the chosen one with a thick edge."""
    chosen, colour = lit.get(name, False), COLOURS.get(name, "#D0D0D0")
    ink = "#FFFFFF" if name in lit and _dark(colour) else INK
    fill = colour if name in lit else pale(colour)
    out: list[Shape] = [Box(x, y, wide, high, fill, INK if chosen else GREY, line=3.0 if chosen else 1.0)]
    first = y + high / 2 + 4.5 - 7.5 * (len(words) - 1)
    for number, text in enumerate(words):
        out.append(Words(x + wide / 2, first + 15 * number, text, "middle", chosen and not number, size=12, colour=ink))
    return [*out, Box(x, y, wide, high, kind="block", name=name)]


def _dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.6 * green + 0.1 * blue < 120


def _stack(config: ModelConfig, names: list[str], lit: Lit) -> tuple[list[Shape], tuple[float, float]]:
    """The model in the order in which a token meets it, and the top and the bottom of its layers."""
    parts = [n for n in names if n in ("embedding", "embedding and output head", DENSE, EXPERT, "layers", FINAL,
                                       "output head", MODULE)]  # fmt: skip
    heights = {DENSE: 38, FINAL: 18, MODULE: 34}
    tall = EXPERT if EXPERT in parts else "layers"
    rest = sum(heights.get(part, 24) for part in parts if part != tall) + _GAP * (len(parts) - 1)
    heights[tall] = BOTTOM - TOP - rest
    out, y, layers, places = [], float(TOP), [], {}
    for part in parts:
        high, stacked = heights.get(part, 24), part in (DENSE, EXPERT, "layers")
        if stacked:
            layers += [y, y + high]
            first, last = _layers_of(config, part)
            for offset in (6, 3)[first - last :] if first < last else ():  # more cards behind the first
                out.append(Box(_STACK_LEFT + offset, y - offset, _STACK_RIGHT - _STACK_LEFT, high, "#FFFFFF", GREY))
        words = (part, _which(config, part)) if stacked or part == MODULE else (part,)
        wide = _STACK_RIGHT - _STACK_LEFT
        out += _block(_STACK_LEFT, y, wide, high, part, lit, words)
        places[part] = y
        y += high + _GAP
    middle = (_STACK_LEFT + _STACK_RIGHT) / 2
    for part in parts[1:]:
        if part != MODULE:
            out += _arrow(middle, places[part] - _GAP, places[part])
    if MODULE in parts:
        out += _way_to_the_module(places[FINAL] + 9, places[MODULE] + 17)
    return out, (min(layers), max(layers))


def _which(config: ModelConfig, place: str) -> str:
    """Return how many layers a place has, and which."""
    first, last = _layers_of(config, place)
    count = last - first + 1
    return f"1 layer: {first}" if count == 1 else f"{count} layers: {first} to {last}"


def _layers_of(config: ModelConfig, place: str) -> tuple[int, int]:
    return next(p.layers for p in pieces(config) if p.place == place)


def _arrow(x: float, top: float, bottom: float) -> list[Shape]:
    head = ((x - 3.5, bottom - 6), (x + 3.5, bottom - 6), (x, bottom - 0.5))
    return [Line(((x, top), (x, bottom - 5)), INK), Line(head, INK, fill=INK)]


def _way_to_the_module(start: float, end: float) -> list[Shape]:
    """From the final norm around the head: the module reads the same states as the head does."""
    side, x = 16.0, float(_STACK_LEFT)
    head = ((x - 6, end - 3.5), (x - 6, end + 3.5), (x - 0.5, end))
    path = ((x, start), (side, start), (side, end), (x - 5, end))
    return [Line(path, INK, 1.2, (3, 2)), Line(head, INK, fill=INK)]


def _zoom(layers: tuple[float, float]) -> list[Shape]:
    """The room in which a layer is drawn, and the rays to it from the layers of the stack."""
    rays = (
        (_STACK_RIGHT + 6, layers[0] - 6),
        (_ROOM_LEFT, TOP),
        (_ROOM_LEFT, BOTTOM),
        (_STACK_RIGHT + 6, layers[1] - 6),
    )
    room = Box(_ROOM_LEFT, TOP, _ROOM_RIGHT - _ROOM_LEFT, BOTTOM - TOP, "#F6F6F6", "#D8D8D8")
    return [Line(rays, "#EEEEEE", fill="#EEEEEE"), room, Words(_ROOM_LEFT + 10, TOP + 16, "in each layer", size=12)]


def _layer(config: ModelConfig, names: list[str], lit: Lit) -> list[Shape]:
    """A layer from within: norm, attention, norm, and what works on each token alone."""
    left, right = _ROOM_LEFT + 10, _ROOM_RIGHT - 10
    out: list[Shape] = []
    for y in (TOP + 24, TOP + 136):
        out += _block(left, y, right - left, 16, "norms", lit, ("norm",))
    out += _attention(config, left, TOP + 50, right - left, lit)
    y, high = TOP + 162, BOTTOM - TOP - 172
    if EXPERT not in names:
        return [*out, *_block(left, y, right - left, high, "dense feed-forward", lit, ("dense feed-forward",))]
    if DENSE in names:
        out += _block(left, y, 82, high, "dense feed-forward", lit, ("dense", "feed-forward"))
        out.append(Words(left + 91, y + high / 2 + 4, "or", "middle", size=12))
        left += 100
    out += _block(left, y, 40, high, "gate", lit, ("gate",))
    left += 45
    if "shared experts" in names:
        count = config.n_shared_experts
        out += _block(left, y, 62, high, "shared experts", lit, (f"{count} shared", f"expert{'s' * (count > 1)}"))
        left += 67
    return [*out, *_routed(config, left, y, right - left, high, lit)]


def _attention(config: ModelConfig, x: float, y: float, wide: float, lit: Lit) -> list[Shape]:
    """The frame of attention; in it a row of matrices for the queries, one for keys and values, and the output."""
    out = _block(x, y, wide, 78, "attention", lit, ())
    hit, ink = out.pop(), "#FFFFFF" if "attention" in lit else INK
    out.append(Words(x + 8, y + 15, "attention", bold=lit.get("attention", False), size=12, colour=ink))
    chains: dict[str, list[str]] = {}
    for piece in pieces(config):
        _, matrix, ending = (*piece.row.name.split("."), "", "")[:3]
        if piece.role == "attention" and ending == "weight" and piece.place != MODULE:
            chains.setdefault(matrix.partition("_")[0], []).append(matrix)
    output = chains.pop("o")[0]
    slot, end = 56 / len(chains), x
    for number, chain in enumerate(chains.values()):
        at, top, high = x + 8, y + 20 + slot * number, slot - 4
        for matrix in dict.fromkeys(chain):
            name = "norm" if "norm" in matrix else matrix.removesuffix("_with_mqa")
            broad = 40 if name == "norm" else 66
            out += _matrix(at, top, broad, high, name)
            at += broad + 5
        end = max(end, at)
    last = x + wide - 62
    out += _matrix(last, y + 20, 54, 52, output)
    out.append(Words((end + last) / 2, y + 50, f"{config.num_attention_heads} heads", "middle", size=12, colour=ink))
    return [*out, hit]


def _matrix(x: float, y: float, wide: float, high: float, name: str) -> list[Shape]:
    return [Box(x, y, wide, high, "#FFFFFF", GREY), Words(x + wide / 2, y + high / 2 + 4, name, "middle", size=11)]


def _routed(config: ModelConfig, x: float, y: float, wide: float, high: float, lit: Lit) -> list[Shape]:
    """The routed experts as cells, of which as many are filled as work on one token."""
    name, count, used = "routed experts", config.n_routed_experts, config.num_experts_per_tok
    *out, hit = _block(x, y, wide, high, name, lit, ())
    out.append(Words(x + wide / 2, y + 16, f"{count} routed experts", "middle", lit.get(name, False), size=12))
    out.append(Words(x + wide / 2, y + high - 8, f"{used} work on a token", "middle", size=12))
    columns = next(n for n in range(1, count + 1) if count % n == 0 and count // n * (wide - 12) / n <= high - 46)
    across = (wide - 12) / columns
    down = min(1.5 * across, (high - 46) * columns / count)
    top, gap = y + (high - down * count / columns) / 2, 1 if across < 10 else 3
    stride = next(n for n in range(3 * count // 5, 2 * count) if gcd(n, count) == 1)  # scattered, none twice
    at_work = {i * stride % count for i in range(1, used + 1)}
    for number in range(count):
        row, column = divmod(number, columns)
        fill = COLOURS["gate"] if number in at_work else "#FFFFFF"
        cell = (x + 6 + gap / 2 + column * across, top + row * down, across - gap, down - gap)
        out.append(Box(*cell, fill, GREY, line=0.5, kind="expert", name=str(number)))
    return [*out, hit]
