"""A published model has as many parameters as its report says; counting them takes no memory."""

import pytest
import references
import torch

from deepseek_lab.config import ModelConfig
from deepseek_lab.model import Transformer
from deepseek_lab.presets import PRESETS

# DeepSeek-V3 README and report 4.2 (with the 58 x 256 correction biases), V2 report 3.1.2 and B.1, model cards.
PUBLISHED = {
    "deepseek-v3": 671_026_419_200,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-72b": 72_706_203_648,
}


def on_meta(config: ModelConfig) -> Transformer:
    """The model without memory for its weights, and without prediction modules: reports count these apart."""
    with torch.device("meta"):
        return Transformer(config.replace(num_nextn_predict_layers=0))


def count(model) -> int:
    """Values of a model's weights and stored buffers, each tensor once."""
    frequencies = sum(b.numel() for name, b in model.named_buffers() if "inv_freq" in name)  # computed, never stored
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()]) - frequencies


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    model = on_meta(PRESETS[name])
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert count(model) == PUBLISHED[name]


def test_v3_without_its_correction_biases_has_14848_parameters_less():
    model = on_meta(PRESETS["deepseek-v3"])
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352
    assert sum(b.numel() for b in model.buffers()) == 58 * 256


def test_one_v3_layer_has_the_parts_that_the_report_implies():
    layers = on_meta(PRESETS["deepseek-v3"].replace(num_hidden_layers=4)).layers
    parts = dict(q_a_proj=11_010_048, q_a_layernorm=1536, q_b_proj=37_748_736, kv_a_proj_with_mqa=4_128_768,
                 kv_a_layernorm=512, kv_b_proj=16_777_216, o_proj=117_440_512)  # fmt: skip
    assert {name: count(module) for name, module in layers[0].self_attn.named_children()} == parts
    assert sum(parts.values()) == 187_107_328
    assert [count(layer) for layer in layers] == 3 * [583_483_392] + [11_507_286_272]
    assert count(layers[3].mlp.gate) == 1_835_264
    assert count(layers[3].mlp.experts) == 256 * 44_040_192
    assert count(layers[3].mlp.shared_experts) == 44_040_192


@pytest.mark.parametrize("seed", range(8))
def test_ours_and_the_published_implementation_have_the_same_tensors(seed, tmp_path):
    reference = references.build("deepseek_v3", seed, **references.random_v3(seed))
    expected = {name.removeprefix("model."): t.shape for name, t in reference.state_dict().items()}
    state = references.ours(reference, tmp_path).state_dict()
    assert {name: t.shape for name, t in state.items()} == expected
    assert all(torch.equal(state[n.removeprefix("model.")], t) for n, t in reference.state_dict().items())


@pytest.mark.parametrize("name", PRESETS)
def test_predicted_parameters_equal_those_of_the_built_model(name):
    accounting = pytest.importorskip("deepseek_lab.accounting")
    assert accounting.parameters(PRESETS[name]).total == count(on_meta(PRESETS[name]))


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "llama", "qwen2"])
def test_predicted_parameters_equal_those_of_the_published_implementation(kind, tmp_path):
    accounting = pytest.importorskip("deepseek_lab.accounting")
    for seed in range(6 if kind == "deepseek_v3" else 1):
        changes = references.random_v3(seed) if kind == "deepseek_v3" else {}
        reference = references.build(kind, **changes)
        reference.config.save_pretrained(tmp_path)
        assert accounting.parameters(ModelConfig.from_hf(tmp_path)).total == count(reference)
