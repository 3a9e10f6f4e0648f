"""How the weights move: AdamW, with moments in 32 bits or in 16, and a running mean of the weights beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..experts.layer import wide
from .recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and none on the scales of norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if recipe.moments == "fp32" else NarrowAdamW
    return kind(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


class NarrowAdamW(torch.optim.AdamW):
    """AdamW whose two moments are kept in BF16: 4 bytes a parameter instead of 8, the arithmetic in float32.

    One parameter's moments at a time are made wide, moved by torch's own AdamW, and rounded to nearest again. A moment
    goes a tenth or a twentieth of the way to the new gradient: only a change below 2^-9 of it is lost to the rounding.
    Source: DeepSeek-V3 report, section 3.3.3.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize", "fused")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in "mv")
                moments = [state[name].to(p.dtype) for name in ("exp_avg", "exp_avg_sq")]
                adamw([p], [p.grad], *([m] for m in moments), [], [state["step"]], amsgrad=False,
                      beta1=group["betas"][0], beta2=group["betas"][1], **settings)  # fmt: skip
                state["exp_avg"].copy_(moments[0])
                state["exp_avg_sq"].copy_(moments[1])


@torch.no_grad()
def move_average(model: nn.Module, decay: float) -> None:
    """Move `model.average`, {name: tensor}, towards the weights by 1 - decay; it begins as their copy.

    It lies in the CPU's memory, as V3's does (report, section 3.2.3), in at least 32 bits.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if getattr(model, "average", None) is None:
        model.average = {name: p.to("cpu", wide(p.dtype), copy=True) for name, p in weights.items()}
        return
    for name, mean in model.average.items():
        mean.lerp_(weights[name].to(mean), 1 - decay)


@contextlib.contextmanager
@torch.no_grad()
def averaged(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model have its mean weights until the block ends, to evaluate or save them.

    Raises ValueError for a model that was not trained with an `ema_decay`.
    """
    if getattr(model, "average", None) is None:
        raise ValueError("this model has no running mean of its weights; train it with Recipe(ema_decay=0.99)")
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        for name, p in model.named_parameters():
            p.copy_(model.average[name])
        yield model
    finally:
        for name, p in model.named_parameters():
            p.copy_(own[name])
