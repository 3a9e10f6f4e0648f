"""A linear layer whose three products are all in eight bits, with its weights and their gradients in 32.

y  = x W^T       x in 1 x 128 tiles (along the channels that are summed), W in blocks of 128 x 128
dx = dy W        dy in 1 x 128 tiles along the outputs, the codes of W again
dW = dy^T x      summed over the tokens, so both in 128 x 1 tiles along them; x from the codes that were kept

Kept for the backward pass are the codes and scales of x and W: about a byte for each value, not four.
Source: DeepSeek-V3 report, sections 3.3.1 to 3.3.3. A `PrecisionPolicy` holds the rules and can drop each of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .matmul import fast_bf16, fp8_matmul, without_autocast
from .policy import PrecisionPolicy, checked
from .scaling import BLOCK, BlockScaled, quantize

V3 = PrecisionPolicy()

#: Gradients are multiplied by this before they are scaled. A loss is a mean over tokens, so its gradients lie far below
#: the 1e-4 at which `quantize` stops to follow the largest value of a tile; a power of two only moves exponents.
LIFT = 2.0**40

Narrow = BlockScaled | Tensor  # FP8 codes with scales, or a BF16 tensor


class Fp8Linear(nn.Linear):
    """In place of `nn.Linear`: the same arguments, parameters and names, y = x W^T + b, and a `policy`.

    x: [..., in_features] -> [..., out_features] in the dtype of x. NaN and infinity lose their tile and go on.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None,
                 policy: PrecisionPolicy = V3):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.policy = checked(policy, "Fp8Linear")

    @classmethod
    def from_linear(cls, linear: nn.Linear, policy: PrecisionPolicy = V3) -> Fp8Linear:
        """Return a layer that computes by the policy with the parameters of another one: the same objects."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", policy=policy)
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = narrow_linear(x, self.weight, self.policy)
        return y if self.bias is None else (y + self.bias).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, products={self.policy.products!r}"


def narrow_linear(x: Tensor, weight: Tensor, policy: PrecisionPolicy = V3) -> Tensor:
    """Return x W^T by the policy, forward and backward: x [..., in], weight [out, in] -> [..., out]."""
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"a layer of {weight.shape[1]} inputs got x of shape {tuple(x.shape)}; the last axis is "
                         "summed over, so both must be equal")  # fmt: skip
    if policy.products == "fp32":
        return nn.functional.linear(x, weight)
    return _Products.apply(x.reshape(-1, x.shape[-1]), weight, policy).view(*x.shape[:-1], len(weight))


class _Products(torch.autograd.Function):
    """x [token, in] and weight [out, in] -> [token, out]: one product forward, two backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, policy: PrecisionPolicy) -> Tensor:
        kept = narrow(x, policy.activations, policy), narrow_weight(weight, policy.weights, policy)
        keep(ctx, *kept)
        ctx.policy, ctx.dtypes = policy, (x.dtype, weight.dtype)
        return output_product(*kept, policy).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (x, weight), policy = kept(ctx), ctx.policy
        gradient = gradient.bfloat16() if policy.products == "bf16" else gradient  # once for both products
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_product(narrow_gradient(gradient, policy), weight, policy).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dy = narrow_gradient(gradient, policy, along="tokens")
            dw = weight_product(dy, along_tokens(x, policy), policy).to(ctx.dtypes[1])
        return dx, dw, None


# The three products ------------------------------------------------------------------------------------------------


def output_product(x: Narrow, weight: Narrow, policy: PrecisionPolicy) -> Tensor:
    """x W^T: [token, out] from [token, in] and [out, in]."""
    return multiply(lambda x, weight: x @ weight.T, x, weight, policy, lambda x, weight: (x, weight))


def input_product(gradient: Narrow, weight: Narrow, policy: PrecisionPolicy) -> Tensor:
    """dy W: [token, in] from [token, out] and [out, in]."""
    return multiply(torch.matmul, gradient, weight, policy, lambda dy, weight: (dy, weight.T))


def weight_product(gradient: Narrow, x: Narrow, policy: PrecisionPolicy) -> Tensor:
    """dy^T x: [out, in], summed over the tokens, from [token, out] and [token, in]."""
    return multiply(lambda dy, x: dy.T @ x, gradient, x, policy, lambda dy, x: (dy.T, x.T))


def multiply(product: Callable, a: Narrow, b: Narrow, policy: PrecisionPolicy, rows: Callable | None = None) -> Tensor:
    """Return product(a, b) in the policy's `outputs`, added up in float32, or as an H800 does.

    rows: what makes of a and b the two matrices whose rows an H800 multiplies, for policies with its accumulator.
    """
    if policy.accumulator == "h800" and policy.products == "fp8":
        y = fp8_matmul(*rows(a, b), "h800", policy.promote_every)
    elif runs_in_bf16(a, policy):
        y = without_autocast(product, a, b)
    else:
        y = without_autocast(product, wide(a), wide(b))
    return y.bfloat16() if policy.outputs == "bf16" else y


def runs_in_bf16(a: Narrow, policy: PrecisionPolicy) -> bool:
    """Whether the processor's own BF16 products are taken: where they give what the policy asks for, and faster."""
    return policy.products == policy.outputs == "bf16" and (a.device.type != "cpu" or fast_bf16())


# Narrow and wide again ---------------------------------------------------------------------------------------------


def narrow(x: Tensor, kind: str, policy: PrecisionPolicy) -> Narrow:
    """Return activations or weights, a matrix, in BF16, or as E4M3 codes with one scale per `kind` of part."""
    if policy.products == "bf16":
        return x.bfloat16()
    return quantize(x, shared_by(x, kind), policy.scale, nonfinite="pass")


def narrow_weight(weight: Tensor, kind: str, policy: PrecisionPolicy) -> Narrow:
    """Return weights as `narrow` does, marked as their copy for whoever counts what is kept."""
    copy = narrow(weight, kind, policy)
    for part in (copy.codes, copy.scales) if isinstance(copy, BlockScaled) else (copy,):
        part.copies_weights = True
    return copy


def shared_by(x: Tensor, kind: str) -> tuple[int, int]:
    """Return how many rows and columns of a matrix share a scale: a "tile" of 1 x 128, a "block", the "tensor"."""
    return {"tile": (1, BLOCK), "block": (BLOCK, BLOCK)}.get(kind) or tuple(max(size, 1) for size in x.shape)


def narrow_gradient(gradient: Tensor, policy: PrecisionPolicy, along: str = "outputs") -> Narrow:
    """Return dy with tiles along the "outputs", for dx, or along the "tokens", for dW.

    With blocks, or one scale for all, both are the same codes. Gradients of 1e26 and more count as infinite.
    """
    if policy.products == "bf16":
        return gradient.bfloat16()
    tile = (BLOCK, 1) if along == "tokens" and policy.gradients == "tile" else shared_by(gradient, policy.gradients)
    lifted = quantize(gradient.float() * LIFT, tile, policy.scale, policy.gradient_format, nonfinite="pass")
    return lifted._replace(scales=lifted.scales / LIFT)


def along_tokens(x: Narrow, policy: PrecisionPolicy) -> Narrow:
    """Return kept activations in 128 x 1 tiles: their codes were made for 1 x 128, and are rounded a second time."""
    if policy.products == "bf16" or policy.activations != "tile":
        return x
    return quantize(x.dequantize(), (BLOCK, 1), policy.scale, nonfinite="pass")


def wide(x: Narrow) -> Tensor:
    """Return the values that narrow numbers stand for, float32."""
    return x.dequantize() if isinstance(x, BlockScaled) else x.float()


def keep(ctx, *operands: Narrow) -> None:
    """Save narrow operands for the backward pass as they are: codes and scales, or BF16."""
    ctx.tiles = [x.tile if isinstance(x, BlockScaled) else None for x in operands]
    ctx.save_for_backward(*(t for x in operands for t in ((x.codes, x.scales) if isinstance(x, BlockScaled) else (x,))))


def kept(ctx) -> list[Narrow]:
    """Return what `keep` saved."""
    saved = iter(ctx.saved_tensors)
    return [next(saved) if tile is None else BlockScaled(next(saved), next(saved), tile) for tile in ctx.tiles]


# Rounding without a product ----------------------------------------------------------------------------------------


def round_through(x: Tensor, policy: PrecisionPolicy, kind: str | None = None) -> Tensor:
    """Return x rounded by the policy, as an activation unless `kind` says otherwise; gradients go straight through.

    x: [..., channel] in the dtype it came in. "fp32" products round nothing.
    """
    return x if policy.products == "fp32" else _Rounded.apply(x, policy, kind or policy.activations)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, policy: PrecisionPolicy, kind: str) -> Tensor:
        return wide(narrow(x.reshape(-1, x.shape[-1]), kind, policy)).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None


def input_in_use(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return x as a layer's products read it: rounded as an activation of an `Fp8Linear`, x itself elsewhere."""
    policy = getattr(linear, "policy", None)
    return x if policy is None else round_through(x, policy)


def weight_in_use(linear: nn.Linear) -> Tensor:
    """Return the weight that a layer's products read: rounded in an `Fp8Linear`, the parameter itself elsewhere."""
    policy = getattr(linear, "policy", None)
    return linear.weight if policy is None else round_through(linear.weight, policy, policy.weights)
