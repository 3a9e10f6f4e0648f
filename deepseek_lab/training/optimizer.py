"""How the weights move: AdamW, a learning rate that warms up and then falls along a cosine, clipped gradients."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from ..experts.balance import RULES

BALANCE_LOSSES = ("sequence_loss", "expert_loss", "device_loss", "communication_loss")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides model and batches.

    Names and defaults are those of the DeepSeek-V3 report, section 4.2, where a toy can share them: AdamW with betas
    (0.9, 0.95) and weight decay 0.1, gradients clipped to norm 1. The learning rate is a small model's, the balance
    speed too: a run of a few hundred steps needs faster biases than one of hundreds of thousands (V3: 0.001).

    balance_speed and balance_rule are those of `experts.balance.update_bias`. The four losses are factors of the losses
    there, added per layer and sequence; devices are the model's groups. V3 has sequence_loss 1e-4 beside the bias, V2
    expert_loss 0.003, device_loss 0.05 and communication_loss 0.02 in its place. All zero: nobody balances.
    """

    steps: int
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_speed: float = 0.01
    balance_rule: str = "sign"
    sequence_loss: float = 0.0
    expert_loss: float = 0.0
    device_loss: float = 0.0
    communication_loss: float = 0.0

    def __post_init__(self):
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"Recipe got steps={self.steps!r}; a run has a whole number of steps, at least one")
        if self.balance_rule not in RULES:
            raise ValueError(f"Recipe got balance_rule={self.balance_rule!r}; choose one of {', '.join(RULES)}")
        for name, value in dataclasses.asdict(self).items():
            if name != "balance_rule" and not all(
                math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))
            ):
                raise ValueError(f"Recipe got {name}={value}; every setting is a finite number")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"final_learning_rate={self.final_learning_rate} is not between 0 and learning_rate="
                             f"{self.learning_rate}; the rate falls during a run")  # fmt: skip
        for name in BALANCE_LOSSES:
            if getattr(self, name) < 0:
                raise ValueError(
                    f"Recipe got {name}={getattr(self, name)}; a loss of imbalance is not rewarded: 0 or more"
                )
        if min(self.warmup_steps, self.balance_speed, self.weight_decay) < 0 or self.clip_norm <= 0:
            raise ValueError(f"Recipe got warmup_steps={self.warmup_steps}, balance_speed={self.balance_speed}, "
                             f"weight_decay={self.weight_decay}, clip_norm={self.clip_norm}; none is negative, and "
                             "clip_norm is above 0")  # fmt: skip

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear over `warmup_steps`, then a cosine to `final_learning_rate`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        fall = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + 0.5 * fall * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and none on the scales of norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
