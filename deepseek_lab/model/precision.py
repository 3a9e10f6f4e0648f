"""Give a finished model other arithmetic: the same parameters under the same names, products by a policy.

What is narrow, where the policy says so (queries and so on are rounded as activations are, the gradient of a rounding
goes straight through):

linear layers    always: all three products of attention, dense layers, shared and routed experts
embedding        a token's row is rounded
head, gate       computed as a narrow linear layer, their weights in the policy's blocks
norms            what is to be normalised is rounded first; the learned weight is not
attention core   queries, keys and values are rounded before the scores; absorbed attention has queries and latents in
                 their place, other vectors, so that only here its results differ from those of expanded attention
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..attention import GroupedAttention, LatentAttention, RMSNorm
from ..experts import Router
from ..experts.layer import Experts, grouped_linear
from ..precision import BLOCK, BlockScaled, Fp8Linear, PrecisionPolicy
from ..precision import linear as narrow
from ..precision.policy import checked

ROWS = 32  # torch on a CPU prepares a BF16 product for each shape it meets, which takes longer than to compute it


def apply_policy(model: nn.Module, policy: PrecisionPolicy) -> nn.Module:
    """Make a model compute by a policy, in place, and return it; `products="fp32"` undoes it.

    Modules keep their parameters and names and change their class only, so an optimiser, a checkpoint or a hook that
    knows them goes on working, and so does `training.train`. A policy holds from the next forward pass on.
    Raises TypeError for a policy that is none, ValueError for a model without a module that a policy is about.
    """
    checked(policy, "apply_policy")
    kinds = {kind: wide for wide, narrow_kind in NARROW.items() for kind in (wide, narrow_kind)}
    known = [(name, module) for name, module in model.named_modules() if type(module) in kinds]
    if not known:
        raise ValueError(f"apply_policy got a {type(model).__name__} in which nothing can be made narrow; it changes "
                         f"{', '.join(kind.__name__ for kind in NARROW)}")  # fmt: skip
    for name, module in known:
        wide = kinds[type(module)]
        place = "head" if name.rpartition(".")[2] in HEADS else PLACE.get(wide)
        if policy.products == "fp32" or place in policy.wide:
            module.__class__ = wide
            vars(module).pop("policy", None)
        else:
            module.__class__, module.policy = NARROW[wide], policy
    return model


class NarrowEmbedding(nn.Embedding):
    """A table whose rows are read in the policy's format."""

    def forward(self, tokens: Tensor) -> Tensor:
        return narrow.round_through(super().forward(tokens), self.policy)


class NarrowNorm(RMSNorm):
    """A norm of a rounded vector."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(narrow.round_through(x, self.policy))


class NarrowRouter(Router):
    """A gate that scores with a narrow product; its logits, sigmoid and choice stay in float32."""

    def score(self, x: Tensor) -> Tensor:
        return narrow.narrow_linear(x.float(), self.weight.float(), self.policy)


class NarrowLatentAttention(LatentAttention):
    """Latent attention with a rounded core."""

    def round_core(self, x: Tensor) -> Tensor:
        return narrow.round_through(x, self.policy)


class NarrowGroupedAttention(GroupedAttention):
    """Grouped attention with a rounded core."""

    def round_core(self, x: Tensor) -> Tensor:
        return narrow.round_through(x, self.policy)


class NarrowExperts(Experts):
    """Routed experts with narrow products, each expert by the rules of a linear layer of its own."""

    reads_few = False

    def multiply(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        policy = self.policy
        apart = policy.products == "fp8" and (
            policy.accumulator == "h800"
            or (policy.activations, policy.weights, policy.gradients) != ("tile", "block", "tile")
            or weights.shape[1] % BLOCK
        )
        if not apart:
            return _GroupedProducts.apply(x, weights, ends, policy)
        parts = zip(x.split(_sizes(ends)), weights.unbind(0), strict=True)
        return torch.cat([narrow.narrow_linear(part, weight, policy) for part, weight in parts])


class _GroupedProducts(torch.autograd.Function):
    """All experts at once, where no scale is shared by two of them: x [slot, in], weights [expert, out, in]."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, ends: Tensor, policy: PrecisionPolicy) -> Tensor:
        ctx.policy, ctx.ends, ctx.shape, ctx.dtypes = policy, ends, weights.shape, (x.dtype, weights.dtype)
        x, aligned = _align(x, ends, policy)
        kept = narrow.narrow(x, "tile", policy), narrow.narrow_weight(weights.flatten(0, 1), "block", policy)
        narrow.keep(ctx, *kept)
        y = narrow.multiply(lambda x, w: grouped_linear(x, w.view(ctx.shape), aligned), *kept, policy)
        return _close(y, aligned, ends, ctx.dtypes[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (x, weights), policy = narrow.kept(ctx), ctx.policy
        gradient, aligned = _align(gradient, ctx.ends, policy)
        dx = dw = None
        if ctx.needs_input_grad[0]:

            def back(dy: Tensor, weights: Tensor) -> Tensor:
                return grouped_linear(dy, weights.view(ctx.shape).transpose(1, 2), aligned)  # [expert, in, out]

            dx = narrow.multiply(back, narrow.narrow_gradient(gradient, policy), weights, policy)
            dx = _close(dx, aligned, ctx.ends, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw = gradient.new_empty(ctx.shape, dtype=ctx.dtypes[1])
            sizes = _sizes(aligned)
            for out, part, slots in zip(dw, gradient.split(sizes), _split(x, sizes), strict=True):
                dy = narrow.narrow_gradient(part, policy, along="tokens")
                out.copy_(narrow.weight_product(dy, narrow.along_tokens(slots, policy), policy))
        return dx, dw, None, None


def _align(x: Tensor, ends: Tensor, policy: PrecisionPolicy) -> tuple[Tensor, Tensor]:
    """Return rows in BF16, each expert's with zeros behind up to a multiple of ROWS, and where each ends then.

    Other rows than the processor's own BF16 products take stay as they are.
    """
    if not narrow.runs_in_bf16(x, policy):
        return x, ends
    sizes = _sizes(ends)
    aligned = [-(-size // ROWS) * ROWS for size in sizes]
    out = x.new_zeros(sum(aligned), x.shape[1], dtype=torch.bfloat16)
    for place, part in zip(out.split(aligned), x.split(sizes), strict=True):
        place[: len(part)] = part
    return out, ends.new_tensor(aligned).cumsum(0, dtype=ends.dtype)


def _close(y: Tensor, aligned: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows that `_align` moved apart, one after another again."""
    if aligned is ends:
        return y.to(dtype)
    sizes = _sizes(ends)
    out = y.new_empty(sum(sizes), y.shape[1], dtype=dtype)
    for place, part in zip(out.split(sizes), y.split(_sizes(aligned)), strict=True):
        place.copy_(part[: len(place)])
    return out


def _sizes(ends: Tensor) -> list[int]:
    """How many slots each expert has, from where each ends."""
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _split(x: narrow.Narrow, sizes: list[int]) -> list[narrow.Narrow]:
    """Split narrow activations in tiles of one row by expert."""
    if isinstance(x, Tensor):
        return list(x.split(sizes))
    pairs = zip(x.codes.split(sizes), x.scales.split(sizes), strict=True)
    return [BlockScaled(codes, scales, x.tile) for codes, scales in pairs]


NARROW = {
    nn.Linear: Fp8Linear,
    nn.Embedding: NarrowEmbedding,
    RMSNorm: NarrowNorm,
    Router: NarrowRouter,
    LatentAttention: NarrowLatentAttention,
    GroupedAttention: NarrowGroupedAttention,
    Experts: NarrowExperts,
}
HEADS = ("lm_head", "eh_proj")  # in the released files the projection of a prediction module is as wide as the head
PLACE = {
    nn.Embedding: "embedding",
    RMSNorm: "norms",
    Router: "gate",
    LatentAttention: "attention core",
    GroupedAttention: "attention core",
}
