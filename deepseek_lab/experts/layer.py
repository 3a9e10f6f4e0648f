"""A feed-forward layer of many small networks, of which each token meets a few.

The weights of all experts are stacked. Tokens are sorted by expert, one grouped matrix product serves all experts, and
the answers go back to their tokens, weighted. No token is dropped, however busy its expert is (as in DeepSeek-V3).

Source: DeepSeekMoE (arXiv 2401.06066), equations 9 to 11; DeepSeek-V3 report, equation 12.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .router import Router, Routing


class SwiGLU(nn.Module):
    """The feed-forward network of dense layers and shared experts: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The stacked weights of the routed experts: gate_up_proj [expert, 2 * width, hidden], down_proj [expert, hidden, width]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n, d, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * width, d))
        self.down_proj = nn.Parameter(torch.empty(n, d, width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: Tensor, load: Tensor) -> Tensor:
        """x: [slot, hidden], sorted by expert; load: [expert] slots of each. Returns [slot, hidden]."""
        ends = load.cumsum(0, dtype=torch.int32)
        gate, up = grouped_linear(x, self.gate_up_proj, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends)

    def forward_few(self, x: Tensor, experts: Tensor) -> Tensor:
        """x: [token, hidden], experts: [token, choice]. Returns [token, choice, hidden]; copies the chosen weights."""
        chosen = self.gate_up_proj[experts]  # [token, choice, 2 * width, hidden]
        gate, up = (chosen @ x[:, None, :, None]).chunk(2, dim=2)
        return (self.down_proj[experts] @ (F.silu(gate) * up)).squeeze(-1)


class ExpertLayer(nn.Module):
    """Shared experts for every token and routed experts for the tokens that chose them.

    forward(x [batch, token, hidden]) -> the same shape. Afterwards `load` [expert] says how many tokens each expert got.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size  # several shared experts are one wider network
        self.shared_experts = SwiGLU(config.hidden_size, width) if width else None
        self.load = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        routed = self._routed(flat, self.gate(flat)).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def _routed(self, x: Tensor, routing: Routing) -> Tensor:
        experts, weights = routing.experts, routing.weights.to(x.dtype)
        choices = experts.shape[1]
        slots = experts.flatten()  # slot = token * choices + choice
        self.load = torch.bincount(slots, minlength=len(self.experts.down_proj))
        if len(slots) <= 8 and not torch.is_grad_enabled():  # writing one token: sorting would cost more than it saves
            answers = self.experts.forward_few(x, experts)
        else:
            order = slots.argsort(stable=True)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            sent = Dispatch.apply(x, order, back, choices)
            answers = Permute.apply(self.experts(sent, self.load), back, order).unflatten(0, (-1, choices))
        return torch.bmm(weights[:, None], answers).squeeze(1)


class Permute(torch.autograd.Function):
    """Reorder rows. A permutation's gradient is the inverse permutation: a read, where indexing would scatter and add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class Dispatch(torch.autograd.Function):
    """Copy each token once per choice, sorted by expert: x [token, hidden] -> [slot, hidden]."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.choices = choices
        return x.index_select(0, order // choices)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        by_token = gradient.index_select(0, ctx.saved_tensors[0]).unflatten(0, (-1, ctx.choices))
        return by_token.sum(1), None, None, None


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows ends[e-1]:ends[e] of x [slot, in] by weights[e]^T ([expert, out, in]). Returns [slot, out].

    One fused call where torch has it and rows are whole multiples of 16 bytes, otherwise a loop over the experts.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if hasattr(F, "grouped_mm") and aligned and len(x):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    # unbind once: indexing each expert would make a gradient the size of all of them, every time
    return torch.cat([part @ weight.T for part, weight in zip(parts, weights.unbind(0), strict=True)])
