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
from ..precision.matmul import without_autocast
from ..precision.policy import checked


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
        kept = narrow.narrow(x, "tile", policy), narrow.narrow_weight(weights.flatten(0, 1), "block", policy)
        narrow.keep(ctx, *kept)
        ctx.policy, ctx.ends, ctx.shape, ctx.dtypes = policy, ends, weights.shape, (x.dtype, weights.dtype)
        wide = narrow.wide(kept[0]), narrow.wide(kept[1]).view(weights.shape)
        return without_autocast(grouped_linear, *wide, ends).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (x, weights), policy = narrow.kept(ctx), ctx.policy
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dy = narrow.narrow_gradient(gradient, policy)
            turned = narrow.wide(weights).view(ctx.shape).transpose(1, 2)  # [expert, in, out]
            dx = without_autocast(grouped_linear, narrow.wide(dy), turned, ctx.ends).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw = gradient.new_empty(ctx.shape, dtype=ctx.dtypes[1])
            sizes = _sizes(ctx.ends)
            for out, part, slots in zip(dw, gradient.split(sizes), _split(x, sizes), strict=True):
                dy = narrow.narrow_gradient(part, policy, along="tokens")
                out.copy_(narrow.weight_product(dy, narrow.along_tokens(slots, policy), policy))
        return dx, dw, None, None


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
