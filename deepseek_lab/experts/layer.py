"""A feed-forward layer of many small networks, of which each token meets a few.

The weights of all experts are stacked. Tokens are sorted by expert, one grouped matrix product serves all experts, and
the answers go back to their tokens, weighted. No token is dropped, however busy its expert is (as in DeepSeek-V3),
unless one asks for the capacity of DeepSeek-V2.

Sources: DeepSeekMoE (arXiv 2401.06066), equations 9 to 11; DeepSeek-V3 report, equation 12; DeepSeek-V2 report,
section 2.2.4.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from ..kernels.reference_dispatch import ROWS
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

    forward(x [batch, token, hidden]) -> the same shape. Afterwards `load` says how many tokens chose each expert.

    With `capacity_factor` set, a device (a group of experts) that got more than so many times its fair share drops the
    choices with the lowest scores, while the layer is in training. A dropped choice is not computed and adds nothing;
    `dropped` counts those of the last pass. (DeepSeek-V2 takes 1.0, and drops nothing in a tenth of the sequences.)
    """

    FEW = 16  # slots up to which experts are read one by one
    capacity_factor: float | None = None
    dropped = 0

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
        """How many tokens chose each expert in the last forward pass: [expert] int64."""
        if self._chosen is None:
            raise ValueError("this layer has routed nothing yet; call the model first, then ask for its load")
        return torch.bincount(self._chosen.flatten(), minlength=len(self.experts.down_proj))

    def _routed(self, x: Tensor, routing: Routing) -> Tensor:
        experts, place = routing.experts.sort(dim=-1)  # answers add up in this order, whatever the bias says
        routing = Routing(experts, routing.weights.gather(1, place), routing.scores)
        weights = routing.weights.to(wide(x.dtype))
        self._chosen, self.dropped, gone = experts, 0, 0
        count, choices = len(self.experts.down_proj), experts.shape[1]
        if self.training and self.capacity_factor is not None:
            dropped = over_capacity(routing, self.gate.config.n_group, self.capacity_factor)
            self.dropped = gone = int(dropped.sum())
            experts = experts.masked_fill(dropped, count)  # sorted behind the last expert
        elif self.experts.reads_few and experts.numel() <= self.FEW and not torch.is_grad_enabled():
            return self.experts.forward_few(x, experts, weights)
        order = experts.flatten().argsort(stable=True)  # slot = token * choices + choice, now sorted by expert
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        sent = Dispatch.apply(x, order, back, choices)
        kept = torch.bincount(experts.flatten(), minlength=count)[:count]  # not `load`: a second thread may be in here
        # dropped choices get zeros; a slice of everything would still make a gradient of zeros to be filled
        answers = F.pad(self.experts(sent[:-gone], kept), (0, 0, 0, gone)) if gone else self.experts(sent, kept)
        return Combine.apply(answers, weights, order, back)


def over_capacity(routing: Routing, devices: int, factor: float) -> Tensor:
    """Return which choices [token, choice] find no room: those with the lowest scores on each device.

    A device holds the next experts in order, as many as any other, and has room for `factor` times the slots that it
    would get if all got the same, rounded up. Of equal scores the earlier token stays.
    """
    experts, scores = routing.experts, routing.scores.detach()
    if devices < 1 or scores.shape[1] % devices:
        raise ValueError(f"n_group={devices} does not divide {scores.shape[1]} experts; with a capacity_factor every "
                         "device (group) needs the same number")  # fmt: skip
    if not 0 < factor < math.inf:
        raise ValueError(f"capacity_factor={factor}; choose a number above 0, such as 1.0 (V2), or None for no limit")
    room = math.ceil(min(factor, devices) * experts.numel() / devices)
    device = (experts // (scores.shape[1] // devices)).flatten()
    best_first = scores.gather(1, experts).flatten().argsort(descending=True, stable=True)
    by_device = best_first[device[best_first].argsort(stable=True)]  # and on each device the best first
    sizes = torch.bincount(device, minlength=devices)
    place = torch.arange(len(device), device=device.device) - (sizes.cumsum(0) - sizes)[device[by_device]]
    return torch.empty_like(device, dtype=torch.bool).index_copy(0, by_device, place >= room).view_as(experts)


class Dispatch(torch.autograd.Function):
    """Copy each token once per choice, sorted by expert: x [token, hidden] -> [slot, hidden]."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order, back)
        ctx.choices = choices
        return moving(x).permute(x, order, choices)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        order, back = ctx.saved_tensors
        ones = gradient.new_ones(len(back) // ctx.choices, ctx.choices, dtype=wide(gradient.dtype))
        return Combine.apply(gradient, ones, order, back), None, None, None


class Combine(torch.autograd.Function):
    """Sum each token's answers by weight: answers [slot, hidden], weights [token, choice] -> [token, hidden].

    An inverse permutation reads where the gradient of indexing would scatter and add.
    """

    @staticmethod
    def forward(ctx, answers: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(answers, weights, order)
        return moving(answers).unpermute(answers, back, weights)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        answers, weights, order = ctx.saved_tensors
        body = kernels.reference if torch.is_grad_enabled() else moving(answers)  # gradients of gradients: by torch
        return *body.unpermute_gradients(gradient, answers, order, weights), None, None


def moving(rows: Tensor):
    """Return the module whose permute and unpermute these rows take: compiled on a CPU, elsewhere torch operations."""
    compiled = kernels.active() == "numba" and rows.device.type == "cpu" and rows.dtype in ROWS
    return kernels.body_for(rows) if compiled else kernels.reference


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


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
