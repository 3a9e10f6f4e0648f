"""How long one new token's attention takes over a long memory, on one thread: `make bench`.

A layer with 8 heads, hidden size 512, latent 128, rope key 32, and 64 more channels for keys and 64 for values.
"""

import statistics

import pytest
import torch
import transformers
from rounds import TABLE, interleaved, report
from transformers.utils import logging

import deepseek_lab as lab
from deepseek_lab.attention.caches import ExpandedCache
from deepseek_lab.generation.step import CompiledStep, decode_step
from deepseek_lab.kernels import numba_cpu, numba_decode
from deepseek_lab.precision import quantize_tiles

HIDDEN, HEADS, LATENT, ROPE = 512, 8, 128, 32
CONTEXT = 4096
LAYER = lab.PRESETS["tiny"].replace(
    hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=None,
    kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, qk_nope_head_dim=64, v_head_dim=64, first_k_dense_replace=1,
    max_position_embeddings=2 * CONTEXT + 8)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return lab.model.Transformer(LAYER).eval()


def compiled(model, context: int):
    """Return a run of the layer's norm and attention for one token after `context` others, and its hidden state."""
    step, layer, memory = CompiledStep(model, numba_decode), model.layers[0].self_attn, random_memory(1, context + 1)
    turn = torch.view_as_real(layer.rotary(torch.tensor([context])))[0].numpy()
    x = torch.randn(1, HIDDEN)

    def run():
        hidden = x.clone().numpy()
        numba_decode.attention(hidden, *step._attention[0], turn, memory.numpy(), context, layer.scale)
        return torch.from_numpy(hidden)

    return run, x, memory


def random_memory(batch: int, slots: int):
    return torch.randn(batch, slots, LATENT + ROPE)


@torch.inference_mode()
def test_a_step_with_latents_and_with_keys_and_values(one_thread, model):
    run, x, memory = compiled(model, CONTEXT)
    layer, norm, now = model.layers[0].self_attn, model.layers[0].input_layernorm, torch.tensor([CONTEXT])
    latents, expanded = model.new_caches(1, CONTEXT + 8)[0], ExpandedCache(LAYER, 1, CONTEXT + 8)
    latents.append(memory[:, :CONTEXT])
    expanded.append(*layer._rebuild(memory[:, :CONTEXT]))

    def by_torch(cache, absorb):
        out = x + layer(norm(x)[None], now, cache, absorb)[0]
        cache.truncate(CONTEXT)
        return out

    def by_products():
        """Keys and values from their cache as well, without the padding that torch's fused attention asks for."""
        q_nope, q_rope, joint = layer._project(norm(x)[None], now)
        k, v = expanded.append(*layer._rebuild(joint))
        weights = (torch.cat([q_nope, q_rope], dim=-1) @ k.transpose(2, 3) * layer.scale).softmax(dim=-1)
        expanded.truncate(CONTEXT)
        return x + layer.o_proj((weights @ v).transpose(1, 2).flatten(2))[0]

    runs = {
        "absorbed step": run,
        "absorbed step, torch": lambda: by_torch(latents, True),
        "expanded cache, torch": by_products,
        "expanded cache, fused attention": lambda: by_torch(expanded, False),
    }
    for other in runs.values():
        torch.testing.assert_close(other(), run(), rtol=1e-3, atol=1e-4)
    print(f"\n{latents.nbytes / 2**20:.1f} MiB of latents, {expanded.nbytes / 2**20:.1f} MiB of keys and values")
    seconds = interleaved(runs, rounds=101)
    report(seconds, f" at {CONTEXT} tokens", {"expanded cache, torch": (0.5, 0.25)})
    del seconds["absorbed step"]
    report(seconds, asked={"expanded cache, torch": (0.5, 0.25)})


@pytest.mark.parametrize("batch", [1, 8])
def test_the_core(one_thread, batch):
    torch.manual_seed(0)
    q, memory, scale = torch.randn(batch, HEADS, LATENT + ROPE), random_memory(batch, CONTEXT), 96**-0.5
    narrow, blocks = memory.bfloat16(), quantize_tiles(memory[..., :LATENT], scale="ue8m0")
    parts = blocks.codes, blocks.scales, narrow[..., LATENT:].contiguous()

    def bmm():
        weights = (torch.bmm(q, memory.transpose(1, 2)) * scale).softmax(dim=-1)
        return torch.bmm(weights, memory[..., :LATENT])

    core = numba_cpu.decode_attention
    runs = {
        "Numba decode core": lambda: core(q, memory, CONTEXT, scale, LATENT),
        "torch absorbed with bmm": bmm,
        "Numba decode core, BF16": lambda: core(q, narrow, CONTEXT, scale, LATENT),
        "Numba decode core, FP8": lambda: numba_cpu.decode_attention_fp8(q, *parts, CONTEXT, scale),
    }
    torch.testing.assert_close(runs["Numba decode core"](), bmm(), rtol=1e-4, atol=1e-5)
    sizes = {"float32": memory.nbytes, "BF16": narrow.nbytes, "FP8": sum(part.nbytes for part in parts)}
    print(f"\nbytes per token: {', '.join(f'{name} {size // batch // CONTEXT}' for name, size in sizes.items())}")
    seconds = interleaved(runs, rounds=201 if batch == 1 else 31)
    report(seconds, f" at {CONTEXT} tokens, batch {batch}", {"torch absorbed with bmm": (0.9, 0.6)})
    for name in ("Numba decode core, BF16", "Numba decode core, FP8"):
        report({key: seconds[key] for key in (name, "torch absorbed with bmm", "Numba decode core")})


def test_growth_with_the_context(one_thread, model):
    runs, grows = {f"{tokens} tokens": compiled(model, tokens)[0] for tokens in (8192, 1024)}, 8192 / 1024
    seconds = interleaved(runs, rounds=101)
    report(seconds)
    longer, shorter = seconds.values()
    growth = statistics.median(a / b / grows for a, b in zip(longer, shorter, strict=True))
    TABLE.append(("absorbed step, 1k to 8k tokens", "growth of the cache's bytes", growth, 1.2, 1.0))


@pytest.mark.parametrize("batch", [1, 8])
@torch.inference_mode()
def test_the_shipped_model(one_thread, tmp_path, batch, context=1024, count=8):
    """Steps of a batch, all experts included; beyond the 512 tokens that it was trained for, which costs no less."""
    logging.disable_progress_bar()
    shipped = lab.checkpoints.load("tiny")
    model = lab.model.Transformer(shipped.config.replace(max_position_embeddings=2048)).eval()
    model.load_state_dict(shipped.state_dict())
    lab.model.save_hf(model, tmp_path)
    published = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    prompt = torch.randint(256, (batch, context), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(256, (count, batch), generator=torch.Generator().manual_seed(1))
    caches, theirs = model.new_caches(batch, capacity=context + count), transformers.DynamicCache()
    model(prompt, caches)
    published(prompt, past_key_values=theirs, use_cache=True)
    step = decode_step(model, batch)
    assert type(step) is CompiledStep

    def ours():
        logits = [step(token, caches) for token in tokens][-1]
        for cache in caches:
            cache.truncate(context)
        return logits

    def by_transformers():
        logits = [published(token[:, None], past_key_values=theirs, use_cache=True).logits[:, -1] for token in tokens]
        theirs.crop(-count)
        return logits[-1]

    torch.testing.assert_close(ours(), by_transformers(), rtol=1e-3, atol=1e-3)
    runs = {f"shipped model, batch {batch}": ours, "transformers and its cache": by_transformers}
    asked = {"transformers and its cache": (0.25, 0.1)}
    report(interleaved(runs, rounds=15), f" for {count} steps after {context} tokens", asked)
