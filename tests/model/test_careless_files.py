"""What a careless hand does to files and caches is refused, or hurts nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import SMALL, fresh

from deepseek_lab.generation import generate
from deepseek_lab.model import load_hf, save_hf


def test_saving_removes_its_own_old_files_and_no_others(tmp_path):
    save_hf(fresh(SMALL), tmp_path, max_shard_bytes=50_000)
    others = ["model-run.safetensors", "model_mine.safetensors", "model-00001.safetensors"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    save_hf(fresh(SMALL), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", *others}


@pytest.mark.parametrize("change", [
    lambda model: setattr(model, "lm_head", nn.Linear(32, 260, bias=True)),
    lambda model: setattr(model, "lm_head", nn.Linear(32, 300, bias=False)),
    lambda model: setattr(model, "extra", nn.Linear(2, 2)),
], ids=["a bias", "another size", "another module"])  # fmt: skip
def test_what_the_config_does_not_name_is_not_dropped_in_silence(change, tmp_path):
    model = fresh(SMALL)
    change(model)
    with pytest.raises(ValueError, match=r"(lm_head|extra)\.\w+ has shape .* by its config"):
        save_hf(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_head_that_was_untied_is_not_dropped_in_silence(tmp_path):
    model = fresh(SMALL.replace(tie_word_embeddings=True))
    model.lm_head.weight = nn.Parameter(torch.randn(260, 32))
    with pytest.raises(ValueError, match="tie_word_embeddings is set"):
        save_hf(model, tmp_path)


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_routed_experts"])
def test_a_config_of_a_million_parts_is_refused_at_once(field, tmp_path):
    save_hf(fresh(SMALL), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: 2_000_000}))
    with pytest.raises(ValueError, match=f"{field}=2000000 but the files hold"):
        load_hf(tmp_path)


def test_scales_that_are_no_floats_are_refused(tmp_path):
    save_hf(fresh(SMALL), tmp_path, dtype="fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name] = torch.full(tensors[name].shape, -3, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is I8"):
        load_hf(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8, "float"], ids=str)
def test_a_precision_that_cannot_compute_is_refused(dtype, tmp_path):
    save_hf(fresh(SMALL), tmp_path)
    with pytest.raises(ValueError, match="load_hf got dtype"):
        load_hf(tmp_path, dtype=dtype)


def test_a_model_is_loaded_in_the_precision_that_save_would_call_bf16(tmp_path):
    save_hf(fresh(SMALL), tmp_path)
    assert load_hf(tmp_path, dtype="bf16").lm_head.weight.dtype == torch.bfloat16


def test_caches_of_different_lengths_or_shared_by_layers_are_refused():
    model, tokens = fresh(SMALL), torch.tensor([[1, 2, 3]])
    caches = model.new_caches()
    with torch.no_grad():
        model(tokens, caches)
    caches[1].length = 2
    with pytest.raises(ValueError, match=r"caches hold \[3, 2\] tokens"):
        model(tokens, caches)
    with pytest.raises(ValueError, match="one serves two layers"):
        model(tokens, model.new_caches()[:1] * 2)


def test_an_odd_latent_can_be_rotated_on_every_path(monkeypatch):
    model, texts = fresh(SMALL.replace(kv_lora_rank=15)).eval(), []
    for kernels in ("reference", "numba"):
        monkeypatch.setenv("LAB_KERNELS", kernels)
        texts.append(generate(model, torch.tensor([[1]]), 12))
    assert torch.equal(*texts)


def test_a_module_replaced_between_two_streamed_tokens_is_noticed(monkeypatch):
    texts = []
    for kernels in ("reference", "numba"):
        monkeypatch.setenv("LAB_KERNELS", kernels)
        model = fresh(SMALL).eval()
        stream = generate(model, torch.tensor([[1, 2, 3]]), 20, stream=True)
        first = [next(stream) for _ in range(3)]
        model.load_state_dict(fresh(SMALL, seed=3).state_dict(), assign=True)
        texts.append(torch.stack(first + list(stream)))
    assert torch.equal(*texts)
