"""The FP8 cache: 656 bytes per token and layer, and readers get exactly what quantising and dequantising gives."""

import pytest
import torch

from deepseek_lab.attention import Fp8Latent, Fp8LatentCache
from deepseek_lab.precision import quantize_tiles
from deepseek_lab.presets import PRESETS

V3, TINY = PRESETS["deepseek-v3"], PRESETS["tiny"]
RAGGED = TINY.replace(kv_lora_rank=333, qk_rope_head_dim=18)  # three tiles, the last of 77; nothing falls on a word


def joint(config, batch, tokens, seed=0):
    """Latents of very different sizes beside rope keys [batch, token, latent + rope]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, config.latent_width, generator=generator)
    return x * torch.exp(2 * torch.randn(batch, tokens, 1, generator=generator))


def test_a_token_of_v3_is_512_codes_16_bytes_of_scales_and_128_of_rope_key():
    cache = Fp8LatentCache(V3, capacity=4)
    cache.append(joint(V3, 1, 1))
    assert [part.nbytes for part in cache.parts()] == [512, 16, 128]
    assert cache.nbytes == 656 and cache.allocated_nbytes == 4 * 656
    assert cache.raw().shape == (1, 1, 656)


@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
@pytest.mark.parametrize("config", [V3, TINY, RAGGED], ids=["v3", "tiny", "ragged"])
def test_readers_get_what_quantising_and_dequantising_gives_bit_for_bit(config, scale):
    cache, whole = Fp8LatentCache(config, batch=2, capacity=3, scale=scale), joint(config, 2, 11)
    for start, end in ((0, 4), (4, 5), (5, 11)):
        seen = cache.append(whole[:, start:end])
    latent, rope = whole.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    assert torch.equal(seen[..., : config.kv_lora_rank], quantize_tiles(latent, scale=scale).dequantize())
    assert torch.equal(seen[..., config.kv_lora_rank :], rope.bfloat16().float())
    assert torch.equal(seen, cache.view()[0]) and cache.length == 11


def published(latent):
    """FlashMLA's tests/quant.py, tile by tile: power-of-two scales, codes by torch's own conversion to E4M3."""
    tiles = latent.unflatten(-1, (-1, 128))
    scales = torch.exp2(torch.clamp_min(tiles.abs().amax(-1) / 448, 1e-4).log2().ceil())
    return (tiles / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2), scales


def test_codes_and_scales_are_those_of_the_published_rule():
    x = joint(V3, 3, 50)
    x[..., ::128] += 0.0449  # every tile is above the published floor
    cache = Fp8LatentCache(V3, batch=3)
    cache.append(x)
    codes, scales = published(x[..., :512])
    assert torch.equal(cache.parts().scales, scales)
    assert torch.equal(cache.parts().codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scales.frexp().mantissa, torch.full_like(scales, 0.5))


def test_tiles_far_below_the_published_floor_come_back_closer_than_with_it():
    x = joint(V3, 1, 20) * 1e-7
    codes, scales = published(x[..., :512])
    floored = codes.float() * scales.repeat_interleave(128, dim=-1)
    seen = Fp8LatentCache(V3).append(x)[..., :512]
    assert (scales == 2.0**-13).all()
    assert (seen - x[..., :512]).abs().mean() < 0.3 * (floored - x[..., :512]).abs().mean()


def test_a_small_latent_has_one_scale_per_token():
    cache = Fp8LatentCache(TINY, batch=2)
    cache.append(joint(TINY, 2, 5))
    assert cache.parts().scales.shape == (2, 5, 1)
    assert cache.nbytes == 2 * 5 * (64 + 4 + 32)


@pytest.mark.parametrize("config", [V3, TINY, RAGGED], ids=["v3", "tiny", "ragged"])
def test_packed_bytes_hold_the_parts_in_the_published_order(config):
    cache = Fp8LatentCache(config, batch=2)
    cache.append(joint(config, 2, 3))
    parts, raw, latent = cache.parts(), cache.raw(), config.kv_lora_rank
    for part, back in zip(parts, Fp8Latent.unpack(raw, latent), strict=True):
        assert part.dtype == back.dtype and torch.equal(part.float(), back.float())
    token = raw[1, 2].numpy().tobytes()
    ends = latent, latent + 4 * parts.scales.shape[-1]
    assert token[: ends[0]] == parts.codes[1, 2].view(torch.uint8).numpy().tobytes()
    assert token[ends[0] : ends[1]] == parts.scales[1, 2].numpy().tobytes()
    assert token[ends[1] :] == parts.rope[1, 2].view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
@pytest.mark.parametrize("latent", [1, 3, 64, 127, 130])
def test_any_number_of_tokens_of_any_width_is_packed_and_unpacked(latent, tokens):
    config = TINY.replace(kv_lora_rank=latent, qk_rope_head_dim=2)
    parts = Fp8Latent.quantize(joint(config, 1, tokens), latent)
    packed = parts.pack()
    assert packed.shape == (1, tokens, latent + 4 * -(-latent // 128) + 4)
    assert torch.equal(Fp8Latent.unpack(packed, latent).dequantize(), parts.dequantize())


def test_parts_are_views_and_a_read_is_a_copy():
    cache = Fp8LatentCache(V3, capacity=8)
    seen = cache.append(joint(V3, 1, 3))
    before = cache.view()[0]
    seen.zero_()
    assert torch.equal(cache.view()[0], before)
    cache.parts().rope.zero_()
    assert (cache.view()[0][..., 512:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readers_get_the_dtype_they_asked_for(dtype):
    cache = Fp8LatentCache(TINY, dtype=dtype)
    assert cache.append(joint(TINY, 1, 2).to(dtype)).dtype == cache.dtype == dtype
    # Four significant bits times a power of two fit BF16: nothing is rounded twice.
    exact = Fp8LatentCache(TINY).append(joint(TINY, 1, 2).to(dtype))
    assert torch.equal(cache.view()[0].float(), exact)


def test_an_unknown_kind_of_scale_is_refused():
    with pytest.raises(ValueError, match="scale='int8'; choose one of ue8m0, fp32"):
        Fp8LatentCache(V3, scale="int8")
    with pytest.raises(ValueError, match="latent_width needs kv_lora_rank"):
        Fp8LatentCache(PRESETS["llama-3.1-8b"])
