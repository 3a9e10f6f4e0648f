"""A directory that does not hold the model it claims is refused, with the file and the tensor at fault."""

import json
import struct

import pytest
import references
import torch
from safetensors.torch import load_file, save_file

from deepseek_lab.model import Transformer, load_hf, save_hf
from deepseek_lab.presets import PRESETS

CONFIG = PRESETS["tiny"].replace(vocab_size=50, hidden_size=136, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=2, intermediate_size=40, moe_intermediate_size=16)  # fmt: skip
GATE = "model.layers.1.mlp.gate.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SCALE = O_PROJ + "_scale_inv"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    return references.fill(Transformer(CONFIG)).eval()


@pytest.fixture(params=["single", "sharded"])
def directory(request, model, tmp_path):
    save_hf(model, tmp_path, max_shard_bytes=10**9 if request.param == "single" else 60_000)
    return tmp_path


@pytest.fixture
def fp8(model, tmp_path):
    save_hf(model, tmp_path, "fp8")
    return tmp_path


def holder(directory, tensor):
    """The file that holds a tensor."""
    return next(file for file in directory.glob("*.safetensors") if tensor in load_file(file))


def edit(directory, tensor, change):
    """Rewrite the file of a tensor after change(its tensors)."""
    file = holder(directory, tensor)
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    return file.name


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(directory, *words):
    """load_hf raises ValueError and its message has all these words."""
    with pytest.raises(ValueError) as caught:
        load_hf(directory)
    for word in words:
        assert word in str(caught.value)


def test_the_undamaged_directories_load(directory, fp8):
    load_hf(directory), load_hf(fp8)


def test_a_missing_directory_or_config(directory):
    refused(directory / "nowhere", "nowhere is not a directory")
    refused(directory / "config.json", "is not a directory")
    (directory / "config.json").unlink()
    refused(directory, "config.json does not exist")


@pytest.mark.parametrize("text", ['{"model_type": "deepseek_v3"', "", "\x00\x01", "[1, 2]", '"text"', "null", "7"])
def test_a_config_that_is_no_object(directory, text):
    (directory / "config.json").write_text(text)
    refused(directory, "config.json")


def test_a_config_that_is_not_utf8(directory):
    (directory / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refused(directory, "config.json is not valid JSON")


@pytest.mark.parametrize(
    "changes",
    [
        dict(model_type="mamba"),
        dict(model_type=None),
        dict(hidden_act="gelu"),
        dict(moe_layer_freq=2),
        dict(mlp_bias=True),
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        dict(num_experts_per_tok=99),
        dict(hidden_size="136"),
        dict(hidden_size=None),
        dict(kv_lora_rank=-1),
        dict(rope_scaling={"rope_type": "yarn", "factor": "4"}),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_its_key(directory, changes):
    edit_config(directory, **changes)
    key = next(iter(changes))
    refused(directory, "original_max_position_embeddings" if "'4'" in str(changes) else key)


@pytest.mark.parametrize(
    "quantization",
    [
        dict(quant_method="gptq", bits=4),
        dict(quant_method="fp8", weight_block_size=[64, 64]),
        dict(quant_method="fp8", fmt="e5m2", weight_block_size=[128, 128]),
        dict(quant_method="fp8"),
        "fp8",
        ["fp8"],
    ],
)
def test_an_unknown_quantisation(directory, quantization):
    edit_config(directory, quantization_config=quantization)
    refused(directory, "config.json", "quantization_config")


@pytest.mark.parametrize("name", [GATE, O_PROJ, "lm_head.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_a_missing_tensor(directory, name):
    edit(directory, name, lambda tensors: tensors.pop(name))
    refused(directory, str(directory), name, "is missing")


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.experts.16.up_proj.weight", "x"]
)
def test_an_extra_tensor(directory, name):
    file = edit(directory, GATE, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    refused(directory, file, name, "is not part of this config")


def test_a_misshapen_tensor(directory):
    file = edit(directory, O_PROJ, lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ].T}))
    refused(directory, file, O_PROJ, "[64, 136]", "[136, 64]")


def test_a_tensor_of_whole_numbers(directory):
    file = edit(directory, GATE, lambda tensors: tensors.update({GATE: tensors[GATE].int()}))
    refused(directory, file, GATE, "I32")


def test_weights_of_another_config(directory):
    edit_config(directory, n_routed_experts=32)
    refused(directory, "model.layers.1.mlp.")


def test_a_tensor_in_two_shards(model, tmp_path):
    save_hf(model, tmp_path, max_shard_bytes=60_000)
    other = next(file for file in sorted(tmp_path.glob("*.safetensors")) if file != holder(tmp_path, GATE))
    save_file({**load_file(other), GATE: load_file(holder(tmp_path, GATE))[GATE]}, other)
    refused(tmp_path, GATE, other.name, "one place")


def test_fp8_codes_without_scales(fp8):
    edit(fp8, SCALE, lambda tensors: tensors.pop(SCALE))
    refused(fp8, "model.safetensors", O_PROJ, "_scale_inv is missing")


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 2), (2,), (136, 64)])
def test_fp8_scales_of_the_wrong_shape(fp8, shape):
    edit(fp8, SCALE, lambda tensors: tensors.update({SCALE: torch.ones(shape)}))
    refused(fp8, "model.safetensors", SCALE, str(list(shape)), "[2, 1]")


def test_fp8_where_no_blocks_can_be(fp8):
    name = "model.norm.weight"
    codes = {name: torch.ones(136).to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(2)}
    edit(fp8, name, lambda tensors: tensors.update(codes))
    refused(fp8, "model.safetensors", name)


def test_scales_without_codes(directory):
    file = edit(directory, O_PROJ, lambda tensors: tensors.update({SCALE: torch.ones(2, 1)}))
    refused(directory, file, SCALE)


@pytest.mark.parametrize("kept", [0, 4, 8, 50, 0.5, -1])
def test_a_truncated_file(directory, kept):
    file = holder(directory, GATE)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    refused(directory, file.name, "is not a whole safetensors file")


@pytest.mark.parametrize("content", [b"\x80\x04pickle", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_file_that_is_no_safetensors(directory, content):
    file = holder(directory, GATE)
    file.write_bytes(content)
    refused(directory, file.name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_a_pickle_is_never_opened(directory, name):
    for file in [*directory.glob("*.safetensors"), directory / INDEX]:
        file.unlink(missing_ok=True)
    (directory / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(directory, name, "a pickle can run code")


@pytest.mark.parametrize(
    "shard", ["../elsewhere.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "a.bin", 7]
)
def test_an_index_that_points_elsewhere(directory, shard):
    (directory / INDEX).write_text(json.dumps({"weight_map": {GATE: shard}}))
    refused(directory, INDEX, str(shard))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": [1]}}', '{"weight_map": {}}']
)
def test_a_broken_index(directory, text):
    (directory / INDEX).write_text(text)
    refused(directory, INDEX if text != '{"weight_map": {}}' else "is missing")


def test_a_missing_shard(directory):
    file = holder(directory, GATE)
    file.unlink()
    refused(directory, file.name, "does not exist")
