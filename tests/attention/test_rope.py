"""Rotary positions turn the same pairs by the same angles as the released models."""

import math

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.attention.rope import (
    RotaryTable,
    inverse_frequencies,
    mscale,
    rotate_halves,
    rotate_pairs,
    rotation_scale,
    softmax_scale,
)  # fmt: skip
from deepseek_lab.config import ModelConfig, RopeScaling
from deepseek_lab.presets import PRESETS

V3 = PRESETS["deepseek-v3"]
# precompute_freqs_cis of the DeepSeek-V3 inference code: width 64, base 10000, factor 40, original length 4096.
YARN_FREQUENCIES = [
    1.0, 0.7498942093324558, 0.5623413251903491, 0.4216965034285822, 0.31622776601683794, 0.23713737056616552,
    0.1778279410038923, 0.1333521432163324, 0.1, 0.07498942093324558, 0.056234132519034905, 0.03900692656714386,
    0.026879360111431223, 0.01837814621887783, 0.01244795587027246, 0.008334508951020777, 0.0055,
    0.003561997494329165, 0.002249365300761396, 0.0013705136361428921, 0.0007905694150420946, 0.0004149903984907897,
    0.0001778279410038922, 3.33380358040831e-05, 2.5e-05, 1.8747355233311396e-05, 1.4058533129758727e-05,
    1.0542412585714556e-05, 7.905694150420949e-06, 5.928434264154138e-06, 4.445698525097306e-06, 3.3338035804083097e-06,
]  # fmt: skip


def test_pairs_and_halves_are_the_official_layouts():
    x, turns = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.polar(torch.ones(1, 2), torch.tensor([[0.1, 0.2]]))
    official = torch.tensor([[0.7953373319843695, 2.08984174720288, 2.14552241034348, 4.5162743037501505]])
    half_split = torch.tensor([[0.6955039153375413, 1.1654558325022384, 3.0848459124809056, 4.317604972955089]])
    torch.testing.assert_close(rotate_pairs(x, turns), official, rtol=1e-6, atol=0)
    torch.testing.assert_close(rotate_halves(x, turns), half_split, rtol=1e-6, atol=0)


def test_v3_has_the_32_yarn_frequencies_of_the_inference_code():
    torch.testing.assert_close(inverse_frequencies(V3), torch.tensor(YARN_FREQUENCIES), rtol=2e-6, atol=0)


def test_yarn_leaves_the_first_eleven_frequencies_alone_and_divides_the_last_nine_by_forty():
    plain, stretched = inverse_frequencies(V3.replace(rope_scaling=None)), inverse_frequencies(V3)
    ratio = plain / stretched
    low, high = 10, 23  # floor(10.4722) and ceil(22.5134)
    torch.testing.assert_close(ratio[: low + 1], torch.ones(11), rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio[high:], torch.full((9,), 40.0), rtol=1e-6, atol=0)
    assert ((ratio[low + 1 : high] > 1) & (ratio[low + 1 : high] < 40)).all()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (V3.replace(rope_scaling=None), 0.07216878364870322),  # 192 ** -0.5
        (V3, 0.1352337788608801),  # mscale 1.0
        (PRESETS["deepseek-v2"], 0.1352337788608801),
        (PRESETS["deepseek-v2-lite"], 0.1147213867929261),  # mscale 0.707
        (PRESETS["llama-3.1-8b"], 128**-0.5),  # Llama's stretching sharpens nothing
    ],
)
def test_the_softmax_scale_is_the_published_models(config, scale):
    assert softmax_scale(config) == pytest.approx(scale, rel=1e-9)
    assert rotation_scale(config) == 1.0


def test_mscale_is_one_where_nothing_is_stretched():
    assert mscale(1.0, 1.0) == 1.0
    assert mscale(40.0, 1.0) == pytest.approx(1.3688879454113936)
    assert mscale(40.0, 0.707) == pytest.approx(1.2608037774058554)


@pytest.mark.parametrize(
    ("mscales", "rotation"),
    [((1.0, 1.0), 1.0), ((1.0, 0.5), 1.3688879 / 1.1844440), ((None, None), 1.3688879), ((1.0, None), 1.3688879)],
)
def test_missing_or_unequal_mscales_stretch_the_rotation_itself(mscales, rotation):
    config = V3.replace(rope_scaling=RopeScaling("yarn", 40.0, 4096, mscale=mscales[0], mscale_all_dim=mscales[1]))
    assert rotation_scale(config) == pytest.approx(rotation)


@pytest.mark.parametrize("original", [32, 8192])
def test_llamas_long_context_frequencies_equal_the_published_implementation(original):
    changes = {**references.LLAMA3, "original_max_position_embeddings": original}
    reference = references.build("llama", head_dim=128, max_position_embeddings=131072, rope_parameters=changes)
    config = ModelConfig.from_hf(reference.config.to_dict())
    expected = reference.model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse_frequencies(config), expected, rtol=1e-6, atol=0)
    assert (inverse_frequencies(config) != inverse_frequencies(config.replace(rope_scaling=None))).any()


@pytest.mark.parametrize("rotate", [rotate_pairs, rotate_halves])
@given(seed=st.integers(0, 10**6), query=st.integers(0, 500), key=st.integers(0, 500), shift=st.integers(1, 500))
def test_scores_depend_on_the_distance_alone(rotate, seed, query, key, shift):
    turns = RotaryTable(PRESETS["tiny"])
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(seed))

    def score(i, j):
        return (rotate(q, turns(torch.tensor([i]))) * rotate(k, turns(torch.tensor([j])))).sum().item()

    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=5e-3)


@pytest.mark.parametrize("rotate", [rotate_pairs, rotate_halves])
def test_turning_keeps_lengths_and_dtypes(rotate):
    turns = RotaryTable(PRESETS["tiny"])(torch.arange(7))
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, turns).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, turns)[:, :, 0], x[:, :, 0])  # position 0 turns nothing
    assert rotate(x.bfloat16(), turns).dtype == torch.bfloat16


@pytest.mark.parametrize("positions", [[-1], [-2, -1], [-1, 0, 1], [0, -1], [[0, 1], [-1, 0]]])
def test_positions_below_zero_are_refused_and_not_read_from_the_end_of_the_table(positions):
    table = RotaryTable(PRESETS["tiny"])
    table(torch.arange(9))
    with pytest.raises(ValueError, match=r"positions .* begin below 0"):
        table(torch.tensor(positions))


@pytest.mark.parametrize("positions", [[5], [3, 4, 5], [9, 2, 2, 700], [300, 301], [0], [4, 3, 5, 6]])
def test_positions_in_any_order_get_their_own_angles(positions):
    config = PRESETS["tiny"]
    table = RotaryTable(config)
    for _ in range(2):  # the second time from the table
        turns = table(torch.tensor(positions))
        angles = torch.tensor(positions)[:, None] * inverse_frequencies(config)
        torch.testing.assert_close(turns, torch.polar(torch.ones_like(angles), angles), rtol=1e-4, atol=1e-4)
    assert math.isclose(turns.abs().max().item(), 1.0, rel_tol=1e-6)
