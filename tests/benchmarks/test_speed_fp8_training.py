"""How long a training step in eight bits takes, on one thread, beside the step in FP32: `make bench`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rounds import interleaved, report

import deepseek_lab as lab
from deepseek_lab.precision import PrecisionPolicy


@pytest.mark.parametrize(("batch", "length"), [(16, 256), (4, 512)])
def test_a_step_in_eight_bits(one_thread, batch, length):
    torch.manual_seed(0)
    plain = lab.model.Transformer(lab.PRESETS["tiny"])
    narrow = {name: copy.deepcopy(plain) for name in ("fp8", "bf16")}
    tokens = torch.randint(256, (batch, length + 1))

    def step_of(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step():
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    runs = {"FP8, forward, backward, AdamW": step_of(lab.model.apply_policy(narrow["fp8"], PrecisionPolicy()))}
    runs["FP32"] = step_of(plain)
    runs["BF16, emulated"] = step_of(lab.model.apply_policy(narrow["bf16"], PrecisionPolicy(products="bf16")))
    report(interleaved(runs, rounds=7), f" a step of {batch} x {length} tokens", {"FP32": (2.0, 1.5)})
