"""Keep the experts equally busy: by a bias outside the gradient, or by losses inside it.

A router that learns only from the loss soon sends everything to a few experts: those get better, so they are chosen
more often, so they get better. Losses break the circle by pulling at the scores, against what the model wants to learn.
DeepSeek-V3 breaks it outside the gradient. Every expert carries a bias that takes part in *choosing* experts and in
nothing else; after each step the bias of an overloaded expert goes down and that of an underloaded one goes up. A very
small loss, per sequence, remains.

Sources: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1; DeepSeek-V3 report, section 2.1.2,
equations 17 to 20; DeepSeek-V2 report, equations 23 to 31.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .router import largest

RULES = ("sign", "proportional")


def update_bias(bias: Tensor, load: Tensor, speed: float, rule: str = "sign") -> Tensor:
    """Return the biases for the next step.

    bias:  [expert] float32, what the router adds to its scores when it selects.
    load:  [expert] tokens each expert received in the whole batch.
    speed: how far one step moves a bias (V3: 0.001, then 0 for the last 500 B tokens).
    rule:  "sign": b_i <- b_i + speed * sign(mean(load) - load_i), as in V3; an expert exactly at the mean stays.
           "proportional": b_i <- b_i + speed * (mean(load) - load_i) / mean(load). The paper's variant counts the
           difference in tokens; in means, one speed serves every batch size, and an idle expert moves by `speed`.
    """
    if bias.shape != load.shape:
        raise ValueError(
            f"update_bias got {tuple(bias.shape)} biases and {tuple(load.shape)} loads; one load per expert"
        )
    if rule not in RULES:
        raise ValueError(f"update_bias got rule={rule!r}; choose 'sign' (V3) or 'proportional'")
    load = load.double()  # counts far above 2^24 would lose their last digits in float32
    error = load.mean() - load
    error = torch.sign(error) if rule == "sign" else error / load.mean().clamp(min=1e-300)  # no token at all: 0
    return bias + speed * error.to(bias.dtype)


# Losses: each without its factor (V3: 1e-4; V2: 0.003, 0.05 and 0.02), a scalar with a gradient to the scores ---------


def sequence_loss(scores: Tensor, choices: int) -> Tensor:
    """V3's complement to the bias: sum of f_i P_i in every sequence, averaged; 1 where a sequence uses all alike.

    scores: [batch, token, expert], of a `Routing`, without the bias. choices: experts per token. As printed, f counts
    the best `choices` of the unbiased scores, whatever bias and groups made of them.
    """
    return expert_loss(scores, largest(scores.detach(), choices))


def expert_loss(scores: Tensor, experts: Tensor) -> Tensor:
    """V2's expert-level loss: sum of f_i P_i.

    scores: [..., token, expert], experts: [..., token, choice], of a `Routing`. What stands before them is sequences,
    and their losses are averaged; without it all tokens count as one. f_i is the share of tokens that chose expert i,
    1 if all are alike, and has no gradient. P_i is its mean score, as a share of the token's scores: those of a softmax
    are shares already, those of a sigmoid could otherwise escape the loss by all getting smaller.
    """
    return (_frequency(scores, experts) * _probability(scores)).sum(-1).mean()


def device_loss(scores: Tensor, experts: Tensor, devices: int) -> Tensor:
    """V2's device-level loss: like `expert_loss`, with f averaged and P summed over the experts of each device."""
    _check_devices(scores, devices)
    frequency = _frequency(scores, experts).unflatten(-1, (devices, -1)).mean(-1)
    return (frequency * _probability(scores).unflatten(-1, (devices, -1)).sum(-1)).sum(-1).mean()


def communication_loss(scores: Tensor, experts: Tensor, devices: int, limit: int) -> Tensor:
    """V2's communication loss: sum of f''_D P''_D, where f''_D = devices / (limit T) * tokens sent to device D.

    limit: on how many devices a token may go (`topk_group`); a token counts once per device, however many experts it
    meets there.
    """
    _check_devices(scores, devices)
    if not 1 <= limit <= devices:
        raise ValueError(f"communication_loss got limit={limit}; a token goes to between 1 and {devices} devices")
    _check_tokens(scores, experts)
    device = experts // (scores.shape[-1] // devices)
    sent = scores.new_zeros(*scores.shape[:-1], devices).scatter_(-1, device, 1.0)
    frequency = sent.mean(-2) * (devices / limit)
    return (frequency * _probability(scores).unflatten(-1, (devices, -1)).sum(-1)).sum(-1).mean()


def _frequency(scores: Tensor, experts: Tensor) -> Tensor:
    """f: [..., expert], how often each was chosen, in units of the fair share."""
    _check_tokens(scores, experts)
    count, (tokens, choices) = scores.shape[-1], experts.shape[-2:]
    chosen = experts.flatten(-2)
    ones = torch.ones_like(chosen, dtype=scores.dtype)
    counts = scores.new_zeros(*chosen.shape[:-1], count).scatter_add_(-1, chosen, ones)
    return counts * (count / (choices * tokens))


def _probability(scores: Tensor) -> Tensor:
    """P: [..., expert], the mean share of each expert in its tokens' scores."""
    return (scores / (scores.sum(-1, keepdim=True) + 1e-20)).mean(-2)


def _check_tokens(scores: Tensor, experts: Tensor) -> None:
    if scores.dim() < 2 or scores.shape[:-1] != experts.shape[:-1] or not scores.numel():
        raise ValueError(f"a balance loss got scores {tuple(scores.shape)} and experts {tuple(experts.shape)}; "
                         "expected [..., token, expert] and [..., token, choice] of the same tokens")  # fmt: skip


def _check_devices(scores: Tensor, devices: int) -> None:
    if devices < 1 or scores.shape[-1] % devices:
        raise ValueError(f"devices={devices} does not divide {scores.shape[-1]} experts; every device needs as many")


# Measures -------------------------------------------------------------------------------------------------------------


def max_violation(load: Tensor) -> float:
    """MaxVio: how much busier than the mean the busiest expert is; 0 is perfect balance.

    load: [expert] tokens of one batch, at least one of them above zero.
    """
    return _violations(load).item()


def global_violation(loads: Iterable[Tensor]) -> float:
    """MaxVio of a whole validation set: the loads [expert] of its batches are added first."""
    return max_violation(sum(loads, torch.zeros(1, dtype=torch.int64)))


def _violations(load: Tensor) -> Tensor:
    """MaxVio of every [..., expert] -> [...] float64."""
    mean = load.double().mean(-1)
    if (mean == 0).any():
        raise ValueError("max_violation needs at least one routed token; every load is zero")
    return (load.amax(-1) - mean) / mean


@dataclass(frozen=True, eq=False)
class LoadHistory:
    """How busy every expert was at every step of a run, and what its bias was afterwards."""

    loads: Tensor  # [step, layer, expert] int64 tokens
    biases: Tensor  # [step, layer, expert] float32, zeros where the router has none

    def __post_init__(self):
        if self.loads.dim() != 3 or not self.loads.numel() or self.loads.shape != self.biases.shape:
            raise ValueError(f"LoadHistory got loads {tuple(self.loads.shape)} and biases {tuple(self.biases.shape)}; "
                             "both are [step, layer, expert], of a model with experts")  # fmt: skip

    @classmethod
    def of(cls, records: Iterable) -> LoadHistory:
        """Collect the `load` and the `bias` of training's `StepRecord`s, in their order."""
        records = list(records)
        if len({(r.load.shape, r.bias.shape) for r in records}) != 1:
            got = "records of different models" if records else "no records"
            raise ValueError(f"LoadHistory.of got {got}; give those of one run, at least one step")
        return cls(torch.stack([r.load for r in records]), torch.stack([r.bias for r in records]))

    @property
    def max_violation(self) -> Tensor:
        """MaxVio of every batch, [step, layer] float64."""
        return _violations(self.loads)

    @property
    def dead(self) -> Tensor:
        """How many experts got no token, [step, layer] int64."""
        return (self.loads == 0).sum(-1)
