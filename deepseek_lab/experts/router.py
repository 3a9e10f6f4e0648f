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


class Routing(NamedTuple):
    """What the router decided for N tokens."""

    experts: Tensor  # [token, choice] int64, the best first
    weights: Tensor  # [token, choice] float32, what each chosen expert's answer is multiplied by
    scores: Tensor  # [token, expert] float32, without the correction bias


class Router(nn.Module):
    """The gate of one mixture-of-experts layer. forward(x [token, hidden]) -> Routing."""

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
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * c.routed_scaling_factor, scores)

    def score(self, x: Tensor) -> Tensor:
        """Return the logits [token, expert], float32 whatever the model's dtype: near-ties decide experts."""
        return F.linear(x.float(), self.weight.float())

    def choose(self, scores: Tensor) -> Tensor:
        """Return the experts [token, choice] that these scores [token, expert] select, the best first."""
        c = self.config
        if c.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias
        if c.topk_method != "greedy" and c.topk_group < c.n_group:
            scores = scores.masked_fill(~self._kept(scores), float("-inf"))  # 0 would let a dropped expert win
        return scores.topk(c.num_experts_per_tok, dim=-1).indices

    def _kept(self, scores: Tensor) -> Tensor:
        """Which experts [token, expert] belong to one of the `topk_group` best groups."""
        c = self.config
        grouped = scores.unflatten(-1, (c.n_group, -1))  # [token, group, expert in group]
        best = 2 if c.topk_method == "noaux_tc" else 1  # V3 adds the two best of a group, V2 takes the best
        groups = grouped.topk(best, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, groups, True)
        return kept[..., None].expand_as(grouped).flatten(1)
