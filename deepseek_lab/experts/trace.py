"""Write down what every router of a model decided for one text, and what it would have decided without its two rules.

DeepSeek-V3 adds a correction bias when it chooses and keeps each token inside a few groups of experts. A trace holds
the choice as it was, and the choices without the bias and without the group limit, from the same scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from .layer import ExpertLayer
from .router import Router, Routing


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What the router of one layer decided for every token of a text. All tensors lie on the CPU."""

    layer: int  # index in the model
    scores: Tensor  # [token, expert] float32, without the correction bias
    bias: Tensor  # [expert] float32, zeros where the router has none
    chosen: Tensor  # [token, choice] int64, the best first
    weights: Tensor  # [token, choice] float32, what each chosen expert's answer is multiplied by
    groups: Tensor  # [expert] int64, the group that each expert belongs to
    kept: Tensor  # [token, group] bool, the groups in which a token may choose
    without_bias: Tensor  # [token, choice] int64, the choice with a bias of zero and the same group limit
    without_groups: Tensor  # [token, choice] int64, the choice among all groups with the same bias

    @property
    def selection(self) -> Tensor:
        """What is compared when experts are chosen: score + bias, [token, expert]."""
        return self.scores + self.bias

    @property
    def shared_bias(self) -> float:
        """The mean of the biases: what every expert has in common, which changes no choice."""
        return self.bias.mean().item()

    @property
    def centred_selection(self) -> Tensor:
        """Score + bias counted from its mean, [token, expert]: chooses as `selection` does, on the scores' scale."""
        return self.scores + (self.bias - self.bias.mean())


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """One `LayerTrace` per mixture-of-experts layer, from the first to the last, for the same tokens [token]."""

    tokens: Tensor
    layers: tuple[LayerTrace, ...]

    def at(self, layer: int) -> LayerTrace:
        """Return the trace of the layer with this index in the model. Raises ValueError where there is no router."""
        for trace in self.layers:
            if trace.layer == layer:
                return trace
        known = ", ".join(str(trace.layer) for trace in self.layers)
        raise ValueError(f"layer {layer} has no router in this trace; choose one of {known}")

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest of all layers' `scores` and `centred_selection`."""
        values = [value for trace in self.layers for value in (trace.scores, trace.centred_selection)]
        return min(v.min().item() for v in values), max(v.max().item() for v in values)


def trace_routing(model, tokens: Tensor) -> RoutingTrace:
    """Run the model once over tokens [1, token] without gradients and return what its routers decided.

    Raises ValueError for more than one text at a time and for a model without mixture-of-experts layers.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"trace_routing got {type(tokens).__name__}; expected a tensor [1, token]: for a text, encode "
                        "it first: tokenizer.encode(text)[None]")  # fmt: skip
    if tokens.dim() != 2 or tokens.shape[0] != 1:
        raise ValueError(f"trace_routing got tokens of shape {tuple(tokens.shape)}; expected [1, token]: one text")
    routers = {index: layer.mlp.gate for index, layer in enumerate(model.layers) if isinstance(layer.mlp, ExpertLayer)}
    if not routers:
        raise ValueError("this model has no mixture-of-experts layers; choose one with n_routed_experts set")
    with torch.no_grad():
        with _listening(routers) as heard:
            model(tokens)
        layers = tuple(_layer(index, router, heard[index]) for index, router in routers.items())
    return RoutingTrace(tokens[0].cpu().clone(), layers)


@contextlib.contextmanager
def _listening(routers: dict[int, Router]) -> Iterator[dict[int, Routing]]:
    """Collect what the routers answer until the block ends, however it ends."""
    heard: dict[int, Routing] = {}

    def listen(index: int):
        def hook(_router, _inputs, routing: Routing) -> None:
            heard[index] = Routing(*(part.detach().cpu().clone() for part in routing))

        return hook

    hooks = [router.register_forward_hook(listen(index)) for index, router in routers.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _layer(index: int, router: Router, routing: Routing) -> LayerTrace:
    c, scores = router.config, routing.scores
    count = c.n_routed_experts
    grouped = 1 if c.topk_method == "greedy" else c.n_group
    bias = torch.zeros(count)
    if c.topk_method == "noaux_tc":
        bias = router.e_score_correction_bias.detach().float().cpu().clone()
    same = _chooser(c, bias)
    kept = torch.ones(len(scores), grouped, dtype=torch.bool)
    if c.topk_group < grouped:
        kept = same._kept(scores + bias).unflatten(1, (grouped, -1)).any(-1)
    everywhere = _chooser(c.replace(topk_group=c.n_group), bias)
    return LayerTrace(
        layer=index,
        scores=scores,
        bias=bias,
        chosen=routing.experts,
        weights=routing.weights,
        groups=torch.arange(count) // (count // grouped),
        kept=kept,
        without_bias=_chooser(c, torch.zeros(count)).choose(scores),
        without_groups=everywhere.choose(scores),
    )


def _chooser(config: ModelConfig, bias: Tensor) -> Router:
    """Return a router that can `choose` with this bias; it has no weights, and making it draws no random numbers."""
    with torch.device("meta"):
        router = Router(config)
    if config.topk_method == "noaux_tc":
        router.e_score_correction_bias = bias
    return router
