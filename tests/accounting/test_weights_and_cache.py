"""Bytes of weights and caches, to the byte, and the layouts that a model cannot have."""

import pytest

from deepseek_lab import facts
from deepseek_lab.accounting import MemoryState, checkpoint_elements, kv_cache, weights
from deepseek_lab.accounting.memory_state import CACHE_NAMES, GPU_SETS, MODEL_NAMES, WEIGHT_NAMES, change, summary
from deepseek_lab.presets import PRESETS
from deepseek_lab.units import GIB

V3 = PRESETS["deepseek-v3"]


def test_the_main_model_of_v3_takes_673_gb_in_fp8_scales_and_leftovers_included():
    ledger = checkpoint_elements(V3)
    assert ledger["F8_E4M3"].total == 669_065_609_216
    assert ledger["F32/scales"].total == 40_838_232
    assert ledger["F32/experts/correction bias"].total == 14_848
    assert ledger["BF16"].total == 1_960_795_136
    assert weights(V3, "fp8").total == 673_150_611_808


def test_the_elements_of_the_published_checkpoint_are_met_dtype_by_dtype():
    ledger = checkpoint_elements(V3, with_mtp=True)
    assert ledger["F8_E4M3"].total == facts.V3_CHECKPOINT_FP8.value == 680_571_043_840
    assert ledger["BF16"].total == facts.V3_CHECKPOINT_BF16.value == 3_918_786_560
    assert ledger["F32"].total == facts.V3_CHECKPOINT_FP32.value == 41_555_600
    assert ledger.total == facts.V3_CHECKPOINT_ELEMENTS.value == 684_531_386_000
    assert weights(V3, "fp8", with_mtp=True).total == facts.V3_CHECKPOINT_BYTES.value == 688_574_839_360


def test_the_correction_bias_stays_fp32_when_the_rest_is_bf16():
    assert weights(V3, "bf16").total == 1_342_052_868_096
    assert weights(V3, "fp32").total == 4 * 671_026_419_200
    assert weights(V3, "bf16")["experts/correction bias"].total == 4 * 14_848


def test_ragged_blocks_count_whole():
    scales = weights(V3, "fp8")["attention/kv_a_proj_with_mqa/scales"]
    assert scales.total == 61 * 5 * 56 * 4  # 576 rows are four and a half blocks of 128
    dense = weights(PRESETS["deepseek-v2-lite"], "fp8")["dense feed-forward/scales"]
    assert dense.total == 3 * 86 * 16 * 4


def test_an_unknown_dtype_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="dtype='int8' is unknown; choose one of fp32, bf16, fp16, fp8"):
        weights(V3, "int8")


@pytest.mark.parametrize(
    ("model", "layout", "bytes_per_token"),
    [
        ("deepseek-v3", "latent", 70_272),
        ("deepseek-v3", "expanded", 4_997_120),
        ("deepseek-v3", "latent_fp8", 40_016),
        ("deepseek-v2", "latent", 69_120),
        ("deepseek-v2-lite", "latent", 31_104),
        ("qwen2.5-72b", "grouped", 327_680),
        ("llama-3.1-405b", "grouped", 516_096),
        ("llama-3.1-8b", "grouped", 131_072),
        ("llama-3.1-70b", "grouped", 327_680),
        ("llama-3.1-8b", "expanded", 524_288),
    ],
)
def test_one_token_leaves_as_many_bytes_as_published(model, layout, bytes_per_token):
    assert kv_cache(PRESETS[model], 1, layout=layout).total == bytes_per_token


def test_the_cache_grows_with_tokens_and_sequences_and_with_nothing_else():
    assert kv_cache(V3, 1_000, batch=7, layout="latent").total == 7_000 * 70_272
    assert kv_cache(V3, 0).total == 0
    assert kv_cache(V3, 1, dtype="fp32").total == 2 * 70_272


def test_a_paged_cache_takes_whole_blocks_for_every_sequence():
    assert kv_cache(V3, 130, batch=7, block_size=64).total == 7 * 192 * 70_272
    assert kv_cache(V3, 128, batch=7, block_size=64).total == 7 * 128 * 70_272
    assert "7 sequences × 3 blocks × 64 tokens × 61 layers" in kv_cache(V3, 130, 7, block_size=64)["latent"].formula
    with pytest.raises(ValueError, match="block_size=0; choose a whole number >= 1"):
        kv_cache(V3, 130, block_size=0)


def test_a_cached_token_in_fp8_is_656_bytes_a_layer_and_not_576():
    one_layer = V3.replace(num_hidden_layers=1, first_k_dense_replace=0)
    ledger = kv_cache(one_layer, 1, layout="latent_fp8")
    assert [line.total for line in ledger] == [512, 16, 128]
    assert ledger.total == facts.FP8_LATENT_PER_TOKEN_AND_LAYER.value == 656


def test_a_ragged_latent_has_a_scale_for_its_last_tile():
    small = PRESETS["tiny"].replace(kv_lora_rank=130)
    assert kv_cache(small, 1, layout="latent_fp8")["latent scales"].total == 4 * 2 * 4


def test_a_context_of_128k_takes_8_point_578125_gib_and_with_the_mtp_layer_8_point_71875():
    assert kv_cache(V3, 131_072).total / GIB == 8.578125
    assert kv_cache(V3, 131_072, with_mtp=True).total / GIB == 8.71875


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ("deepseek-v3", "grouped", "kv_lora_rank=512.*choose 'latent', 'latent_fp8' or 'expanded'"),
        ("llama-3.1-8b", "latent", "num_key_value_heads=8.*choose 'grouped' or 'expanded'"),
        ("llama-3.1-8b", "latent_fp8", "choose 'grouped' or 'expanded'"),
        ("llama-3.1-8b", "paged", "layout='paged' is unknown; .* for a paged one pass block_size=64"),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused_with_those_it_can(model, layout, message):
    with pytest.raises(ValueError, match=message):
        kv_cache(PRESETS[model], 1, layout=layout)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": -1}, "tokens=-1; choose a whole number >= 0"),
        ({"tokens": 1.5}, "tokens=1.5"),
        ({"tokens": 1, "batch": 0}, "batch=0; choose a whole number >= 1"),
        ({"tokens": 1, "dtype": "fp8"}, "FP8 exists as layout='latent_fp8'"),
        ({"tokens": 1, "dtype": "fp32", "layout": "latent_fp8"}, "latent_fp8 fixes its own types"),
    ],
)
def test_impossible_sizes_and_types_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        kv_cache(V3, **wrong)


def test_every_preset_has_a_name_and_every_gpu_a_memory():
    assert set(MODEL_NAMES) == set(PRESETS)
    assert {gpu for _, gpu in GPU_SETS.values()} <= set(facts.GPU_MEMORY)


def test_the_parts_of_a_state_add_up_to_the_ledgers():
    for model in MODEL_NAMES:
        for dtype in WEIGHT_NAMES:
            state = MemoryState(model, dtype, "expanded", 8_192, 4)
            cache = kv_cache(state.config, state.tokens, 4, "expanded").total
            assert sum(state.parts.values()) == state.total
            assert state.total == weights(state.config, dtype).total + cache


def test_needed_gpus_are_whole_and_the_next_smaller_number_is_too_few():
    state = MemoryState(gpu="8 x H800")
    assert state.gpus_needed == 9 and not state.fits
    assert state.capacity == 640 * 10**9
    assert 8 * 80 * 10**9 < state.total <= 9 * 80 * 10**9
    assert MemoryState(gpu="16 x H800").fits


def test_an_impossible_setting_falls_back_and_says_so():
    llama = MemoryState("llama-3.1-8b", cache="latent")
    assert llama.layout == "grouped" and llama.total == MemoryState("llama-3.1-8b", cache="grouped").total
    assert llama.notes == ("Llama 3.1 8B has no latent: shown with grouped heads.",)
    assert MemoryState(cache="grouped").notes == ("DeepSeek-V3 has no grouped heads: shown with latent.",)
    qwen = MemoryState("qwen2.5-72b", cache="grouped", context=131_072)
    assert qwen.tokens == 32_768
    assert qwen.notes == ("Qwen2.5 72B reads at most 32,768 tokens: shown with those.",)
    assert all(MemoryState(cache=layout).notes == () for layout in CACHE_NAMES if layout != "grouped")


@pytest.mark.parametrize(
    "wrong",
    [{"model": "gpt-2"}, {"weights": "int4"}, {"cache": "paged"}, {"gpu": "TPU"}, {"context": 0}, {"batch": 1.0}],
)
def test_a_state_that_cannot_be_named_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        MemoryState(**wrong)


def test_the_summary_has_every_number_with_its_unit_in_one_line():
    assert summary(MemoryState(), MemoryState(cache="expanded")) == (
        "DeepSeek-V3, weights in FP8 with scales, cache latent, 1 sequence of 131,072 tokens: "
        "626.9 GiB weights + 8.6 GiB cache = 635.5 GiB. 8 x H800: 640 GB = 596.0 GiB. "
        "Too large by 39.5 GiB; needs 9 H800 by memory alone. "
        "Against the setting before: saves 601.4 GiB, 1.9x less."
    )


def test_a_change_is_said_as_a_ratio_or_where_it_is_small_as_a_percentage():
    now = MemoryState()
    assert change(now, MemoryState(weights="bf16")) == "saves 623.0 GiB, 2.0x less"
    assert change(MemoryState(weights="bf16"), now) == "623.0 GiB more, 2.0x as much"
    assert change(MemoryState(cache="latent_fp8"), now) == "saves 3.7 GiB, 0.6 % less"
    assert change(now, MemoryState(cache="latent_fp8")) == "3.7 GiB more, 0.6 % up"
    assert change(now, MemoryState(gpu="16 x H800")) == "no difference"
