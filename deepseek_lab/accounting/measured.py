"""What is really in memory: bytes of live tensors by part, now or through a whole training step.

weights         parameters and buffers
narrow weights  copies of weights that a precision policy makes and saves for the backward pass, in 8 or 16 bits
gradients       what parameters have in `.grad`
moments         what an optimiser keeps in the shape of a parameter
activations     whatever else the step has saved for the backward pass
cache           buffers of key-value caches, their room for further tokens included
workspace       whatever else the step has made and not let go, tensors that are computed again among it

Bytes are those of whole storages, each once, however many tensors look at it. Not seen is what an operation takes and
gives back within itself, nor a graph that was built before the step. On a GPU the allocator's own figures stand beside.
The running mean of the weights, `model.average`, is in the CPU's memory and no part. Nothing here knows a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from .ledger import Ledger, Line
from .recorder import PARTS, Moment, Recorder, standing, storage_key

__all__ = ["PARTS", "Event", "Moment", "Timeline", "measure", "record_step"]


def measure(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, caches: Iterable = ()) -> Ledger:
    """Return the bytes of weights, gradients, moments and caches that are alive now, tied weights once."""
    lines, seen = [], set()
    for part, tensors in standing(model, [optimizer] if optimizer else [], caches).items():
        sizes = {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
        total = sum(size for key, size in sizes.items() if key not in seen)
        seen |= set(sizes)
        lines.append(Line(part, total, "bytes", f"{len(sizes):,} storages", (), "measured"))
    return Ledger("live bytes", tuple(lines))


class Event(NamedTuple):
    """A stretch of the step: how long it took, where memory stood at its end and where it was fullest."""

    label: str
    seconds: float
    end: Moment
    fullest: Moment
    moments: tuple[Moment, ...]


@dataclass(frozen=True, repr=False)
class Timeline:
    """The memory of one step, after every operation.

    parameters: how many the model has. cost: seconds that measuring took. allocator: on a GPU, bytes by torch's own
    count, {"before", "peak", "reserved"}, else empty.
    """

    moments: tuple[Moment, ...]
    parameters: int
    cost: float
    allocator: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def largest(self, part: str) -> int:
        """Return the most bytes that a part ever took."""
        return max(moment.bytes[part] for moment in self.moments)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """The stretches of the step in order: forward, loss, backward, clip, optimiser, zero_grad."""
        out, began = [], 0.0
        for label, group in groupby(self.moments, key=lambda moment: moment.label):
            group = tuple(group)
            seconds, began = group[-1].seconds - began, group[-1].seconds
            out.append(Event(label, seconds, group[-1], max(group, key=lambda moment: moment.total), group))
        return tuple(out)


def record_step(model: nn.Module, step: Callable[[], object], caches: Iterable = ()) -> Timeline:
    """Call step(), which trains the model once, and return what was in memory meanwhile.

    step: for example `lambda: next(run)` of a `training.train`. Optimisers are found by the parameters that they move.
    The stretches are called after the model's parts: "forward layers.0", "backward layers.0". "loss" is what follows a
    part of the forward pass, "clip" what follows the backward pass, "zero_grad" what follows the optimiser. An error in
    step() is passed on; no hook stays behind.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    recorder = Recorder(model, caches)
    with recorder.listening():
        step()
        recorder.note()
    peaks = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    allocator = {"before": before, **peaks} if cuda else {}
    return Timeline(tuple(recorder.moments), sum(p.numel() for p in model.parameters()), recorder.cost, allocator)
