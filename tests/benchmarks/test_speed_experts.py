"""How long a layer of sparse experts takes, and moving rows to experts and back, on one thread: `make bench`.

Hidden size 256; 4 of 32 experts of width 128 for each token, without a shared expert. Forward and backward.
"""

import pytest
import torch
import transformers
from rounds import interleaved, report
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

import deepseek_lab as lab
from deepseek_lab.experts import ExpertLayer
from deepseek_lab.kernels import numba_cpu, reference

HIDDEN, WIDTH, EXPERTS, CHOICES = 256, 128, 32, 4
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def layer_of(experts: int = EXPERTS, groups: int = 8) -> ExpertLayer:
    torch.manual_seed(0)
    return ExpertLayer(lab.PRESETS["tiny"].replace(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=experts, num_experts_per_tok=CHOICES,
        n_shared_experts=0, n_group=groups, topk_group=groups // 2))  # fmt: skip


def step_of(layer: nn.Module, tokens: int):
    """Return a run of the layer, forward and backward, that leaves no gradients behind."""
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(1, tokens, HIDDEN, generator=generator) for _ in range(2))
    x.requires_grad_()

    def step():
        out = layer(x)
        out.backward(gradient)
        layer.zero_grad()
        x.grad = None
        return out.detach()

    return step


def products_of(tokens: int):
    """Return a run of the products of as many floating-point operations, the tokens spread evenly."""
    rows = tokens * CHOICES // EXPERTS
    operands = [
        (torch.randn(rows, i), torch.randn(o, i), torch.randn(rows, o))
        for o, i in [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)] * EXPERTS
    ]

    def run():
        for x, w, gradient in operands:
            x @ w.T, gradient @ w, gradient.T @ x

    return run


def test_a_layer_beside_its_products(one_thread):
    runs = {"MoE layer, 2,048 tokens": step_of(layer_of(), 2048), "products of the same FLOPs": products_of(2048)}
    report(interleaved(runs, 31), asked={"products of the same FLOPs": (1.6, 1.15)})


def published(layer: ExpertLayer, implementation: str) -> nn.Module:
    """The layer of `transformers` with the same weights; without the shared expert, which ours does not have here."""
    c = layer.gate.config
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=CHOICES,
        n_group=c.n_group, topk_group=c.topk_group, norm_topk_prob=c.norm_topk_prob,
        routed_scaling_factor=c.routed_scaling_factor)  # fmt: skip
    config._experts_implementation = implementation
    theirs = DeepseekV3MoE(config)
    theirs.shared_experts = Nothing()
    theirs.load_state_dict(layer.state_dict())
    return theirs


class Nothing(nn.Module):
    def forward(self, x):
        return 0


def test_few_tokens_beside_transformers(one_thread):
    """The published layer alone is "eager"; a whole model of theirs chooses "grouped_mm", torch's product as here."""
    layer = layer_of()
    runs = {"MoE layer, 64 tokens": step_of(layer, 64)}
    runs |= {f"transformers, {name}": step_of(published(layer, name), 64) for name in IMPLEMENTATIONS}
    runs["products of the same FLOPs"] = products_of(64)
    ours, *theirs = [run() for run in list(runs.values())[:-1]]
    for other in theirs:
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-6)
    report(interleaved(runs, 41), asked={"transformers, eager": (0.5, 0.2)})


def test_many_experts_beside_few(one_thread):
    """The same FLOPs per token: 4 experts of the same width. Routers differ: 64 scores for each token against 8."""
    runs = {f"{experts} experts, 2,048 tokens": step_of(layer_of(experts, groups=4), 2048) for experts in (64, 8)}
    report(interleaved(runs, 31), asked={"8 experts, 2,048 tokens": (1.5, 1.2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_there_and_back(one_thread, dtype):
    """To their experts and back, weighted. Unweighted, `index_add_` is spared a product that ours always makes."""
    torch.manual_seed(0)
    x, weights = torch.randn(2048, HIDDEN).to(dtype), torch.rand(2048, CHOICES)
    order = torch.rand(2048, EXPERTS).topk(CHOICES).indices.flatten().argsort(stable=True)
    back = order.argsort()

    def ours(body):
        return lambda: body.unpermute(body.permute(x, order, CHOICES), back, weights)

    def torchs(weighted):
        tokens = order // CHOICES
        sent = x.index_select(0, tokens)
        if weighted:
            sent.mul_(weights.flatten()[order, None])
        return torch.zeros_like(x).index_add_(0, tokens, sent)

    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    assert torch.equal(ours(numba_cpu)(), ours(reference)())
    torch.testing.assert_close(ours(numba_cpu)(), torchs(True), rtol=rounding, atol=rounding)
    runs = {f"permute, unpermute, {str(dtype).removeprefix('torch.')}": ours(numba_cpu)}
    runs |= {"index_select, index_add": lambda: torchs(True), "unweighted": lambda: torchs(False)}
    report(interleaved(runs, 101), asked={"index_select, index_add": (1.0, 0.6)} if dtype == torch.float32 else None)
