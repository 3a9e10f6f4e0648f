"""Where in a model a number first stopped being one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model import Transformer, multi_token_logits


@torch.no_grad()
def first_nonfinite(model: Transformer, batch: Tensor, losses: dict[str, Tensor], ahead: bool = False) -> str:
    """Say what is not finite: a weight, else the first output for the tokens [batch, token], else one of the losses.

    ahead: the prediction modules' outputs too.
    """
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
        multi_token_logits(model, batch) if ahead else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    odd = [name for name, loss in losses.items() if not torch.isfinite(loss)]
    return found[0] if found else f"all weights and outputs are finite, so it is the {', '.join(odd) or 'sum'} itself"


def first_odd_gradient(model: nn.Module) -> str:
    """Say which gradient is not finite, the one nearest to the loss; backward it went from there."""
    odd = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if not odd:
        return "every gradient is finite, their norm is not"
    return f"the gradient of {odd[-1][0]} is the first with {odd_value(odd[-1][1])}"


def odd_value(tensor: Tensor) -> str:
    """Return "nan" or "inf", whichever is there."""
    return "nan" if torch.isnan(tensor).any() else "inf"
