"""Small models of the published implementation (transformers), every tensor filled so that a wrong answer shows.

A fresh transformers model has zeros in its biases and ones in its norms: half of the mistakes would pass unseen.
"""

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.utils import logging

from deepseek_lab.model import load_hf

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # on models this small a second thread only waits

VOCABULARY = 64
COMMON = dict(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              max_position_embeddings=128, pad_token_id=None, bos_token_id=1, eos_token_id=None)  # fmt: skip
LATENT = dict(COMMON, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8,
              v_head_dim=12, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24,
              first_k_dense_replace=1, n_group=4, topk_group=2)  # fmt: skip
V3 = dict(LATENT, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5, num_mtp_layers=0)
V2 = dict(LATENT, n_shared_experts=2, topk_method="group_limited_greedy", routed_scaling_factor=1.5)
V2_LITE = dict(V2, q_lora_rank=None, topk_method="greedy", n_group=None, topk_group=None, routed_scaling_factor=1.0)
LLAMA = dict(COMMON, num_key_value_heads=2, rms_norm_eps=1e-5)
QWEN = dict(COMMON, num_key_value_heads=2, tie_word_embeddings=True)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=32.0,
            beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, original_max_position_embeddings=32,
              low_freq_factor=1.0, high_freq_factor=4.0)  # fmt: skip

CLASSES = {
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, V3),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM, V2),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, QWEN),
}


def yarn(**changes) -> dict:
    """YaRN settings with some changed; None takes a setting out."""
    return {k: v for k, v in {**YARN, **changes}.items() if v is not None}


def build(kind: str, seed: int = 0, **changes):
    """A published model of a kind, with the changed settings, filled, in evaluation mode."""
    config_class, model_class, settings = CLASSES[kind]
    config = config_class(**{**settings, **changes}, attn_implementation="eager")
    model = model_class(config)
    if "deepseek" in kind:
        model.set_experts_implementation("eager")
    return fill(model, seed).eval()


@torch.no_grad()
def fill(model, seed: int = 0):
    """Fill every tensor of a model, ours or published: norms around 1, biases around 0, matrices by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            noise = 0.2 * noise
        elif "norm" in name:
            noise = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            noise = 0.3 * noise
        elif "embed_tokens" not in name:
            noise = noise / tensor.shape[-1] ** 0.5
        tensor.copy_(noise)
    return model


def ours(reference, directory):
    """The same model in this library, by way of its published files."""
    reference.save_pretrained(directory)
    return load_hf(directory)


def random_v3(seed: int) -> dict:
    """Settings of a random small DeepSeek-V3, with widths that are no multiples of anything."""
    r = random.Random(seed)
    groups, size = r.choice([(1, 5), (2, 3), (3, 2), (4, 3), (2, 4)])
    kept = r.randint(1, groups)
    heads, layers = r.randint(1, 5), r.randint(1, 3)
    aligned = r.random() < 0.4  # the grouped product of torch wants multiples of 16 bytes, the loop takes anything
    settings = dict(
        hidden_size=4 * r.randint(4, 12) if aligned else r.randint(17, 45),
        moe_intermediate_size=4 * r.randint(2, 7) if aligned else r.randint(5, 27),
        intermediate_size=r.randint(20, 70), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, q_lora_rank=r.choice([None, r.randint(5, 30)]), kv_lora_rank=r.randint(3, 25),
        qk_nope_head_dim=r.randint(3, 15), qk_rope_head_dim=r.choice([2, 4, 6, 10]), v_head_dim=r.randint(3, 24),
        n_routed_experts=groups * size, n_group=groups, topk_group=kept, num_experts_per_tok=r.randint(1, kept * size),
        n_shared_experts=r.randint(1, 2), first_k_dense_replace=r.randint(0, layers - 1),
        norm_topk_prob=r.random() < 0.7, routed_scaling_factor=r.choice([1.0, 2.5]), rope_interleave=r.random() < 0.7,
    )  # fmt: skip
    if r.random() < 0.6:
        settings["rope_parameters"] = r.choice([yarn(), yarn(mscale=0.707), yarn(mscale=None, mscale_all_dim=None)])
    return settings


def token_ids(batch: int = 2, length: int = 40, seed: int = 1234) -> torch.Tensor:
    """Random tokens [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def published_logits(reference, tokens) -> torch.Tensor:
    return reference(input_ids=tokens, use_cache=False).logits.float()


@torch.no_grad()
def cached_logits(model, tokens, chunks) -> torch.Tensor:
    """Our logits when the tokens come in chunks of these lengths, the last length repeated until all are read."""
    caches, parts, start = model.new_caches(len(tokens), capacity=5), [], 0
    lengths = iter(chunks)
    while start < tokens.shape[1]:
        length = next(lengths, chunks[-1])
        parts.append(model(tokens[:, start : start + length], caches))
        start += length
    return torch.cat(parts, dim=1)


def difference(got, expected) -> float:
    """The largest difference as a share of the largest expected value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
