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

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what torch's grouped product takes


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
    """The routed experts, stacked: gate_up_proj [expert, 2 * width, hidden], down_proj [expert, hidden, width]."""

    reads_few = True  # whether `forward_few` may stand in for `forward`

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
        gate, up = self.multiply(x, self.gate_up_proj, ends).chunk(2, dim=-1)
        return self.multiply(F.silu(gate) * up, self.down_proj, ends)

    def multiply(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Each row times its expert's matrix: see `grouped_linear`."""
        return grouped_linear(x, weights, ends)

    def forward_few(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x: [token, hidden], experts and weights: [token, choice]. Returns the weighted sums [token, hidden].

        Reads the chosen experts where they lie: for a token or two, sorting would cost more than the answer.
        """
        out = torch.zeros_like(x)
        for row, token, chosen, shares in zip(out, x, experts.tolist(), weights.tolist(), strict=True):
            for expert, share in zip(chosen, shares, strict=True):
                gate, up = torch.mv(self.gate_up_proj[expert], token).chunk(2)
                row.addmv_(self.down_proj[expert], F.silu(gate) * up, alpha=share)
        return out


class ExpertLayer(nn.Module):
    """Shared experts for every token and routed experts for the tokens that chose them.

    forward(x [batch, token, hidden]) -> the same shape. Afterwards `load` says how many tokens each expert got.
    """

    FEW = 16  # slots up to which experts are read one by one

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size  # several shared experts are one wider network
        self.shared_experts = SwiGLU(config.hidden_size, width) if width else None
        self._chosen = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        routed = self._routed(flat, self.gate(flat)).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    @property
    def load(self) -> Tensor:
        """How many tokens each expert got in the last forward pass: [expert] int64."""
        if self._chosen is None:
            raise ValueError("this layer has routed nothing yet; call the model first, then ask for its load")
        return torch.bincount(self._chosen.flatten(), minlength=len(self.experts.down_proj))

    def _routed(self, x: Tensor, routing: Routing) -> Tensor:
        experts, weights = routing.experts, routing.weights.to(x.dtype)
        self._chosen = experts
        if self.experts.reads_few and experts.numel() <= self.FEW and not torch.is_grad_enabled():
            return self.experts.forward_few(x, experts, weights)
        choices = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # slot = token * choices + choice, now sorted by expert
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        sent = Dispatch.apply(x, order, back, choices)
        answers = Permute.apply(self.experts(sent, self.load), back, order).unflatten(0, (-1, choices))
        return torch.bmm(weights[:, None], answers).squeeze(1)


class Permute(torch.autograd.Function):
    """Reorder rows. A permutation's gradient is its inverse: a read, where indexing would scatter and add."""

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
    if hasattr(F, "grouped_mm") and x.dtype in GROUPED_DTYPES and aligned and len(x):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    # unbind once: indexing each expert would make a gradient the size of all of them, every time
    return torch.cat([part @ weight.T for part, weight in zip(parts, weights.unbind(0), strict=True)])
