"""How long a greedy text takes with drafts and without, on one thread: `make bench`.

128 new tokens after each of four prompts of 64, by the shipped model, whose module was trained with it. Everybody runs
once per round, in turns; a ratio is the median of the ratios within a round. What is accepted is counted and printed.
"""

from functools import partial

import pytest
import torch
from rounds import interleaved, report

import deepseek_lab as lab
from deepseek_lab.generation import generate, speculate
from deepseek_lab.generation.step import CompiledStep, ModelStep, decode_step

NEW_TOKENS, PROMPT, PROMPTS = 128, 64, 4


@pytest.fixture(scope="module")
def model():
    shipped = lab.checkpoints.load("tiny")
    if not shipped.multi_token:
        pytest.skip("the shipped model has no prediction module yet: python -m deepseek_lab.checkpoints")
    return shipped


def prompts() -> list[torch.Tensor]:
    """Stretches of the held-out text."""
    _, held_out = lab.data.split(lab.data.python_reference())
    starts = torch.linspace(0, len(held_out) - PROMPT, PROMPTS).long().tolist()
    return [held_out[start : start + PROMPT].long()[None] for start in starts]


@pytest.mark.parametrize(("kernels", "rounds"), [("numba", 15), ("reference", 3)])
def test_a_greedy_text(one_thread, model, monkeypatch, kernels, rounds):
    monkeypatch.setenv("LAB_KERNELS", kernels)
    texts = prompts()
    results = [speculate(model, text, NEW_TOKENS) for text in texts]  # also compiles and warms up
    plain = [generate(model, text, NEW_TOKENS) for text in texts]
    assert all(torch.equal(result.tokens, text) for result, text in zip(results, plain, strict=True))
    acceptance = [f"{result.acceptance:.2f}" for result in results]
    print(f"\n{kernels}: accepted {', '.join(acceptance)}; tokens a step "
          f"{sum(r.tokens_per_step for r in results) / PROMPTS:.2f}")  # fmt: skip
    names = {f"speculative, {kernels}": speculate, f"plain, {kernels}": generate}
    runs = {
        name: lambda write=write: [write(model, text, NEW_TOKENS) for text in texts] for name, write in names.items()
    }
    report(interleaved(runs, rounds), f" for {PROMPTS} x {NEW_TOKENS} tokens", {f"plain, {kernels}": (0.8, 0.6)})


def test_the_parts_of_a_step(one_thread, model, context=200):
    """One pass over several tokens, and one draft, beside the pass over one token that plain decoding makes."""
    step, whole = decode_step(model, 1), ModelStep(model)
    assert type(step) is CompiledStep
    caches, (own, *_) = model.new_caches(1, 2 * context), model.new_caches(1, 2 * context, multi_token=True)
    tokens = torch.randint(256, (1, context + 4), generator=torch.Generator().manual_seed(0))
    _, states = whole.read(tokens[:, :context], caches)
    whole.draft(0, states, tokens[:, 1 : context + 1], own)
    state = states[:, -1:].clone()

    def read(count):
        for cache in caches:
            cache.truncate(context)
        step.read(tokens[:, context : context + count], caches)

    def draft():
        own.truncate(context)
        step.draft(0, state, tokens[:, context + 1 : context + 2], own)

    runs = {f"a pass over {n} token{'s' * (n > 1)}": partial(read, n) for n in (2, 1, 3)} | {"a draft": draft}
    seconds = interleaved(runs, rounds=1001)
    report(seconds)
    one = seconds["a pass over 1 token"]
    report({name: seconds[name] for name in ("a draft",)} | {"a pass over 1 token": one})
