"""How the weights move: AdamW, a learning rate that warms up and then falls along a cosine, clipped gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides model and batches.

    Names and defaults are those of the DeepSeek-V3 report, section 4.2, where a toy can share them: AdamW with betas
    (0.9, 0.95) and weight decay 0.1, gradients clipped to norm 1. The learning rate is a small model's, the balance
    speed too: a run of a few hundred steps needs faster biases than one of hundreds of thousands (V3: 0.001).
    """

    steps: int
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_speed: float = 0.01

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Recipe got steps={self.steps}; a run has at least one step")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"final_learning_rate={self.final_learning_rate} is not between 0 and learning_rate="
                             f"{self.learning_rate}; the rate falls during a run")  # fmt: skip
        if self.warmup_steps < 0 or self.clip_norm <= 0 or self.balance_speed < 0:
            raise ValueError(f"Recipe got warmup_steps={self.warmup_steps}, clip_norm={self.clip_norm}, balance_speed="
                             f"{self.balance_speed}; they are >= 0, > 0 and >= 0")  # fmt: skip

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
