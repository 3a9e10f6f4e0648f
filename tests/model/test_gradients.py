"""A training step moves every weight as the published implementation's autograd would."""

import pytest
import references
import torch
import torch.nn.functional as F
from references import token_ids, yarn

CASES = {
    "v3": ("deepseek_v3", {}),
    "v3, experts in a loop": ("deepseek_v3", dict(moe_intermediate_size=23, hidden_size=47)),
    "v3 with yarn and half-split rope": ("deepseek_v3", dict(rope_parameters=yarn(), rope_interleave=False)),
    "v3, few tokens for many experts": ("deepseek_v3", dict(n_routed_experts=64, num_experts_per_tok=2)),
    "v2": ("deepseek_v2", {}),
    "llama": ("llama", {}),
    "qwen2, tied embeddings": ("qwen2", {}),
}


def gradients(model, logits, tokens) -> dict:
    """{parameter: gradient of the mean next-token loss}, without the prefix of published names."""
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_the_published_implementations(case, tmp_path):
    kind, changes = CASES[case]
    reference = references.build(kind, **changes)
    model, tokens = references.ours(reference, tmp_path).train(), token_ids()
    expected = gradients(reference.train(), reference(input_ids=tokens, use_cache=False).logits, tokens)
    got = gradients(model, model(tokens), tokens)
    assert set(got) == set(expected)
    for name, gradient in got.items():
        assert expected[name].abs().max() > 0, f"{name} has no gradient: the comparison would prove nothing"
        assert references.difference(gradient, expected[name]) < 1e-4, name


def test_a_model_that_has_written_text_can_still_be_trained(tmp_path):
    model, tokens = references.ours(references.build("deepseek_v3"), tmp_path), token_ids()
    with torch.inference_mode():  # tables made in here must serve the step below
        model(tokens)
    assert all(gradient.isfinite().all() for gradient in gradients(model, model(tokens), tokens).values())
