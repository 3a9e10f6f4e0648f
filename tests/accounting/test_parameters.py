"""Parameter counts, exactly, against the published models and the reference implementation."""

import re

import pytest

from deepseek_lab.accounting import checkpoint_elements, kv_cache, parameters, weights
from deepseek_lab.accounting.parameters import COUNTS
from deepseek_lab.config import ModelConfig
from deepseek_lab.presets import PRESETS

V3 = PRESETS["deepseek-v3"]

# The shape on which the count was compared with transformers' own num_parameters(), which leaves out the bias buffers.
SMALL = ModelConfig(
    vocab_size=64, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
    n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=2.5, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "total"),
    [
        ("deepseek-v3", 671_026_419_200),
        ("deepseek-v2", 235_741_434_880),
        ("deepseek-v2-lite", 15_706_484_224),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("qwen2.5-72b", 72_706_203_648),
    ],
)
def test_totals_are_those_of_the_published_models(model, total):
    assert parameters(PRESETS[model]).total == total


@pytest.mark.parametrize(
    ("model", "count", "total"),
    [
        ("deepseek-v3", "trainable", 671_026_404_352),
        ("deepseek-v3", "active", 37_552_297_472),
        ("deepseek-v3", "active_without_embedding", 36_625_618_432),
        ("deepseek-v3", "active_without_embedding_and_head", 35_698_939_392),
        ("deepseek-v2", "active", 21_375_800_320),
        ("deepseek-v2", "active_without_embedding", 20_851_512_320),
        ("deepseek-v2-lite", "active", 2_661_150_208),
        ("deepseek-v2-lite", "active_without_embedding", 2_451_435_008),
        ("qwen2.5-72b", "active_without_embedding_and_head", 70_214_787_072),
    ],
)
def test_what_counts_as_active_is_said_and_counted_each_way(model, count, total):
    assert parameters(PRESETS[model], count).total == total


def test_the_small_shape_has_as_many_parameters_as_in_transformers():
    assert parameters(SMALL, "trainable").total == 105_288
    assert parameters(SMALL).total == 105_288 + 2 * 8


def test_the_dense_first_layers_of_v3_are_not_counted_as_expert_layers():
    ledger = parameters(V3)
    assert ledger["dense feed-forward"].total == 3 * 396_361_728
    assert ledger["experts"].total == 58 * (256 * 44_040_192 + 44_040_192 + 1_835_264)
    assert ledger["experts/routed experts"].total == 653_908_770_816


def test_the_parts_of_latent_attention_are_those_of_the_checkpoint():
    per_layer = {line.part: line.amount // 61 for line in parameters(V3)["attention"]}
    assert per_layer == {
        "q_a_proj": 11_010_048,
        "q_a_layernorm": 1_536,
        "q_b_proj": 37_748_736,
        "kv_a_proj_with_mqa": 4_128_768,
        "kv_a_layernorm": 512,
        "kv_b_proj": 16_777_216,
        "o_proj": 117_440_512,
    }


def test_without_a_query_rank_there_is_one_query_matrix():
    names = [line.part for line in parameters(PRESETS["deepseek-v2-lite"])["attention"]]
    assert names == ["q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]


def test_the_multi_token_prediction_module_counts_only_on_request():
    with_module = parameters(V3, with_mtp=True)
    assert with_module.total == 682_636_487_424
    assert with_module["multi-token prediction"].total == 11_610_068_224
    assert with_module["multi-token prediction/eh_proj"].total == 102_760_448
    assert "multi-token prediction" not in parameters(V3)


def test_active_parameters_of_the_multi_token_module_are_those_of_one_token():
    module = parameters(V3, "active", with_mtp=True)["multi-token prediction"].total
    assert module + 2 * 926_679_040 == 2_541_458_688


def test_only_the_balanced_gate_has_a_correction_bias():
    assert parameters(V3)["experts/correction bias"].total == 58 * 256
    assert "experts/correction bias" not in parameters(PRESETS["deepseek-v2"])


def test_qwen_has_biases_on_queries_keys_and_values_only():
    biases = [line.part for line in parameters(PRESETS["qwen2.5-72b"])["attention"] if line.part.endswith("bias")]
    assert biases == ["q_proj bias", "k_proj bias", "v_proj bias"]


def test_a_tied_embedding_is_counted_once_and_is_still_multiplied_as_the_head():
    llama = PRESETS["llama-3.1-8b"]
    tied, table = llama.replace(tie_word_embeddings=True), 128_256 * 4_096
    assert parameters(tied).total == parameters(llama).total - table
    for count in ("active_without_embedding", "active_without_embedding_and_head"):
        assert parameters(tied, count).total == parameters(llama, count).total


def test_a_head_size_of_its_own_is_counted():
    wide = PRESETS["llama-3.1-8b"].replace(head_dim=256)
    assert parameters(wide)["attention/k_proj"].total == 32 * 8 * 256 * 4_096


def test_a_model_of_expert_layers_alone_has_no_dense_part():
    ledger = parameters(SMALL.replace(first_k_dense_replace=0, n_shared_experts=0))
    assert "dense feed-forward" not in ledger and "experts/shared experts" not in ledger


def test_unknown_counts_and_missing_modules_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="count='activated' is unknown; choose one of total, trainable, active"):
        parameters(V3, "activated")
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0: this model has no multi-token prediction"):
        parameters(PRESETS["deepseek-v2"], with_mtp=True)


def evaluated(formula: str) -> int:
    """Work a formula out as it is printed: words dropped, ⌈a / b⌉ rounded up."""
    text = re.sub(r"(?<=\d),(?=\d)", "", formula)
    text = re.sub(r"⌈(\d+) / (\d+)⌉", r"(-(-\1 // \2))", text)
    return eval(re.sub(r"[a-z]+", "", text.replace("×", "*")), {"__builtins__": {}})


def every_ledger():
    for name, config in PRESETS.items():
        for count in COUNTS:
            yield f"{name} {count}", parameters(config, count), config
        for dtype in ("bf16", "fp8"):
            yield f"{name} weights {dtype}", weights(config, dtype), config
        for layout in ("expanded", "latent", "latent_fp8") if config.uses_latent_attention else ("expanded", "grouped"):
            yield f"{name} cache {layout}", kv_cache(config, 4_096, 3, layout), config
    yield "with modules", parameters(V3, with_mtp=True), V3
    yield "the checkpoint", checkpoint_elements(V3, with_mtp=True), V3
    yield "the small shape", weights(SMALL, "fp8"), SMALL


@pytest.mark.parametrize(("name", "ledger", "config"), [pytest.param(*row, id=row[0]) for row in every_ledger()])
def test_every_formula_gives_its_amount_and_every_line_has_keys_and_source(name, ledger, config):
    for row in ledger.rows():
        assert evaluated(row["formula"]) == row["amount"], (name, row)
        assert row["source"], (name, row)
        assert row["keys"] and all(hasattr(config, key) for key in row["keys"]), (name, row)


@pytest.mark.parametrize("count", [parameters, weights, checkpoint_elements, lambda config: kv_cache(config, 1)])
@pytest.mark.parametrize("wrong", ["deepseek-v2", "gpt", None])
def test_what_is_no_config_is_refused_with_where_to_find_one(count, wrong):
    name = wrong if wrong in PRESETS else "deepseek-v3"
    with pytest.raises(TypeError, match=rf"got {type(wrong).__name__} instead of .* pass lab\.PRESETS\['{name}'\]"):
        count(wrong)


def test_a_query_rank_of_zero_is_none_as_in_the_model():
    import torch

    from deepseek_lab.model import Transformer

    none, zero = SMALL.replace(q_lora_rank=None), SMALL.replace(q_lora_rank=0)
    assert parameters(zero).rows() == parameters(none).rows()
    with torch.device("meta"):
        model = Transformer(zero)
    assert parameters(zero, "trainable").total == sum(weight.numel() for weight in model.parameters())
