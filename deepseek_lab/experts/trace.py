"""Write down what every router of a model decided for one text, and what it would have decided without its two rules.

DeepSeek-V3 adds a correction bias when it chooses and keeps each token inside a few groups of experts. A trace holds
the choice as it was, and the choices without the bias, without the group limit and without both, from the same scores.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import ExpertLayer
from .router import Router, Routing


@dataclass(frozen=True, eq=False)
class Choice:
    """What every token of a text chose in one layer under the same rules."""

    chosen: Tensor  # [token, choice] int64, the best first
    weights: Tensor  # [token, choice] float32, what each chosen expert's answer is multiplied by
    kept: Tensor  # [token, group] bool, the groups in which a token may choose
    shares: Tensor | None = None  # [token, choice + 1] float32, see `trace_routing`


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What the router of one layer decided for every token of a text. All tensors lie on the CPU."""

    layer: int  # index in the model
    scores: Tensor  # [token, expert] float32, without the correction bias
    bias: Tensor  # [expert] float32, zeros where the router has none
    groups: Tensor  # [expert] int64, the group that each expert belongs to
    choices: Mapping[tuple[bool, bool], Choice]  # by (with bias, with group limit); (True, True) is the model's

    @property
    def chosen(self) -> Tensor:
        return self.choices[True, True].chosen

    @property
    def weights(self) -> Tensor:
        return self.choices[True, True].weights

    @property
    def kept(self) -> Tensor:
        return self.choices[True, True].kept

    @property
    def without_bias(self) -> Tensor:
        """[token, choice] int64: the choice with a bias of zero and the same group limit."""
        return self.choices[False, True].chosen

    @property
    def without_groups(self) -> Tensor:
        """[token, choice] int64: the choice among all groups with the same bias."""
        return self.choices[True, False].chosen

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


def trace_routing(model, tokens: Tensor, shares: bool = False) -> RoutingTrace:
    """Run the model once over tokens [1, token] without gradients and return what its routers decided.

    shares: also let every expert answer every token, and note which share of the layer's output each chosen expert
    brings and, last, the shared expert. What something brings is measured along the output, so the shares of a token
    add up to 1, and that of an answer which points against the output is negative.
    Raises ValueError for more than one text at a time and for a model without mixture-of-experts layers.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"trace_routing got {type(tokens).__name__}; expected a tensor [1, token]: for a text, encode "
                        "it first: tokenizer.encode(text)[None]")  # fmt: skip
    if tokens.dim() != 2 or tokens.shape[0] != 1:
        raise ValueError(f"trace_routing got tokens of shape {tuple(tokens.shape)}; expected [1, token]: one text")
    found = {index: layer.mlp for index, layer in enumerate(model.layers) if isinstance(layer.mlp, ExpertLayer)}
    if not found:
        raise ValueError("this model has no mixture-of-experts layers; choose one with n_routed_experts set")
    with torch.no_grad():
        with _listening(found) as heard:
            model(tokens)
        layers = tuple(_layer(index, layer, *heard[index], shares) for index, layer in found.items())
    return RoutingTrace(tokens[0].cpu().clone(), layers)


@contextlib.contextmanager
def _listening(layers: dict[int, ExpertLayer]) -> Iterator[dict[int, tuple[Tensor, Routing]]]:
    """Collect what the routers read [token, hidden] and answer until the block ends, however it ends."""
    heard: dict[int, tuple[Tensor, Routing]] = {}

    def listen(index: int):
        def hook(_router, inputs, routing: Routing) -> None:
            heard[index] = inputs[0], routing

        return hook

    hooks = [layer.gate.register_forward_hook(listen(index)) for index, layer in layers.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _layer(index: int, layer: ExpertLayer, x: Tensor, routing: Routing, shares: bool) -> LayerTrace:
    c = layer.gate.config
    groups = 1 if c.topk_method == "greedy" else c.n_group
    answers = _answers(layer, x) if shares else None
    choices = {}
    for rules in itertools.product((True, False), repeat=2):
        router = _with_rules(layer.gate, *rules)
        made = routing if all(rules) else router(x)
        kept = torch.ones(len(x), groups, dtype=torch.bool)
        if router.config.topk_group < groups:
            kept = router._kept(made.scores + _bias(router)).unflatten(1, (groups, -1)).any(-1)
        brought = None if answers is None else _shares(answers, made)
        choices[rules] = Choice(made.experts.cpu(), made.weights.cpu(), kept.cpu(), brought)
    numbers = torch.arange(c.n_routed_experts) // (c.n_routed_experts // groups)
    return LayerTrace(index, routing.scores.cpu(), _bias(layer.gate).float().cpu().clone(), numbers, choices)


def _with_rules(router: Router, bias: bool, groups: bool) -> Router:
    """Return the same router, perhaps without its bias or its group limit; making it draws no random numbers."""
    c = router.config
    with torch.device("meta"):
        other = Router(c if groups else c.replace(topk_group=c.n_group))
    other.weight, other.score = router.weight, router.score  # a gate with a policy scores in its own way
    if c.topk_method == "noaux_tc":
        other.e_score_correction_bias = _bias(router) if bias else torch.zeros_like(_bias(router))
    return other


def _bias(router: Router) -> Tensor:
    """Return the correction bias [expert], zeros where the router has none."""
    bias = getattr(router, "e_score_correction_bias", None)
    return router.weight.new_zeros(len(router.weight)) if bias is None else bias.detach()


def _answers(layer: ExpertLayer, x: Tensor) -> Tensor:
    """Return what every expert and, last, the shared one (or zeros) answers: x [token, hidden] -> [expert + 1, ...]."""
    count = layer.gate.config.n_routed_experts
    routed = layer.experts(x.repeat(count, 1), torch.full((count,), len(x), device=x.device))
    shared = torch.zeros_like(x) if layer.shared_experts is None else layer.shared_experts(x)
    return torch.cat([routed.view(count, *x.shape), shared[None]])


def _shares(answers: Tensor, routing: Routing) -> Tensor:
    """Return the share of each chosen expert and of the shared one in the output's length: [token, choice + 1]."""
    tokens = torch.arange(answers.shape[1], device=answers.device)
    chosen = answers[routing.experts.T, tokens] * routing.weights.T[..., None]
    parts = torch.cat([chosen, answers[-1:]]).float()  # [choice + 1, token, hidden]
    output = parts.sum(0)
    return ((parts * output).sum(-1) / output.square().sum(-1)).T.cpu()
