"""Choose a few experts for every token, and say how much each counts.

V3 scores with a sigmoid and adds a correction bias *for choosing only*; V2 scores with a softmax. Both can restrict a
token to a few groups of experts (a group lives on one node), so that it travels less.

Sources: DeepSeek-V3 report, equations 12 to 16 and section 2.1.2; DeepSeek-V2 report, equations 20 to 22; released code
for the scaling factor, which the V3 equations do not show.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..precision.matmul import without_autocast


class Routing(NamedTuple):
    """What the router decided for N tokens."""

    experts: Tensor  # [token, choice] int64, the best first
    weights: Tensor  # [token, choice] float32, what each chosen expert's answer is multiplied by
    scores: Tensor  # [token, expert] float32, without the correction bias


class Router(nn.Module):
    """The gate of one mixture-of-experts layer. forward(x [token, hidden]) -> Routing.

    Of two experts with equal scores the lower index is chosen. A score that is not a number counts as the largest, so
    the weights and the answer of its token are not numbers either, and nobody takes them for some.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def _apply(self, function, recurse=True):
        """Move the layer as torch does, but leave the correction bias in float32: a step of 0.001 is lost in BF16."""
        bias = self._buffers.get("e_score_correction_bias")
        super()._apply(function, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Tensor) -> Routing:
        c = self.config
        logits = self.score(x)
        scores = logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        experts = self.choose(scores.detach())
        weights = scores.gather(1, experts)  # the unbiased scores: the correction bias never touches the gate
        if c.norm_topk_prob:
            total = weights.sort(dim=-1).values.sum(dim=-1, keepdim=True)  # the same, in whatever order they come
            weights = weights / (total + 1e-20)
        return Routing(experts, weights * c.routed_scaling_factor, scores)

    def score(self, x: Tensor) -> Tensor:
        """Return the logits [token, expert], float32 whatever the model's dtype and autocast: near-ties decide."""
        return without_autocast(F.linear, x.float(), self.weight.float())

    def choose(self, scores: Tensor) -> Tensor:
        """Return the experts [token, choice] that these scores [token, expert] select, the best first."""
        c = self.config
        if c.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias
        if c.topk_method != "greedy" and c.topk_group < c.n_group:
            scores = scores.masked_fill(~self._kept(scores), float("-inf"))  # 0 would let a dropped expert win
        return largest(scores, c.num_experts_per_tok)

    def _kept(self, scores: Tensor) -> Tensor:
        """Which experts [token, expert] belong to one of the `topk_group` best groups."""
        c = self.config
        grouped = scores.unflatten(-1, (c.n_group, -1))  # [token, group, expert in group]
        total, first = grouped.max(dim=-1, keepdim=True)  # V2 takes the best of a group ...
        if c.topk_method == "noaux_tc":  # ... V3 adds the two best; for two, looking twice is faster than topk
            total = total + grouped.scatter(-1, first, float("-inf")).amax(-1, keepdim=True)
        groups = largest(total.squeeze(-1), c.topk_group)
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, groups, True)
        return kept[..., None].expand_as(grouped).flatten(1)


def largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of each row [..., count], the largest first, the lower index at a tie.

    `topk` is faster than a sort but leaves ties open: rows in which it met one are sorted.
    """
    if values.numel() <= 512:  # one sort costs less than looking for ties
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    top, indices = values.topk(min(count + 1, values.shape[-1]), dim=-1)
    clear = top[..., 1:] < top[..., :-1]  # False also for what is not a number
    if not clear.all():
        tied = ~clear.all(-1)
        indices[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[:, : top.shape[-1]]
    return indices[..., :count]
