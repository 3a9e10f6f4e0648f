"""A model with grouped heads that is given latents computes the same where it can, and nearly the same elsewhere."""

from itertools import pairwise

import pytest
import references
import torch
from references import cached_logits, difference, token_ids

from deepseek_lab.config import ModelConfig, RopeScaling
from deepseek_lab.generation import generate
from deepseek_lab.model import Transformer, load_hf, save_hf, to_latent
from deepseek_lab.presets import PRESETS

MQA = ModelConfig(model_type="llama", vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=256)  # fmt: skip
GQA = MQA.replace(num_key_value_heads=2)
LONG = GQA.replace(hidden_size=256, rope_scaling=RopeScaling("yarn", 40.0, 4096))
ROPES = {
    "plain": {},
    "another base": dict(rope_theta=500.0),
    "yarn": dict(rope_scaling=RopeScaling("yarn", 4.0, 32, mscale=1.0, mscale_all_dim=0.7)),
    "yarn without mscale": dict(rope_scaling=RopeScaling("yarn", 4.0, 32)),
    "llama3": dict(rope_scaling=RopeScaling("llama3", 4.0, 32)),
}
EXACT = 1e-5


def filled(config: ModelConfig, seed: int = 0) -> Transformer:
    return references.fill(Transformer(config), seed).eval()


@torch.no_grad()
def make_copies(model: Transformer) -> Transformer:
    """Turn and stretch each pair of the first group's keys, by other factors in each group, into all keys."""
    generator = torch.Generator().manual_seed(5)
    for layer in model.layers:
        weight = layer.self_attn.k_proj.weight
        first = torch.complex(*weight.view(model.config.num_key_value_heads, 2, -1, weight.shape[1])[0])
        for group in weight.view(model.config.num_key_value_heads, 2, -1, weight.shape[1])[1:]:
            factor = torch.complex(*torch.randn(2, len(first), 1, generator=generator))
            group.copy_(torch.view_as_real(first * factor).movedim(-1, 0))
    return model


@torch.no_grad()
def error(model: Transformer, tokens: torch.Tensor, *settings, **more) -> float:
    return difference(to_latent(model, *settings, **more)(tokens), model(tokens))


# Where it is exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_one_group_at_the_rank_of_its_values_is_exact(rope, calibrated):
    """All keys go into the rope key, so the latent holds values alone: head_dim of them."""
    model, tokens = filled(MQA.replace(**ROPES[rope])), token_ids(2, 90)
    calibration = token_ids(3, 80, seed=9) if calibrated else None
    assert error(model, tokens, MQA.qk_head_dim, calibration=calibration) < EXACT


@pytest.mark.parametrize("rope", ROPES)
def test_groups_that_are_turned_and_stretched_copies_are_exact_at_full_rank(rope):
    model = make_copies(filled(GQA.replace(**ROPES[rope])))
    assert error(model, token_ids(2, 90), 24) < EXACT  # two groups of values, 12 each, are all that is left
    with torch.no_grad():
        model.layers[0].self_attn.k_proj.weight[-12] *= -1  # of the pair that turns fastest
    assert error(model, token_ids(2, 90), 48) > 1e-3


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("width", [12, 6, 4, 2])
@torch.no_grad()
def test_any_groups_and_rope_width_are_exact_at_full_rank_between_tokens_at_one_position(groups, width):
    model = filled(MQA.replace(num_key_value_heads=groups, **ROPES["yarn"] if width == 12 else {}))
    full = min(2 * groups * MQA.qk_head_dim, MQA.hidden_size)
    latent = to_latent(model, full, width)
    x = torch.randn(2, 30, MQA.hidden_size, generator=torch.Generator().manual_seed(1))
    for old, new in zip(model.layers, latent.layers, strict=True):
        same, places = torch.full((30,), 77), torch.arange(30)
        assert difference(new.self_attn(x, same), old.self_attn(x, same)) < EXACT
        lost = difference(new.self_attn(x, places), old.self_attn(x, places))
        assert lost < EXACT if groups == 1 and width == 12 else lost > 1e-3


@torch.no_grad()
def test_the_values_are_the_best_of_their_rank():
    """Eckart and Young: the error of the best factors is the root of the squares of the singular values cut off."""
    model = filled(MQA)
    values = model.layers[1].self_attn.v_proj.weight
    scaled = values * model.layers[1].input_layernorm.weight  # what comes in has the sizes that the norm gives it
    for rank in range(1, 13):
        attention = to_latent(model, rank).layers[1].self_attn
        down = attention.kv_a_proj_with_mqa.weight[:rank] * attention.kv_a_layernorm.weight[:, None] * 1000
        up = attention.kv_b_proj.weight.view(4, 24, rank)[:, 12:]
        cut = (up @ down - values) * model.layers[1].input_layernorm.weight
        best = torch.linalg.svdvals(scaled)[rank:].square().sum().sqrt()
        torch.testing.assert_close(cut.flatten(1).norm(dim=1), best.expand(4), rtol=1e-4, atol=1e-5)


# Where it is not ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def decaying(config: ModelConfig) -> Transformer:
    """Keys and values of all groups share a few strong directions, as those of trained models do."""
    model = filled(config)
    for layer in model.layers:
        a = layer.self_attn
        u, s, v = torch.linalg.svd(torch.cat([a.k_proj.weight, a.v_proj.weight]), full_matrices=False)
        both = u * (s[0] * 0.8 ** torch.arange(len(s))) @ v
        for weight, part in zip((a.k_proj.weight, a.v_proj.weight), both.chunk(2), strict=True):
            weight.copy_(part)
    return model


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_a_higher_rank_is_nearer_to_the_model(groups):
    model = decaying(MQA.replace(num_key_value_heads=groups))
    x, place = torch.randn(4, 24, 48, generator=torch.Generator().manual_seed(1)), torch.zeros(24, dtype=torch.int64)
    x = model.layers[0].input_layernorm(x)
    errors = []
    for rank in (1, 3, 6, 9, 12):  # all at one place: what the rank costs, without what the lost positions cost
        old, new = (m.layers[0].self_attn for m in (model, to_latent(model, rank)))
        errors.append((new(x, place) - old(x, place)).norm().item())
    assert all(later < 0.8 * earlier for earlier, later in pairwise(errors)), errors


def test_the_lost_positions_cost_less_the_slower_the_pairs_turn():
    """The last pairs of the fast model turn by 0.9 ** 6 in a step, those of the slow one by 1e-5 and less."""
    errors = []
    for theta in (1.2, 10.0, 1e3, 1e8):
        model = filled(GQA.replace(rope_theta=theta))
        errors.append(error(model, token_ids(4, 24), 48))
    assert errors == sorted(errors, reverse=True), errors


@pytest.mark.parametrize("rank", [3, 6, 9])
def test_calibration_on_typical_text_brings_it_nearer(rank):
    model, text = decaying(MQA), token_ids(8, 64, seed=2) % 8  # text that uses an eighth of the vocabulary
    assert error(model, text[:4], rank, calibration=text[4:]) < 0.8 * error(model, text[:4], rank)


@torch.no_grad()
def test_a_live_norm_gives_all_latents_one_size_and_can_be_trained_on():
    model, tokens = filled(GQA), token_ids(2, 40)
    live = to_latent(model, 20, norm="live")
    caches = live.new_caches(2)
    assert 1e-3 < difference(live(tokens, caches), model(tokens)) < 1.5
    for layer, cache in zip(live.layers, caches, strict=True):
        sizes = cache.view()[0][..., :20].square().mean(-1).sqrt()
        torch.testing.assert_close(sizes, layer.self_attn.kv_a_layernorm.weight[0].expand(2, 40), rtol=1e-3, atol=0)
    wanted, losses, optimizer = model(tokens), [], torch.optim.AdamW(live.parameters(), 1e-3)
    for _ in range(20):
        with torch.enable_grad():
            loss = (live(tokens) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_a_layer_without_keys_or_without_values_is_converted_too(part):
    model = filled(GQA)
    model.layers[0].self_attn.get_submodule(part).weight.data.zero_()
    got = to_latent(model, 48).layers[0].self_attn
    x, same = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1)), torch.full((9,), 3)
    with torch.no_grad():
        expected = model.layers[0].self_attn(x, same)
        assert (got(x, same) - expected).abs().max() < EXACT


# What comes out is a model like any other --------------------------------------------------------------------------


def test_its_text_its_files_and_its_cache_are_those_of_a_latent_model(tmp_path):
    model = filled(MQA.replace(tie_word_embeddings=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    latent, tokens = to_latent(model, 12), token_ids(2, 9)
    assert torch.equal(generate(latent, tokens, 60), generate(model, tokens, 60))
    assert difference(cached_logits(latent, token_ids(2, 30), [5, 1]), model(token_ids(2, 30)).detach()) < EXACT
    caches = latent.new_caches()
    latent(tokens[:1], caches)
    assert caches[0].nbytes == 9 * (12 + 12) * 4
    save_hf(latent, tmp_path)
    assert torch.equal(load_hf(tmp_path)(tokens), latent(tokens))
    latent.layers[0].self_attn.o_proj.weight.data += 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_float16_has_no_room_for_latents_that_small():
    model = filled(MQA).half()
    with pytest.raises(ValueError, match=r"float16, whose range is too narrow .* norm='live', or convert model\.float"):
        to_latent(model, 12)
    assert to_latent(model, 12, norm="live")(token_ids(1, 9)).isfinite().all()


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (GQA, dict(kv_lora_rank=0), "kv_lora_rank=0; choose 1 to 48"),
        (MQA, dict(kv_lora_rank=25), "kv_lora_rank=25; choose 1 to 24, the rank of all keys and values"),
        (GQA, dict(kv_lora_rank=8, qk_rope_head_dim=24), "qk_rope_head_dim=24; choose an even divisor .* head_dim=12"),
        (GQA, dict(kv_lora_rank=8, qk_rope_head_dim=3), "qk_rope_head_dim=3; choose an even divisor"),
        (GQA, dict(kv_lora_rank=8, norm="none"), "norm='none'; choose 'linear' .* or 'live'"),
        (LONG, dict(kv_lora_rank=8, qk_rope_head_dim=32), "depend on the width; choose 64"),
        (GQA.replace(attention_bias=True), dict(kv_lora_rank=8), "attention_bias=True; latent attention has no biases"),
        (PRESETS["tiny"], dict(kv_lora_rank=8), "kv_lora_rank=64; it has latent attention already"),
    ],
)
def test_what_cannot_be_converted_is_refused(config, settings, words):
    with pytest.raises(ValueError, match=words):
        to_latent(Transformer(config), **settings)
