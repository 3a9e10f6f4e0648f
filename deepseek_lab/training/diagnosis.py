"""Where in a model a number first stopped being one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite(model: nn.Module, batch: Tensor) -> str:
    """Say which tensor of a model is not finite: a weight, else the first output for the tokens [batch, token]."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            return f"the weight {name} holds {odd_value(tensor)}"
    found: list[str] = []

    def listen(name: str):
        def hook(_module, _inputs, output):
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    found.append(f"the output of {name} is the first with {odd_value(tensor)}")

        return hook

    hooks = [module.register_forward_hook(listen(name)) for name, module in model.named_modules() if name]
    try:
        model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "all weights and all outputs are finite, so it is the loss itself"


def first_odd_gradient(model: nn.Module) -> str:
    """Say which gradient is not finite, the one nearest to the loss; backward it went from there."""
    names = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return f"the gradient of {names[-1]} is not finite" if names else "every gradient is finite, their norm is not"


def odd_value(tensor: Tensor) -> str:
    """Return "nan" or "inf", whichever is there."""
    return "nan" if torch.isnan(tensor).any() else "inf"
