"""Which numbers of a model are narrow, and how: the rules of mixed-precision training as data.

Source: DeepSeek-V3 report, sections 3.3.1 (what stays wide) and 3.3.2 (tiles, blocks, one format, promotion).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from .formats import E4M3, E5M2, FloatFormat, find_format

#: What DeepSeek-V3 does not compute in FP8. Its linear layers, those of the experts too, it does.
PLACES = ("embedding", "head", "gate", "norms", "attention core")

_CHOICES = {
    "products": ("fp8", "bf16", "fp32"),
    "activations": ("tile", "block", "tensor"),
    "weights": ("block", "tensor"),
    "gradients": ("tile", "block", "tensor"),
    "scale": ("fp32", "ue8m0"),
    "accumulator": ("fp32", "h800"),
    "promote_every": (32, 64, 128, None),
    "outputs": ("fp32", "bf16"),
}


@dataclass(frozen=True)
class PrecisionPolicy:
    """The rules of one run; unless told otherwise, those of DeepSeek-V3.

    products: what the three products of a linear layer read: "fp8", "bf16", or "fp32" (nothing is narrow).
    activations, weights, gradients: who shares a scale in FP8: a "tile" of 128 values along the axis that is summed
        over, a "block" of 128 x 128, or the whole "tensor".
    gradient_format: E4M3 or E5M2 for gradients; activations and weights are E4M3.
    scale: "fp32", or "ue8m0" for powers of two. accumulator, promote_every: as in `fp8_matmul`.
    outputs: what the products give. "fp32" is the sum itself; "bf16" rounds it, as training in BF16 usually does. Only
        then can BF16 products run on the BF16 instructions of a processor, which they do wherever that is faster
        (`fast_bf16`): the choice moves no more than the order of a sum, and so now and then the last bit.
    wide: the places that are left alone, of "embedding", "head", "gate", "norms" and "attention core".
    Raises ValueError for unknown names and for rules that cannot go together.
    """

    products: str = "fp8"
    activations: str = "tile"
    weights: str = "block"
    gradients: str = "tile"
    gradient_format: FloatFormat | str = E4M3
    scale: str = "fp32"
    accumulator: str = "fp32"
    promote_every: int | None = 128
    outputs: str = "fp32"
    wide: frozenset[str] = frozenset(PLACES)

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            given = getattr(self, name)
            if given not in choices or type(given) not in map(type, choices):  # 128.0 equals 128
                raise ValueError(f"PrecisionPolicy got {name}={given!r}; "
                                 f"choose one of {', '.join(map(repr, choices))}")  # fmt: skip
        several = isinstance(self.wide, Iterable) and not isinstance(self.wide, str)
        places = set(self.wide if several else [self.wide])
        if unknown := sorted(places - set(PLACES), key=repr):
            raise ValueError(f"PrecisionPolicy got wide={unknown[0]!r}; the places are {', '.join(PLACES)}")
        object.__setattr__(self, "wide", frozenset(places))
        object.__setattr__(self, "gradient_format", find_format(self.gradient_format))
        self._check_together()

    def _check_together(self) -> None:
        if self.gradient_format not in (E4M3, E5M2):
            raise ValueError(f"PrecisionPolicy got gradient_format={self.gradient_format}; choose E4M3 or E5M2")
        if self.products != "fp8":
            return
        if self.accumulator == "h800" and self.gradient_format != E4M3:
            raise ValueError('accumulator="h800" multiplies E4M3 with E4M3; choose gradient_format=E4M3, or "fp32"')
        kinds = {self.activations, self.weights, self.gradients}
        if self.accumulator == "h800" and self.promote_every is None and kinds != {"tensor"}:
            raise ValueError("promote_every=None never stops to apply a scale, so all three of activations, weights "
                             'and gradients need one scale: "tensor"')  # fmt: skip

    def replace(self, **changes) -> PrecisionPolicy:
        """Return these rules with some of them changed."""
        return dataclasses.replace(self, **changes)


def checked(policy: object, asking: str) -> PrecisionPolicy:
    """Return a policy; TypeError, in the name of who asks for it, for what is none."""
    if not isinstance(policy, PrecisionPolicy):
        raise TypeError(f"{asking} got {policy!r}; pass a PrecisionPolicy, for example PrecisionPolicy() for V3's")
    return policy
