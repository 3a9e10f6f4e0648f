"""Forget in the forward pass, compute again in the backward pass: less to keep for the gradient, bit for bit the same.

What a half of a layer keeps is its input and the products that would take long to do again; all that lies between them
goes, and is made anew from these when the gradient arrives:

norms           those before attention, feed-forward layers and the head, those of the latents too, and with them the
                copies of their output that are sent to the experts
up-projections  queries, keys and values from their latents (q_b_proj, kv_b_proj), with their positions
swiglu          silu(gate) * up, in dense layers and in every expert, and from it the experts' answers, which the
                gradient of their weights reads

Hooks run the second time too, and draw the same random numbers. Weights must not change in between.

Source: DeepSeek-V3 report, section 3.2.3 (norms, up-projections) and 3.3.3 (SwiGLU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

RECOMPUTABLE = ("norms", "up-projections", "swiglu")
NOTHING: frozenset[str] = frozenset()

_PRODUCTS = {"mm", "addmm", "bmm", "_grouped_mm"}
_SWIGLU = {"silu", "mul"}
_UP = {"q_b_proj", "kv_b_proj"}
_LAST = {"o_proj", "down_proj"}  # no gradient asks for their output, so it is not kept either; the head is its own


def checked(names: Iterable[str]) -> frozenset[str]:
    """Return a set of names of RECOMPUTABLE; ValueError for others, TypeError for what is no set of names."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"recompute={names!r}; pass a set of names, such as {{'norms', 'swiglu'}}")
    if unknown := sorted(set(names) - set(RECOMPUTABLE), key=repr):
        raise ValueError(f"recompute has {unknown[0]!r}; choose among {', '.join(RECOMPUTABLE)}")
    return frozenset(names)


def after_norm(norm: nn.Module, work: nn.Module, x: Tensor, names: frozenset[str], *rest, **named) -> Tensor:
    """Return work(norm(x), ...), keeping for the gradient no more than `names` allows.

    work: attention, a feed-forward layer or the output head. Where nothing of it is named, or no gradient is wanted, it
    is a plain call.
    """
    if not names or not torch.is_grad_enabled():
        return work(norm(x), *rest, **named)
    own = "up-projections" if hasattr(work, "o_proj") else "swiglu" if any(work.children()) else "norms"
    if not names & {"norms", own}:
        return work(norm(x), *rest, **named)
    kept = _PRODUCTS | (_SWIGLU if own == "swiglu" and "swiglu" not in names else set())
    again = _LAST | (_UP if "up-projections" in names else set())
    passing = [module for name, module in work.named_modules() if name.rpartition(".")[2] in again] or [work]
    answers = x.shape[-1] if own == "swiglu" and own in names else 0
    shelf = _Shelf(kept, [norm, *passing], answers, [norm, work])
    if "norms" not in names:
        return _stretch(lambda h: work(h, *rest, **named), norm(x), shelf)
    return _stretch(lambda x: work(norm(x), *rest, **named), x, shelf)


def _stretch(run: Callable[[Tensor], Tensor], x: Tensor, shelf: _Shelf) -> Tensor:
    """Return run(x), of which only x and what is on the shelf are kept for the gradient."""
    modes = _Keeping(shelf), _Replaying(shelf)
    y = checkpoint(run, x, use_reentrant=False, context_fn=lambda: modes)
    return _Hold.apply(y, shelf, *shelf.take())


class _Shelf:
    """Results of the operations named `kept`, in the order of their making.

    Except those within `passing` modules, and products [..., answers]. used: the modules that do the work.
    """

    def __init__(self, kept: set[str], passing: list[nn.Module], answers: int, used: list[nn.Module]):
        self.kept, self.passing, self.answers, self.used, self.results = kept, passing, answers, used, []
        self.weights = self._versions()

    def take(self) -> list:
        """Hand out what lies here, and forget it."""
        leaves, self.shape = tree_flatten(self.results)
        self.results = []
        return leaves

    def wants(self, func, args: tuple) -> bool:
        name = func.overloadpacket.__name__
        if self.within or (name in _PRODUCTS and args[1].shape[-1] == self.answers):
            return False
        return name in self.kept or name.startswith("_scaled_dot_product")

    def holds(self, x: object) -> bool:
        """Whether a tensor shares its memory with what lies here."""
        tensors = [t for t in tree_leaves(self.results) if isinstance(t, Tensor)] if isinstance(x, Tensor) else []
        return any(t.untyped_storage()._cdata == x.untyped_storage()._cdata for t in tensors)

    def watch(self) -> list[Callable[[], object]]:
        """Listen to what `passing` modules begin and end; return what stops that."""
        if self._versions() != self.weights:
            raise RuntimeError("weights have changed since the forward pass that recompute does again; call backward() "
                               "before they move, or set model.recompute = ()")  # fmt: skip
        self.within, self.thread = 0, get_ident()
        hooks = [module.register_forward_pre_hook(lambda *_: self._step(1)) for module in self.passing]
        hooks += [module.register_forward_hook(lambda *_: self._step(-1)) for module in self.passing]
        return [hook.remove for hook in hooks]

    def _step(self, by: int) -> None:
        self.within += by if get_ident() == self.thread else 0  # others may be calling the same modules

    def _versions(self) -> list[tuple[int, int]]:
        """Which weights are read, and how often each was changed."""
        weights = (t for module in self.used for t in module.state_dict(keep_vars=True).values())
        return [(id(t), 0 if t.is_inference() else t._version) for t in weights]


class _Keeping(TorchDispatchMode):
    """The first time: put results on the shelf."""

    def __init__(self, shelf: _Shelf):
        super().__init__()
        self.shelf = shelf

    def __enter__(self):
        self.undo = self.shelf.watch()
        return super().__enter__()

    def __exit__(self, *error):
        for undo in self.undo:
            undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable and self.shelf.holds(args[0]):
            raise RuntimeError("a product that recompute keeps for the gradient is changed in place, perhaps in a hook;"
                               " make a new tensor there, or set model.recompute = ()")  # fmt: skip
        out = func(*args, **(kwargs or {}))
        if self.shelf.wants(func, args):
            self.shelf.results.append(_detached(out))
        return out


class _Replaying(_Keeping):
    """The second time: take them from there in place of computing them, and leave the modules as they were."""

    def __enter__(self):
        super().__enter__()
        self.undo += [partial(vars(module).update, dict(vars(module))) for module in self.shelf.used]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.shelf.results and self.shelf.wants(func, args):
            return _detached(self.shelf.results.pop(0))
        return func(*args, **(kwargs or {}))


def _detached(out):
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, out)


class _Hold(torch.autograd.Function):
    """y as it is; its gradient, which comes before that of what made y, puts the kept results back on the shelf."""

    @staticmethod
    def forward(ctx, y: Tensor, shelf: _Shelf, *leaves) -> Tensor:
        ctx.shelf, ctx.others = shelf, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        leaves = [other if tensor is None else tensor for tensor, other in pairs]
        ctx.shelf.results = tree_unflatten(leaves, ctx.shelf.shape)
        return gradient, None, *(None for _ in leaves)
