"""What attention costs for one more token, against the published arithmetic and sums written another way."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab import facts
from deepseek_lab.accounting import decode_step, equal_ridge
from deepseek_lab.accounting.decode import LATENT_WAYS
from deepseek_lab.presets import PRESETS

V3 = PRESETS["deepseek-v3"]
H800 = (facts.H800_BF16_PEAK.value, facts.H800_BANDWIDTH.value)


@pytest.mark.parametrize("context", [1, 100, 131_072])
def test_v3_computes_what_its_shapes_say(context):
    expand = 2 * 512 * 128 * (128 + 128)
    assert expand == 33_554_432
    flops = {way: decode_step(V3, context, way).flops for way in LATENT_WAYS}
    assert flops["absorbed"].total == expand + 278_528 * context
    assert flops["expanded"].total == expand + 81_920 * context
    assert flops["re-expanded"].total == (expand + 81_920) * context
    assert flops["expanded"]["scores"].total + flops["expanded"]["mix"].total == 81_920 * context


def test_v3_keeps_and_reads_what_its_shapes_say():
    steps = {way: decode_step(V3, 1_000, way) for way in LATENT_WAYS}
    assert {way: step.kept for way, step in steps.items()} == {"expanded": 40_960, "re-expanded": 576, "absorbed": 576}
    assert {way: step.reads["cache"].total for way, step in steps.items()} == {
        "expanded": 81_920_000, "re-expanded": 1_152_000, "absorbed": 1_152_000,
    }  # fmt: skip
    assert {step.reads["weights"].total for step in steps.values()} == {2 * 16_777_216}


def test_the_intensities_of_the_roofline():
    assert decode_step(V3, 5).cache_intensity == pytest.approx(278_528 / 1_152) == pytest.approx(241.8, abs=0.03)
    assert decode_step(V3, 5, "expanded").cache_intensity == 1
    for name, heads in (("llama-3.1-70b", 8), ("llama-3.1-8b", 4)):
        assert decode_step(PRESETS[name], 77).cache_intensity == heads
    llama = PRESETS["llama-3.1-8b"]
    assert decode_step(llama.replace(num_key_value_heads=32), 9).cache_intensity == 1
    assert decode_step(llama.replace(num_key_value_heads=1), 9).cache_intensity == 32
    assert decode_step(llama, 9, dtype="fp32").cache_intensity == 2


@given(
    heads=st.integers(1, 40), latent=st.integers(1, 700), context=st.integers(1, 5_000), batch=st.integers(1, 9),
    nope=st.integers(1, 90), rope=st.integers(1, 40).map(lambda n: 2 * n), value=st.integers(1, 90),
)  # fmt: skip
def test_any_shape_adds_up_and_a_batch_shares_the_weights(heads, latent, context, batch, nope, rope, value):
    config = V3.replace(
        num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=latent,
        qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value,
    )  # fmt: skip
    matrix = heads * (nope + value) * latent
    flops = {
        "expanded": matrix + context * heads * (nope + rope + value),
        "re-expanded": context * (matrix + heads * (nope + rope + value)),
        "absorbed": matrix + context * heads * (2 * latent + rope),
    }
    kept = {"expanded": heads * (nope + rope + value), "re-expanded": latent + rope, "absorbed": latent + rope}
    for way in LATENT_WAYS:
        step = decode_step(config, context, way, batch)
        assert step.flops.total == 2 * batch * flops[way]
        assert step.reads.total == 2 * (batch * context * kept[way] + matrix)
        assert step.seconds(7.0, 3.0) == max(step.flops.total / 7, step.reads.total / 3)


@given(st.integers(1, 300), st.integers(1, 2_000), st.integers(1, 9_000), st.sampled_from(["expanded", "re-expanded"]))
def test_at_the_equal_ridge_both_ways_take_the_same_time(heads, latent, context, way):
    config = V3.replace(num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=latent)
    one, other = decode_step(config, context, way), decode_step(config, context)
    ridge = equal_ridge(one, other)
    if ridge is None:
        order = [one.seconds(r, 1.0) - other.seconds(r, 1.0) for r in (0.01, 1.0, 50.0, 1e4, 1e7)]
        assert min(order) >= 0 or max(order) <= 0
    else:
        assert math.isclose(one.seconds(ridge, 1.0), other.seconds(ridge, 1.0))
        below, above = (one.seconds(r, 1.0) - other.seconds(r, 1.0) for r in (ridge / 1.01, ridge * 1.01))
        assert below * above < 0


def test_expanded_and_absorbed_v3_meet_far_below_the_ridge_of_an_h800():
    ridge = equal_ridge(decode_step(V3, 10**7, "expanded"), decode_step(V3, 10**7))
    assert ridge == pytest.approx(3.4, abs=0.001) and ridge < H800[0] / H800[1]
    assert equal_ridge(decode_step(V3, 4096, "re-expanded"), decode_step(V3, 4096)) is None


@pytest.mark.parametrize("name", ["deepseek-v3", "llama-3.1-8b"])
def test_every_line_names_keys_that_the_config_has_set(name):
    config = PRESETS[name]
    step = decode_step(config, 10)
    keys = {key for line in (*step.flops.lines, *step.reads.lines) for key in line.keys}
    assert keys and all(getattr(config, key) for key in keys), keys
    wide = decode_step(PRESETS["llama-3.1-8b"].replace(head_dim=128), 10)
    assert wide.reads.lines[0].keys == ("num_key_value_heads", "head_dim")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(way="grouped"), "way='grouped' does not go with kv_lora_rank=512; choose expanded or re-expanded"),
        (dict(context=0), "context=0; choose a whole number"),
        (dict(batch=True), "batch=True"),
        (dict(dtype="fp8"), "dtype='fp8' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        decode_step(**{"config": V3, "context": 10, **settings})
    with pytest.raises(ValueError, match="choose grouped"):
        decode_step(PRESETS["llama-3.1-8b"], 10, "absorbed")
