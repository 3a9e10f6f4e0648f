"""What a token's way to its experts costs: nodes that it touches, and bytes out and back."""

from __future__ import annotations

import math

from deepseek_lab.config import ModelConfig

from .ledger import Ledger, Line
from .memory import TILE
from .shapes import refuse_other_than_config

_OUT = "DeepSeek-V3 report, section 3.3.3: activations are dispatched in FP8; DeepEP README: one FP32 scale for 128"
_BACK = "DeepSeek-V3 report, section 3.3.3: answers are combined in BF16"


def expected_nodes(experts: int, nodes: int, choices: int) -> float:
    """Return on how many nodes a token's experts lie on average if every choice is equally likely.

    experts: in all, the same number on every node. choices: different experts of one token. V3 without its limit,
    `expected_nodes(256, 8, 8)`: 5.2947. A node is missed if all choices fall among the experts of the others.
    Raises ValueError for nodes that do not divide the experts and for more choices than experts.
    """
    for name, value in (("experts", experts), ("nodes", nodes), ("choices", choices)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; choose a whole number >= 1")
    if experts % nodes or choices > experts:
        raise ValueError(f"expected_nodes got experts={experts}, nodes={nodes}, choices={choices}; choose nodes that "
                         "divide the experts, and no more choices than experts")  # fmt: skip
    missed = math.comb(experts - experts // nodes, choices) / math.comb(experts, choices)
    return min(nodes * (1 - missed), float(choices))  # which rounding may exceed


def dispatch_bytes(config: ModelConfig, nodes: float | None = None) -> Ledger:
    """Return the bytes of one token and one layer: a copy to each node that it touches, and an answer back from each.

    nodes: how many it touches, or how many on average; unless told the most that the model's limit allows. A token's
    own node is counted like the others, though nothing goes over the network to it. Inside a node, copies and answers
    travel on to every expert; they are not counted. Raises ValueError for a model without experts, and for more nodes
    than a token has experts.
    """
    refuse_other_than_config(config)
    if not config.n_routed_experts:
        raise ValueError("dispatch_bytes needs n_routed_experts; this model has none, so no token travels to experts")
    most = config.num_experts_per_tok
    limit = most if config.topk_method == "greedy" else min(config.topk_group, most)
    keys = ("hidden_size", "topk_group") if nodes is None else ("hidden_size",)
    nodes = limit if nodes is None else nodes
    if isinstance(nodes, bool) or not isinstance(nodes, (int, float)) or not 0 < nodes <= most:
        raise ValueError(f"nodes={nodes!r}; choose a number above 0 and up to num_experts_per_tok={most}")
    width, scales = config.hidden_size, -(-config.hidden_size // TILE)
    codes = Line("codes", nodes * width, "bytes", f"{nodes:g} nodes × {width:,} × 1 byte", keys, _OUT)
    scale = Line("scales", nodes * scales * 4, "bytes", f"{nodes:g} nodes × {scales:,} × 4 bytes", keys, _OUT)
    back = Line("combine", nodes * width * 2, "bytes", f"{nodes:g} nodes × {width:,} × 2 bytes", keys, _BACK)
    return Ledger("one token in one layer", (Ledger("dispatch", (codes, scale)), back))
