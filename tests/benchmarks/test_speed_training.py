"""How long a training step takes, on one thread and on two, and how much memory: `make bench`.

A step is forward pass, backward pass and AdamW on 16 x 256 tokens. Everybody runs once per round, in turns: the
course's model in FP32, in FP8 as DeepSeek-V3 and, where the processor has instructions for it, in BF16; `transformers`
with the same weights and its implementations of experts; and the bare matrix products of the step. A ratio is the
median of the ratios within a round.
"""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
import transformers
from rounds import TABLE, interleaved, report
from transformers.utils import logging

import deepseek_lab as lab
from deepseek_lab.accounting import record_step, training_flops
from deepseek_lab.model.recompute import RECOMPUTABLE
from deepseek_lab.precision import PrecisionPolicy, fast_bf16

BATCH, LENGTH = 16, 256
TINY = lab.PRESETS["tiny"]
POLICIES = {"FP8 step": PrecisionPolicy(), "BF16 step": PrecisionPolicy(products="bf16", outputs="bf16")}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_training_step(threads, tmp_path):
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model, batch = lab.model.Transformer(TINY), torch.randint(256, (BATCH, LENGTH + 1))
    lab.model.save_hf(model, tmp_path)
    runs = {"FP32 step": step_of(model, model, batch)}
    for name, policy in POLICIES.items():
        if name != "BF16 step" or fast_bf16():
            narrow = lab.model.apply_policy(copy.deepcopy(model), policy)
            runs[name] = step_of(narrow, narrow, batch)
    published = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").train()
    their_step = step_of(published, lambda tokens: published(input_ids=tokens).logits, batch)
    for name in ("eager", "grouped_mm"):  # batched_mm takes half a minute a step
        runs[f"transformers, {name}"] = lambda name=name: (published.set_experts_implementation(name), their_step())
    runs["matrix products"] = products_of(model)
    seconds = interleaved(runs, rounds=7)
    _, fastest = min((statistics.median(times), name) for name, times in seconds.items() if "transformers" in name)
    print_ratios(seconds, threads, "FP32 step", {fastest: (0.8, 0.6), "matrix products": (1.9, 1.4)})
    for name in POLICIES.keys() & runs:
        print_ratios(seconds, threads, name, {"FP32 step": (0.8, 0.6) if name == "BF16 step" else (2.0, 1.4)})


def step_of(model, logits_of, batch):
    """Return a run of one training step; logits_of(tokens [batch, token]) asks the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        F.cross_entropy(logits_of(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products_of(model):
    """Return a run of all matrix products of one step, forward and backward: the FLOPs that `training_flops` counts.

    Experts get equally many tokens. Attention is causal, so every query meets half of the keys; nothing is done twice.
    """
    tokens, heads = BATCH * LENGTH, BATCH * TINY.num_attention_heads
    shapes = []  # each a product of [..., n, k] and [..., k, m], with its two gradients
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            shapes.append((1, tokens, *parameter.shape))
        elif parameter.dim() == 3:  # every token meets some of the stacked experts
            rows = tokens * TINY.num_experts_per_tok // TINY.n_routed_experts
            shapes += [(1, rows, *parameter.shape[1:])] * TINY.n_routed_experts
    scores, mix = (heads, LENGTH, LENGTH // 2, TINY.qk_head_dim), (heads, LENGTH, TINY.v_head_dim, LENGTH // 2)
    shapes += [scores, mix] * TINY.num_hidden_layers
    counted = sum(3 * 2 * times * n * m * k for times, n, m, k in shapes)
    assert counted == pytest.approx(training_flops(TINY, LENGTH).total * tokens, rel=0.005)  # norms are none
    operands = [[torch.randn(b, *size).squeeze(0) for size in ((n, k), (m, k), (n, m))] for b, n, m, k in shapes]

    def run():
        for x, w, gradient in operands:
            x @ w.mT, gradient @ w, gradient.mT @ x

    return run


def print_ratios(seconds, threads, first, asked):
    """Report the times of one step beside those that it is compared with."""
    text = "thread" if threads == 1 else "threads"
    label = {name: f"{name}, {threads} {text}" for name in (first, *asked)}
    report({label[name]: seconds[name] for name in label}, f" a step of {BATCH} x {LENGTH} tokens",
           {label[name]: limits for name, limits in asked.items()})  # fmt: skip


def test_memory_of_a_step(one_thread):
    """The most bytes alive at one moment of a step of 4 x 512 tokens: weights, gradients and moments among them."""
    torch.manual_seed(0)
    model, peaks = lab.model.Transformer(TINY), []
    step = step_of(model, model, torch.randint(256, (4, 513)))
    step()
    for names in (RECOMPUTABLE, ()):
        model.recompute = names
        peaks.append(record_step(model, step).peak.total)
    print(f"\npeak memory with recomputation {peaks[0] / 2**20:.1f} MiB, without {peaks[1] / 2**20:.1f} MiB")
    TABLE.append(("peak memory with recomputation", "without", peaks[0] / peaks[1], 0.7, 0.5))
