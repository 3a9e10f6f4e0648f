"""The same weights give the same logits as the published implementation, however the tokens arrive."""

import pytest
import references
import torch
from references import LLAMA3, V2_LITE, cached_logits, difference, published_logits, token_ids, yarn
from transformers import AutoModelForCausalLM

from deepseek_lab.model import load_hf

TOLERANCE = 1e-5  # of the largest logit; float32 sums in another order differ by about 1e-6

MODELS = {
    "v3": ("deepseek_v3", {}),
    "v3 with half-split rope": ("deepseek_v3", dict(rope_interleave=False)),
    "v3 without query latent": ("deepseek_v3", dict(q_lora_rank=None)),
    "v3 with two shared experts": ("deepseek_v3", dict(n_shared_experts=2)),
    "v3 without normalised weights": ("deepseek_v3", dict(norm_topk_prob=False)),
    "v3, experts of odd width": ("deepseek_v3", dict(moe_intermediate_size=23, hidden_size=47)),
    "v3, every layer with experts": ("deepseek_v3", dict(first_k_dense_replace=0)),
    "v3, every layer dense": ("deepseek_v3", dict(first_k_dense_replace=3)),
    "v3 with another norm epsilon": ("deepseek_v3", dict(rms_norm_eps=1e-2)),
    "v3 with yarn": ("deepseek_v3", dict(rope_parameters=yarn())),
    "v3 with yarn, unequal mscale": ("deepseek_v3", dict(rope_parameters=yarn(mscale=0.707))),
    "v3 with yarn, no mscale": ("deepseek_v3", dict(rope_parameters=yarn(mscale=None, mscale_all_dim=None))),
    "v3 with yarn, mscale only": ("deepseek_v3", dict(rope_parameters=yarn(mscale_all_dim=None))),
    "v3 with yarn, mscale_all_dim only": ("deepseek_v3", dict(rope_parameters=yarn(mscale=None))),
    "v2": ("deepseek_v2", {}),
    "v2 with yarn": ("deepseek_v2", dict(rope_parameters=yarn(mscale=0.707, mscale_all_dim=0.707))),
    "v2-lite": ("deepseek_v2", V2_LITE),
    "llama": ("llama", {}),
    "llama with all heads": ("llama", dict(num_key_value_heads=4)),
    "llama with one group": ("llama", dict(num_key_value_heads=1)),
    "llama with its long context": ("llama", dict(rope_parameters=LLAMA3)),
    "llama with wide heads": ("llama", dict(head_dim=20)),
    "llama with biases": ("llama", dict(attention_bias=True)),
    "qwen2": ("qwen2", {}),
    "qwen2 with a head of its own": ("qwen2", dict(tie_word_embeddings=False)),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(the published model's logits, our model, the tokens)"""
    kind, changes = MODELS[request.param]
    reference = references.build(kind, **changes)
    tokens = token_ids()
    return published_logits(reference, tokens), references.ours(reference, tmp_path_factory.mktemp("model")), tokens


def test_logits_equal_the_published_implementation(pair):
    expected, model, tokens = pair
    with torch.no_grad():
        assert difference(model(tokens), expected) < TOLERANCE


def test_prefill_and_decode_equal_the_published_implementation(pair):
    expected, model, tokens = pair
    assert difference(cached_logits(model, tokens, [13, 1]), expected) < TOLERANCE


def test_a_prompt_read_in_chunks_equals_the_published_implementation(pair):
    expected, model, tokens = pair
    assert difference(cached_logits(model, tokens, [1, 7, 2, 16]), expected) < TOLERANCE


def test_long_batches_and_single_tokens_agree_with_short_ones(pair):
    _, model, tokens = pair
    with torch.no_grad():  # one token at a time takes another way through the experts than eighty
        assert difference(model(tokens[:1, :1]), model(tokens)[:1, :1]) < TOLERANCE


@pytest.mark.parametrize("seed", range(16))
def test_a_random_v3_equals_the_published_implementation(seed, tmp_path):
    reference = references.build("deepseek_v3", seed, **references.random_v3(seed))
    tokens = token_ids(3, 37, seed)
    expected = published_logits(reference, tokens)
    model = references.ours(reference, tmp_path)
    with torch.no_grad():
        assert difference(model(tokens), expected) < TOLERANCE
    assert difference(cached_logits(model, tokens, [11, 1, 1, 5, 1]), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "llama", "qwen2"])
def test_bf16_files_give_the_logits_of_the_same_rounded_weights(kind, tmp_path):
    references.build(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model, tokens = load_hf(tmp_path), token_ids()
    with torch.no_grad():
        assert difference(model(tokens), published_logits(reference, tokens)) < TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_in_bf16_is_as_far_from_float32_as_the_published_one(kind, tmp_path):
    reference, tokens = references.build(kind), token_ids()
    exact = published_logits(reference, tokens)
    references.ours(reference, tmp_path)
    model = load_hf(tmp_path, dtype=torch.bfloat16)
    theirs = (published_logits(reference.to(torch.bfloat16), tokens) - exact).square().mean().sqrt()
    for got in (model(tokens).detach(), cached_logits(model, tokens, [13, 1])):
        assert got.dtype == torch.bfloat16
        assert (got.float() - exact).square().mean().sqrt() < 1.5 * theirs
