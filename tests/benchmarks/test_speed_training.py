"""How long a training step takes, on one thread: `make bench`.

The peers run in the same rounds: `transformers` with the same weights and its implementations of experts, and bare
matrix products of as many floating-point operations.
"""

import torch
import torch.nn.functional as F
import transformers
from rounds import interleaved, report
from transformers.utils import logging

import deepseek_lab as lab

BATCH, LENGTH = 16, 256


def test_training_step(one_thread, tmp_path):
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = lab.model.Transformer(lab.PRESETS["tiny"])
    lab.model.save_hf(model, tmp_path)
    published = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").train()
    batch = torch.randint(256, (BATCH, LENGTH + 1))
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (model, published))

    def step(logits_of, optimizer):
        F.cross_entropy(logits_of(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def their_step(implementation):
        published.set_experts_implementation(implementation)
        step(lambda tokens: published(input_ids=tokens).logits, theirs)

    runs = {"ours, forward, backward, AdamW": lambda: step(model, ours)}
    for name in ("eager", "grouped_mm"):  # batched_mm takes half a minute a step
        runs[f"transformers, {name}"] = lambda name=name: their_step(name)
    runs["matrix products alone"] = _products(model)
    report(interleaved(runs, rounds=7), f" a step of {BATCH} x {LENGTH} tokens")


def _products(model):
    """Return a run of the linear layers' products, forward and backward, for one batch; attention is left out."""
    tokens, shapes = BATCH * LENGTH, []
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            shapes.append((tokens, *parameter.shape))
        elif parameter.dim() == 3:  # every token meets some of the stacked experts
            rows = tokens * config.num_experts_per_tok // config.n_routed_experts
            shapes += [(rows, *parameter.shape[1:])] * config.n_routed_experts
    operands = [(torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)) for n, o, i in shapes]

    def run():
        for x, w, gradient in operands:
            x @ w.T, gradient @ w, gradient.T @ x

    return run
