"""Keep the experts equally busy without touching the loss.

A router that learns only from the loss soon sends everything to a few experts: those get better, so they are chosen
more often, so they get better. DeepSeek-V3 breaks the circle outside the gradient. Every expert carries a bias that
takes part in *choosing* experts and in nothing else; after each step the bias of an overloaded expert goes down by a
fixed amount and that of an underloaded one goes up.

Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1; DeepSeek-V3 report, section 2.1.2.
"""

import torch
from torch import Tensor


def update_bias(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """Return the biases for the next step.

    bias:  [expert] float32, what the router adds to its scores when it selects.
    load:  [expert] tokens each expert received in the whole batch.
    speed: how far one step moves a bias (V3: 0.001, then 0 for the last 500 B tokens).

    b_i <- b_i + speed * sign(mean(load) - load_i). An expert exactly at the mean stays where it is.
    """
    if bias.shape != load.shape:
        raise ValueError(
            f"update_bias got {tuple(bias.shape)} biases and {tuple(load.shape)} loads; one load per expert"
        )
    load = load.double()  # counts far above 2^24 would lose their last digits in float32
    return bias + speed * torch.sign(load.mean() - load).to(bias.dtype)


def max_violation(load: Tensor) -> float:
    """MaxVio: how much busier than the mean the busiest expert is; 0 is perfect balance.

    load: [expert] tokens, at least one of them above zero.
    """
    mean = load.double().mean()
    if mean == 0:
        raise ValueError("max_violation needs at least one routed token; every load is zero")
    return ((load.max() - mean) / mean).item()
