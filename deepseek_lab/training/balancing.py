"""What a step does for the balance of the experts: losses before the gradient, biases after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import ModelConfig
from ..experts import Routing, balance
from ..model import Transformer
from .recipe import BALANCE_LOSSES, Recipe


def check_balance(config: ModelConfig, recipe: Recipe) -> None:
    """Raise ValueError for a loss that could pull at nothing in a model of this shape."""
    asked = [name for name in BALANCE_LOSSES if getattr(recipe, name)]
    if asked and not config.num_moe_layers:
        raise ValueError(f"Recipe has {asked[0]}={getattr(recipe, asked[0])}, but this model has no experts to balance")
    groups = [name for name in asked if name in ("device_loss", "communication_loss")]
    if groups and config.n_group < 2:
        raise ValueError(f"Recipe has {groups[0]}={getattr(recipe, groups[0])}, but n_group={config.n_group}: a device "
                         "is a group of experts, and one device is always in balance")  # fmt: skip


@contextlib.contextmanager
def listening(model: Transformer, recipe: Recipe, multi_token: bool = False) -> Iterator[list[Routing]]:
    """Collect what every router answers until the block ends; nothing, at no cost, if the recipe has no loss for it.

    multi_token: those of prediction modules too, here and in `rebalance`.
    """
    heard: list[Routing] = []
    wanted = any(getattr(recipe, name) for name in BALANCE_LOSSES)
    gates = [layer.gate for layer in model.expert_layers(multi_token)] if wanted else []
    hooks = [gate.register_forward_hook(lambda _gate, _inputs, routing: heard.append(routing)) for gate in gates]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(heard: list[Routing], batch: int, config: ModelConfig, recipe: Recipe) -> Tensor | float:
    """Return what is added to the loss: the recipe's losses times their factors, summed over the layers heard.

    batch: how many sequences the step saw. Every loss is taken per sequence, as DeepSeek's reports define them.
    """
    total = 0.0
    for routing in heard:
        scores, experts = (part.unflatten(0, (batch, -1)) for part in (routing.scores, routing.experts))
        if recipe.sequence_loss:
            total = total + recipe.sequence_loss * balance.sequence_loss(scores, experts.shape[-1])
        if recipe.expert_loss:
            total = total + recipe.expert_loss * balance.expert_loss(scores, experts)
        if recipe.device_loss:
            total = total + recipe.device_loss * balance.device_loss(scores, experts, config.n_group)
        if recipe.communication_loss:
            limit = config.n_group if config.topk_method == "greedy" else config.topk_group
            sent = balance.communication_loss(scores, experts, config.n_group, limit)
            total = total + recipe.communication_loss * sent
    return total


@torch.no_grad()
def rebalance(model: Transformer, speed: float, rule: str = "sign", multi_token: bool = False) -> tuple[Tensor, Tensor]:
    """Move every correction bias by the load of the step just done.

    Returns the loads [layer, expert] int64 and the new biases [layer, expert] float32, zeros where a router has none.
    """
    loads, biases = [], []
    for layer in model.expert_layers(multi_token):
        loads.append(layer.load)
        bias = getattr(layer.gate, "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(balance.update_bias(bias, loads[-1], speed, rule))
        biases.append(torch.zeros(loads[-1].shape, device=loads[-1].device) if bias is None else bias)
    if not loads:
        return torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0)
    return torch.stack(loads).cpu(), torch.stack(biases).cpu()
