"""What decides a training run besides model and batches, as one frozen object with its schedules."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real

from ..experts.balance import RULES
from ..model.recompute import checked as recomputable
from ..precision import FloatFormat, PrecisionPolicy
from ..precision.policy import checked

BALANCE_LOSSES = ("sequence_loss", "expert_loss", "device_loss", "communication_loss")
MOMENTS = ("fp32", "bf16")

Schedule = float | tuple[tuple[int, float], ...]  # one value, or ((first step, value), ...)

_NAMES = ("precision", "moments", "recompute", "balance_rule")  # settings that are no numbers
_SCHEDULES = ("balance_speed", "multi_token_weight", "tail")
_PAIRS = {"betas": "two shares, such as (0.9, 0.95)", "batch_ramp": "(sequences of the first step, steps)"}

# What files of runs have always said; later settings are written where they are used, so that older files go on.
_ALWAYS = {"steps", "learning_rate", "final_learning_rate", "warmup_steps", "betas", "weight_decay", "clip_norm",
           "balance_speed"}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides model and batches.

    Names and defaults are those of the DeepSeek-V3 report, section 4.2, where a toy can share them: AdamW with betas
    (0.9, 0.95) and weight decay 0.1, gradients clipped to norm 1. The learning rate is a small model's, the balance
    speed too: a run of a few hundred steps needs faster biases than one of hundreds of thousands (V3: 0.001).

    Learning rate: linear over warmup_steps, constant for constant_steps, a cosine to final_learning_rate, and from
    each step named in `tail`, ((step, rate), ...), the rate beside it; the cosine ends where the tail begins.
    batch_ramp: (sequences of the first step, steps until the batch is whole), linear between; None: always whole.
    precision: the `PrecisionPolicy` that the model computes by, moments: "fp32" or "bf16", recompute: names of
    `model.RECOMPUTABLE`; None leaves the model as it is. ema_decay: keep a running mean of the weights, see `averaged`.
    multi_token_weight: what the prediction modules' losses count, 0.3 and later 0.1 in V3; 0 leaves them alone.
    balance_speed and balance_rule are those of `experts.balance.update_bias`. The four losses are factors of the losses
    there, added per layer and sequence; devices are the model's groups. V3 has sequence_loss 1e-4 beside the bias, V2
    expert_loss 0.003, device_loss 0.05 and communication_loss 0.02 in its place. All zero: nobody balances.
    balance_speed and multi_token_weight are numbers or schedules: ((first step, value), ...), from step 0 on.
    Raises ValueError naming the setting that makes no recipe.
    """

    steps: int
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    warmup_steps: int = 50
    constant_steps: int = 0
    tail: tuple[tuple[int, float], ...] = ()
    batch_ramp: tuple[int, int] | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: PrecisionPolicy | None = None
    moments: str = "fp32"
    recompute: tuple[str, ...] | None = None
    ema_decay: float | None = None
    multi_token_weight: Schedule = 0.3
    balance_speed: Schedule = 0.01
    balance_rule: str = "sign"
    sequence_loss: float = 0.0
    expert_loss: float = 0.0
    device_loss: float = 0.0
    communication_loss: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            object.__setattr__(self, name, _tidy(value))
        if isinstance(self.precision, dict):
            object.__setattr__(self, "precision", PrecisionPolicy(**self.precision))
        self._check_names()
        self._check_numbers()
        self._check_rates()
        self._check_schedules()

    def _check_names(self) -> None:
        for name, known in (("balance_rule", RULES), ("moments", MOMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Recipe got {name}={getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.precision is not None:
            checked(self.precision, "Recipe")
        if self.recompute is not None:
            object.__setattr__(self, "recompute", tuple(sorted(recomputable(self.recompute))))

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _NAMES or name in _SCHEDULES or (value is None and field.default is None):
                continue
            if isinstance(value, tuple) != (name in _PAIRS) or (name in _PAIRS and len(value) != 2):
                raise ValueError(f"Recipe got {name}={value!r}; expected {_PAIRS.get(name, 'one number')}")
            whole = field.type == "int" or name == "batch_ramp"
            if not all(_is_number(v, whole) for v in (value if name in _PAIRS else [value])):
                kind = "whole" if whole else "finite"
                raise ValueError(f"Recipe got {name}={value!r}; every number of it is a {kind} one")

    def _check_rates(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Recipe got steps={self.steps}; a run has at least one step")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"final_learning_rate={self.final_learning_rate} is not between 0 and learning_rate="
                             f"{self.learning_rate}; the rate falls during a run")  # fmt: skip
        for name in BALANCE_LOSSES:
            if getattr(self, name) < 0:
                raise ValueError(f"Recipe got {name}={getattr(self, name)}; no loss rewards imbalance: 0 or more")
        if min(self.warmup_steps, self.constant_steps, self.weight_decay) < 0 or self.clip_norm <= 0:
            raise ValueError(f"Recipe got warmup_steps={self.warmup_steps}, constant_steps={self.constant_steps}, "
                             f"weight_decay={self.weight_decay}, clip_norm={self.clip_norm}; none is negative, and "
                             "clip_norm is above 0")  # fmt: skip
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Recipe got betas={self.betas}; both are from 0 to below 1")
        if self.batch_ramp is not None and min(self.batch_ramp) < 1:
            raise ValueError(f"Recipe got batch_ramp={self.batch_ramp}; sequences and steps are at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"Recipe got ema_decay={self.ema_decay}; choose a share between 0 and 1, such as 0.99")

    def _check_schedules(self) -> None:
        for name in _SCHEDULES:
            value = getattr(self, name)
            pairs = value if isinstance(value, tuple) else ((0, value),) if name != "tail" else (value,)
            sound = all(isinstance(p, tuple) and len(p) == 2 and type(p[0]) is int and _is_number(p[1]) for p in pairs)
            firsts = [pair[0] for pair in pairs] if sound else [1, 0]
            if firsts != sorted(set(firsts)) or (name != "tail" and firsts[:1] != [0]):
                raise ValueError(f"Recipe got {name}={value}; it holds ((first step, value), ...), finite values and "
                                 "rising steps" + ", the first of them 0" * (name != "tail"))  # fmt: skip
            if min((v for _, v in pairs), default=0) < 0:
                raise ValueError(f"Recipe got {name}={value}; none of its values is negative")
        begin = self.warmup_steps + self.constant_steps
        if self.tail and not (begin <= self.tail[0][0] and self.tail[-1][0] < self.steps):
            raise ValueError(f"Recipe got tail={self.tail}; its steps come after warmup_steps + constant_steps = "
                             f"{begin} and before steps={self.steps}")  # fmt: skip

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.tail and step >= self.tail[0][0]:
            return _at(self.tail, step)
        start, end = self.warmup_steps + self.constant_steps, self.tail[0][0] if self.tail else self.steps
        progress = max(step - start, 0) / max(end - start, 1)
        fall = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + 0.5 * fall * (1 + math.cos(math.pi * min(progress, 1.0)))

    def balance_speed_at(self, step: int) -> float:
        """Return how far the biases move after this step."""
        return _at(self.balance_speed, step)

    def multi_token_weight_at(self, step: int) -> float:
        """Return what the prediction modules' losses count in this step."""
        return _at(self.multi_token_weight, step)

    def batch_at(self, step: int, batch: int) -> int:
        """Return how many of a batch's sequences this step reads."""
        if self.batch_ramp is None:
            return batch
        first, steps = self.batch_ramp
        return min(batch, first + (batch - first) * step // steps) if step < steps else batch

    def settings(self) -> dict:
        """Return the settings that differ from the defaults, and the oldest ones, as JSON knows them.

        `Recipe(**recipe.settings())` is the recipe again.
        """
        default = Recipe(steps=self.steps)
        used = {k: v for k, v in vars(self).items() if k in _ALWAYS or v != getattr(default, k)}
        if self.precision is not None:
            used["precision"] = {f.name: _plain(getattr(self.precision, f.name))
                                 for f in dataclasses.fields(PrecisionPolicy)}  # fmt: skip
        return used


def _at(schedule: Schedule, step: int) -> float:
    if not isinstance(schedule, tuple):
        return schedule
    return [value for first, value in schedule if first <= step][-1]


def _tidy(value):
    """Lists, which a recipe read from JSON has, as tuples; whole and other numbers as Python's own."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_tidy, value))
    if isinstance(value, Real) and type(value) is not bool:
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _is_number(value, whole: bool = False) -> bool:
    return type(value) is int or (not whole and type(value) is float and math.isfinite(value))


def _plain(value):
    if isinstance(value, FloatFormat):
        return value.name
    return sorted(value) if isinstance(value, frozenset) else value
