"""Following every storage through a training step: the events behind `measured.record_step`."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimisers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = ("weights", "narrow weights", "gradients", "moments", "activations", "cache", "workspace")
_SAVED, _OTHER = ("narrow weights", "activations"), "workspace"


class Moment(NamedTuple):
    """The bytes of each part at one moment; seconds since the step began, measuring left out."""

    label: str
    seconds: float
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Recorder(TorchDispatchMode):
    """Follows every storage from its making to its end, with the part that it belongs to."""

    def __init__(self, model: nn.Module, caches: Iterable):
        super().__init__()
        self.began = time.perf_counter()
        self.parts, self.sizes, self.totals = {}, {}, dict.fromkeys(PARTS, 0)
        self.alive, self.saved = {}, Counter()
        self.label, self.within, self.moments, self.optimising = "start", [], [], False
        self.model, self.caches, found = model, list(caches), gc.get_objects()
        self.optimizers = [o for o in found if issubclass(type(o), torch.optim.Optimizer) and self.moved_by(o)]
        self.settle()
        for tensor in found:  # what others hold is none of the step's
            if issubclass(type(tensor), Tensor) and tensor.layout == torch.strided:
                self.meet(tensor, None)
        self.cost = time.perf_counter() - self.began
        self.note()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        entered = time.perf_counter()
        backward = torch._C._current_graph_task_id() != -1
        if backward != self.label.startswith("backward"):
            self.begin("backward loss" if backward else "clip")
        self.cost += time.perf_counter() - entered
        out = func(*args, **(kwargs or {}))
        done = time.perf_counter()
        for tensor in _tensors((args, kwargs, out)):
            self.meet(tensor, _OTHER)
        self.note(done)
        self.cost += time.perf_counter() - done
        return out

    # Storages ------------------------------------------------------------------------------------------------------

    def meet(self, tensor: Tensor, part: str | None) -> int:
        """Follow the tensor's storage if it is new, and its size; return its key."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key not in self.parts:
            self.parts[key], self.sizes[key] = part, 0
            self.alive[key] = weakref.ref(storage, partial(self.forget, key))
        grown = storage.nbytes() - self.sizes[key]
        self.sizes[key] += grown
        if self.parts[key] is not None:
            self.totals[self.parts[key]] += grown
        return key

    def settle(self) -> None:
        """Say of all that stands between two steps what it is."""
        for part, tensors in standing(self.model, self.optimizers, self.caches).items():
            for tensor in tensors:
                self.put(tensor, part)
        for mean in _tensors(vars(self.model).get("average")):
            self.put(mean, None)

    def put(self, tensor: Tensor, part: str | None) -> None:
        """Say for good what a storage is; what the parameters share stays theirs."""
        key = self.meet(tensor, part)
        if self.parts[key] in (*_SAVED, _OTHER):
            self.move(key, part)

    def move(self, key: int, part: str | None) -> None:
        for name, sign in ((self.parts[key], -1), (part, 1)):
            if name is not None:
                self.totals[name] += sign * self.sizes[key]
        self.parts[key] = part

    def forget(self, key: int, _reference=None) -> None:
        self.move(key, None)
        for known in (self.parts, self.sizes, self.alive, self.saved):
            known.pop(key, None)

    def pack(self, tensor: Tensor) -> _Saved:
        key = self.meet(tensor, _OTHER)
        self.saved[key] += 1
        if self.parts[key] == _OTHER:
            self.move(key, "narrow weights" if getattr(tensor, "copies_weights", False) else "activations")
        return _Saved(self, tensor, key)

    def unpack(self, key: int) -> None:
        self.saved[key] -= 1
        if not self.saved[key] and self.parts.get(key) in _SAVED:
            self.move(key, _OTHER)

    # Moments -------------------------------------------------------------------------------------------------------

    def note(self, now: float | None = None) -> None:
        """Write down where memory stands; now: when an operation ended, nothing between two stretches."""
        seconds = (now or time.perf_counter()) - self.began - self.cost
        if now is None or self.optimising:
            self.settle()
        self.moments.append(Moment(self.label, seconds, dict(self.totals)))

    def begin(self, label: str) -> None:
        if self.moments[-1].label == self.label:  # else nothing has happened under it
            self.note()
        self.label = label

    def moved_by(self, optimizer: torch.optim.Optimizer) -> bool:
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in moved for p in self.model.parameters())

    def optimise(self, begins: bool, optimizer: torch.optim.Optimizer, *_) -> None:
        if optimizer not in self.optimizers and self.moved_by(optimizer):
            self.optimizers.append(optimizer)
        self.note()
        self.optimising = begins
        self.label = "optimiser" if begins else "zero_grad"

    def forward(self, name: str, _module, _inputs, *output) -> None:
        """Before a part of the model's forward pass, or after it; when it is computed again, the label stays."""
        if torch._C._current_graph_task_id() != -1:
            return
        self.within = self.within[:-1] if output else [*self.within, name]
        self.begin(f"forward {self.within[-1]}" if self.within else "loss")
        tensor = next(_tensors(output), None)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda _: self.begin(f"backward {name}"))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        handles = []
        for name, module in _places(self.model):
            handles.append(module.register_forward_pre_hook(partial(self.forward, name)))
            handles.append(module.register_forward_hook(partial(self.forward, name)))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(lambda p: self.put(p.grad, "gradients"))
                handles.append(hook)
        handles.append(optimisers.register_optimizer_step_pre_hook(partial(self.optimise, True)))
        handles.append(optimisers.register_optimizer_step_post_hook(partial(self.optimise, False)))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor), self:
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Saved:
    """A tensor that autograd keeps; gone as soon as autograd lets it go."""

    def __init__(self, recorder: Recorder, tensor: Tensor, key: int):
        self.recorder, self.tensor, self.key = recorder, tensor, key

    def __del__(self):
        self.recorder.unpack(self.key)


def standing(model: nn.Module, optimizers: Iterable, caches: Iterable) -> dict[str, list[Tensor]]:
    """Return the tensors that stand between two steps, by part."""
    parameters = list(model.parameters())
    return {
        "weights": [*parameters, *model.buffers()],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "moments": list(_moments(optimizers)),
        "cache": list(_held(list(caches))),
    }


def _moments(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            yield from (t for t in _tensors(dict(state)) if t.numel() == parameter.numel() and t.dim())


def _held(thing: object) -> Iterator[Tensor]:
    """Yield the tensors of a cache, wherever it has them: itself, in lists, in what it is made of."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _held(part)
    elif type(thing).__module__.startswith("deepseek_lab.attention"):
        yield from _held(list(vars(thing).values()))


def _tensors(nest: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor))


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model by name, lists of them one by one."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", part) for index, part in enumerate(child))
        else:
            yield name, child


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
