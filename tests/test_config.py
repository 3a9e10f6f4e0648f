"""A config says what a published config.json says, and nothing that cannot be built."""

import dataclasses
import json

import pytest
import references
import transformers
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.config import ModelConfig, RopeScaling
from deepseek_lab.presets import PRESETS

V3, V2, LITE, LLAMA = (PRESETS[n] for n in ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "llama-3.1-8b"))
TINY = PRESETS["tiny"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_its_own_file(name, tmp_path):
    config = PRESETS[name]
    assert ModelConfig.from_hf(config.to_hf()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == config
    assert ModelConfig.from_hf(str(tmp_path)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_published_implementations_own_config(name, tmp_path):
    config = PRESETS[name]
    config_class, _, _ = references.CLASSES[config.model_type]
    theirs = config_class(**config.to_hf())
    theirs.save_pretrained(tmp_path)
    for source in (theirs.to_dict(), tmp_path):
        again = ModelConfig.from_hf(source)
        assert again.qk_head_dim == config.qk_head_dim
        assert again.replace(head_dim=None) == config  # they write out hidden_size / num_attention_heads
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
    ):
        assert getattr(theirs, key) == getattr(config, key)
    if config.rope_scaling:
        assert theirs.rope_parameters["factor"] == config.rope_scaling.factor
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta


@given(seed=st.integers(0, 10**6))
def test_random_configs_come_back(seed):
    theirs = transformers.DeepseekV3Config(**{**references.V3, **references.random_v3(seed)})
    config = ModelConfig.from_hf(theirs.to_dict())
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert (config.hidden_size, config.q_lora_rank) == (theirs.hidden_size, theirs.q_lora_rank)


def test_both_spellings_of_rope_settings_mean_the_same():
    settings = dict(
        factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
    )
    old = {**V3.to_hf(), "rope_scaling": {"type": "yarn", **settings}}
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new) == V3


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "llama", "qwen2"])
def test_a_file_without_the_main_sizes_does_not_get_v3s(kind):
    sizes = dict(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    for name in sizes:
        given = {k: v for k, v in sizes.items() if k != name}
        with pytest.raises(ValueError, match=f"lacks {name}"):
            ModelConfig.from_hf({"model_type": kind, **given})


def test_a_llama_file_may_leave_out_the_groups():
    dense = {k: v for k, v in LLAMA.to_hf().items() if k != "num_key_value_heads"}
    assert ModelConfig.from_hf(dense).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("moe_layer_freq", 2),
        ("use_sliding_window", True),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("model_type", "gpt2"),
        ("model_type", None),
        ("rope_scaling", {"rope_type": "dynamic"}),
        ("rope_scaling", {"truncate": False}),
        ("rope_scaling", {"attention_factor": 1.2}),
        ("rope_scaling", {"original_max_position_embeddings": None}),
    ],
)
def test_what_a_file_asks_for_and_nobody_built_is_refused_by_name(key, value):
    if isinstance(value, dict):
        value, (key,) = {**V3.to_hf()["rope_scaling"], **value}, value
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_hf({**V3.to_hf(), **({"rope_scaling": value} if isinstance(value, dict) else {key: value})})


IMPOSSIBLE = [
    (V3, dict(num_experts_per_tok=257), "num_experts_per_tok=257"),
    (V3, dict(num_experts_per_tok=0), "num_experts_per_tok=0"),
    (V3, dict(n_group=7), "n_group=7 does not divide n_routed_experts=256"),
    (V3, dict(topk_group=9), "topk_group=9"),
    (V3, dict(topk_group=0), "topk_group=0"),
    (V3, dict(n_group=0), "n_group=0"),
    (V3, dict(n_group=64, topk_group=1), "topk_group=1 groups of 4 experts cannot supply num_experts_per_tok=8"),
    (V3, dict(n_group=256, topk_group=128), "n_group=256 leaves one expert per group"),
    (V3, dict(scoring_func="tanh"), "scoring_func='tanh'"),
    (V3, dict(topk_method="best"), "topk_method='best'"),
    (V3, dict(first_k_dense_replace=62), "first_k_dense_replace=62"),
    (V3, dict(first_k_dense_replace=-1), "first_k_dense_replace=-1"),
    (V3, dict(moe_intermediate_size=0), "moe_intermediate_size=0"),
    (V3, dict(n_shared_experts=-1), "n_shared_experts=-1"),
    (V3, dict(n_routed_experts=-8), "n_routed_experts=-8"),
    (V3, dict(qk_rope_head_dim=63), "qk_rope_head_dim=63 is odd"),
    (V3, dict(kv_lora_rank=0), "kv_lora_rank=0"),
    (V3, dict(q_lora_rank=-1), "q_lora_rank=-1"),
    (V3, dict(v_head_dim=0), "v_head_dim=0"),
    (V3, dict(attention_bias=True), "attention_bias=True"),
    (V3, dict(model_type="llama"), "kv_lora_rank=512 in a llama"),
    (LLAMA, dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8), "n_routed_experts=8 in a llama"),
    (LLAMA, dict(num_key_value_heads=7), "num_key_value_heads=7 does not divide num_attention_heads=32"),
    (LLAMA, dict(hidden_size=4097), "num_attention_heads=32 does not divide hidden_size=4097"),
    (LLAMA, dict(head_dim=65), "head_dim=65 is odd"),
    (LLAMA, dict(hidden_size=32 * 3), "head_dim=3 is odd"),
    (V2, dict(n_group=9), "n_group=9 does not divide n_routed_experts=160"),
    (LITE, dict(num_experts_per_tok=65), "num_experts_per_tok=65"),
    (TINY, dict(hidden_size=0), "hidden_size=0"),
    (TINY, dict(num_hidden_layers=-1), "num_hidden_layers=-1"),
    (TINY, dict(hidden_size=2**31 + 1), "hidden_size=2147483649 is not a size; choose a whole number from 1 to"),
    (TINY, dict(rope_theta=10**400), "rope_theta=1000"),
    (TINY, dict(rope_scaling=V3.to_hf()["rope_scaling"]), "is a dict; give a RopeScaling('yarn', factor=..., ...), or"),
    (V3, dict(rope_theta=1.0), "rope_theta=1.0 with rope_scaling of type 'yarn'"),
    (TINY, dict(vocab_size=2.0), "vocab_size=2.0"),
    (TINY, dict(vocab_size="260"), "vocab_size='260'"),
    (TINY, dict(num_attention_heads=True), "num_attention_heads=True"),
    (TINY, dict(num_key_value_heads=None), "num_key_value_heads=None"),
    (TINY, dict(qk_nope_head_dim="32"), "qk_nope_head_dim='32'"),
    (TINY, dict(num_experts_per_tok="4"), "num_experts_per_tok='4'"),
    (TINY, dict(num_nextn_predict_layers=-1), "num_nextn_predict_layers=-1"),
    (TINY, dict(routed_scaling_factor=float("nan")), "routed_scaling_factor=nan"),
    (TINY, dict(rope_theta=0.0), "rope_theta=0.0"),
    (TINY, dict(rms_norm_eps=-1e-6), "rms_norm_eps=-1e-06"),
    (TINY, dict(norm_topk_prob="yes"), "norm_topk_prob='yes'"),
    (TINY, dict(model_type="deepseek_v9"), "model_type='deepseek_v9'"),
]


@pytest.mark.parametrize(("config", "changes", "words"), IMPOSSIBLE, ids=[words for _, _, words in IMPOSSIBLE])
def test_what_cannot_exist_is_refused_with_field_and_value(config, changes, words):
    with pytest.raises(ValueError) as caught:
        config.replace(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rope_type="linear"), "rope_type='linear'"),
        (dict(factor=0.5), "factor=0.5"),
        (dict(factor="4"), "factor='4'"),
        (dict(original_max_position_embeddings=0), "original_max_position_embeddings=0"),
        (dict(mscale=-1.0), "mscale=-1.0"),
        (dict(beta_slow=32.0), "beta_slow=32.0"),
        (dict(rope_type="llama3", low_freq_factor=4.0), "low_freq_factor=4.0"),
    ],
)
def test_rope_settings_that_stretch_nothing_sensible_are_refused(settings, words):
    with pytest.raises(ValueError, match=rf"rope_scaling\.{words}"):
        RopeScaling(**{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **settings})


def test_a_config_cannot_be_changed_only_replaced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        V3.hidden_size = 1
    assert V3.replace(num_hidden_layers=4).num_hidden_layers == 4
    assert V3.num_hidden_layers == 61
    with pytest.raises(ValueError, match="got hidden_sizes; the fields are model_type"):
        V3.replace(hidden_sizes=1)
    assert len({V3, V3.replace(), V2}) == 2  # equal configs are one key of a dict


def test_derived_sizes_are_the_published_ones():
    assert (V3.qk_head_dim, V3.value_head_dim, V3.rotary_dim, V3.latent_width) == (192, 128, 64, 576)
    assert (V3.num_dense_layers, V3.num_moe_layers) == (3, 58)
    assert (LLAMA.qk_head_dim, LLAMA.rotary_dim, LLAMA.num_dense_layers, LLAMA.num_moe_layers) == (128, 128, 32, 0)
    assert LLAMA.replace(head_dim=96).value_head_dim == 96
    with pytest.raises(ValueError, match="latent_width needs kv_lora_rank"):
        _ = LLAMA.latent_width


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["yarn", [], [4.0], 4.0, False], ids=repr)
def test_rope_settings_that_are_no_object_are_refused_by_key_and_value(key, value):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf({**V3.to_hf(), key: value})
    assert f"{key}={value!r} is a {type(value).__name__}; expected an object" in str(caught.value)


@pytest.mark.parametrize("value", ["abc", "10000", [1], True, False, 0, -1.0, 10**400], ids=lambda v: repr(v)[:9])
def test_a_rope_base_that_is_no_number_above_zero_is_refused(value):
    flat = {**TINY.to_hf(), "rope_theta": value}
    nested = {**TINY.to_hf(), "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": value}}
    for raw in (flat, nested):
        with pytest.raises(ValueError) as caught:
            ModelConfig.from_hf(raw)
        assert f"rope_theta={value!r} is not a number above 0" in str(caught.value)


def test_a_file_without_a_rope_base_has_the_usual_one():
    raw = {**TINY.to_hf(), "rope_theta": None}
    assert ModelConfig.from_hf(raw).rope_theta == 10000.0


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_refused_by_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_hf(tmp_path)


def test_one_expert_per_group_is_allowed_where_every_group_is_kept():
    one = V3.replace(n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1)
    assert one.n_routed_experts == 1
    assert V3.replace(n_group=256, topk_group=256).n_group == 256
