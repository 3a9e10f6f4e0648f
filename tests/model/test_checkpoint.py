"""What is saved comes back, in every format, and the published implementation reads it too."""

import json

import numpy as np
import pytest
import references
import torch
from references import difference, published_logits, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_lab.config import ModelConfig
from deepseek_lab.model import Transformer, checkpoint, load_hf, save_hf
from deepseek_lab.presets import PRESETS

INDEX = "model.safetensors.index.json"
SMALL = PRESETS["tiny"].replace(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=2, intermediate_size=40, moe_intermediate_size=16)  # fmt: skip
# No width is a multiple of 128 and most need two blocks: the edges of the blocks are ragged.
RAGGED = SMALL.replace(hidden_size=136, intermediate_size=150, moe_intermediate_size=130, n_routed_experts=4, n_group=2,
                       num_experts_per_tok=2, topk_group=1, kv_lora_rank=131, q_lora_rank=129)  # fmt: skip


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    return references.fill(Transformer(config), seed).eval()


def same(a: Transformer, b: Transformer) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tensors_of(directory) -> dict:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000, 1])
@pytest.mark.parametrize("name", ["v3", "llama", "qwen2 tied"])
def test_float32_comes_back_bit_for_bit(name, max_shard_bytes, tmp_path):
    dense = dict(model_type="llama", vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=40)  # fmt: skip
    config = {"v3": SMALL, "llama": ModelConfig(**dense),
              "qwen2 tied": ModelConfig(**{**dense, "model_type": "qwen2", "attention_bias": True,
                                           "tie_word_embeddings": True})}[name]  # fmt: skip
    model = model_of(config)
    save_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
    again = load_hf(tmp_path)
    assert again.config == config
    assert same(again, model)
    assert not again.training and all(p.requires_grad for p in again.parameters())
    assert (again.lm_head.weight is again.embed_tokens.weight) == config.tie_word_embeddings
    assert (tmp_path / INDEX).exists() == (max_shard_bytes < 10**6)


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path):
    save_hf(model_of(SMALL), tmp_path, max_shard_bytes=40_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    held = {name: file.name for file in shards for name in load_file(file)}
    assert held == index["weight_map"]
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in shards]
    assert max(sizes) <= 40_000 and sum(sizes) == index["metadata"]["total_size"]


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000])
def test_bf16_comes_back_as_the_rounded_weights(max_shard_bytes, tmp_path):
    model = model_of(SMALL)
    save_hf(model, tmp_path, "bf16", max_shard_bytes)
    state = load_hf(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        rounded = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16().float()
        assert torch.equal(state[name], rounded), name
    assert {t.dtype for t in load_hf(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 100_000])
def test_fp8_values_are_codes_times_the_scale_of_their_block(max_shard_bytes, tmp_path):
    model = model_of(RAGGED)
    save_hf(model, tmp_path, "fp8", max_shard_bytes)
    stored = tensors_of(tmp_path)
    for file in tmp_path.glob("*.safetensors"):  # other scales than ours, so that a mixed-up block shows
        changed = load_file(file)
        for name in [n for n in changed if n.endswith("_scale_inv")]:
            generator = torch.Generator().manual_seed(len(name))
            changed[name] = stored[name] = torch.rand(changed[name].shape, generator=generator) + 0.5
        save_file(changed, file)
    state, quantised = load_hf(tmp_path).state_dict(), 0
    for name in [n for n in stored if n + "_scale_inv" in stored]:
        codes, scales = stored[name].float().numpy(), stored[name + "_scale_inv"].numpy()
        rows, columns = codes.shape
        assert scales.shape == (-(-rows // 128), -(-columns // 128))
        expected = codes * scales[np.arange(rows)[:, None] // 128, np.arange(columns) // 128]
        assert np.array_equal(_ours(state, name).numpy(), expected), name
        quantised += 1
    # per layer 5 in attention; 3 in the dense one; 4 experts and 1 shared of 3 in the other
    assert quantised == 2 * 5 + 3 + 5 * 3


def _ours(state: dict, published: str) -> torch.Tensor:
    """Our tensor for a published name, found without the library's own table."""
    name = published.removeprefix("model.")
    if ".experts." not in name:
        return state[name]
    prefix, rest = name.split(".experts.")
    expert, part, _ = rest.split(".")
    if part == "down_proj":
        return state[f"{prefix}.experts.down_proj"][int(expert)]
    return state[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)[part == "up_proj"]


def test_fp8_keeps_what_the_released_weights_keep(tmp_path):
    model = model_of(RAGGED)
    save_hf(model, tmp_path, "fp8")
    kinds = {name: t.dtype for name, t in tensors_of(tmp_path).items() if not name.endswith("_scale_inv")}
    wide = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert all("norm" in n or "embed_tokens" in n or "lm_head" in n or n.endswith("mlp.gate.weight") for n in wide)
    assert kinds["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    assert kinds["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"] == torch.float8_e4m3fn
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    again, tokens = load_hf(tmp_path), token_ids(length=20) % RAGGED.vocab_size
    for (
        name,
        tensor,
    ) in model.state_dict().items():  # E4M3 keeps three fraction bits: 1/16 of a value, or of the smallest
        assert torch.allclose(again.state_dict()[name], tensor, rtol=1 / 16, atol=2e-3), name
    with torch.no_grad():
        assert again(tokens).isfinite().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "llama", "qwen2"])
def test_the_published_implementation_reads_our_files(kind, dtype, tmp_path):
    model, tokens = references.ours(references.build(kind), tmp_path / "theirs"), token_ids()
    save_hf(model, tmp_path / "ours", dtype, max_shard_bytes=40_000)
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert difference(load_hf(tmp_path / "ours")(tokens), published_logits(reference, tokens)) < 1e-5


def test_a_config_may_name_modules_that_the_files_do_not_hold(tmp_path):
    model = model_of(SMALL)
    save_hf(model, tmp_path)
    file, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_nextn_predict_layers": 1}))
    assert same(load_hf(tmp_path), model)
    assert load_hf(tmp_path).config.num_nextn_predict_layers == 0
    save_file({**load_file(file), "model.layers.2.eh_proj.weight": torch.ones(3, 4)}, file)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.2\.\S+ \[.*\] is missing"):
        load_hf(tmp_path)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.eh_proj\.weight is not part of this config"):
        load_hf(tmp_path)


def test_saving_again_leaves_no_stale_shards(tmp_path):
    first, second = model_of(SMALL, 1), model_of(SMALL, 2)
    for model, limit in ((first, 30_000), (second, 10**9), (first, 10_000), (second, 30_000)):
        save_hf(model, tmp_path, max_shard_bytes=limit)
        assert same(load_hf(tmp_path), model)
        files = {p.name for p in tmp_path.iterdir()}
        shards = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()) if INDEX in files else set()
        assert files == (shards | {INDEX, "config.json"} if shards else {"model.safetensors", "config.json"})


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_save_that_fails_leaves_the_old_files_intact(fails_at, tmp_path, monkeypatch):
    old, calls = model_of(SMALL, 1), []
    save_hf(old, tmp_path, max_shard_bytes=30_000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata=None):
        calls.append(path)
        path.write_bytes(b"half a file")
        if len(calls) == fails_at:
            raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_hf(model_of(SMALL, 2), tmp_path, max_shard_bytes=30_000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert same(load_hf(tmp_path), old)


def test_nan_cannot_be_saved_as_fp8_and_nothing_is_written(tmp_path):
    model = model_of(SMALL)
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj[3, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity") as caught:
        save_hf(model, tmp_path, "fp8")
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_tensor_is_stored_alone_not_with_the_memory_it_shares(tmp_path):
    save_hf(model_of(SMALL), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.1.mlp.experts.7.up_proj.weight").get_shape() == [16, 32]
    size = sum(t.nbytes for t in tensors_of(tmp_path).values())
    assert size < (tmp_path / "model.safetensors").stat().st_size < 1.3 * size


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype='int8'; choose one of fp32, bf16, fp8"):
        save_hf(model_of(SMALL), tmp_path / "new", "int8")
    assert not (tmp_path / "new").exists()
