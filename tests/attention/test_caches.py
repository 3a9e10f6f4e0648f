"""A cache holds what was put in, grows when it must, and says how many bytes that is."""

import pytest
import torch

from deepseek_lab.attention import GroupedCache, LatentCache
from deepseek_lab.attention.caches import new_cache
from deepseek_lab.presets import PRESETS

V3, LLAMA = PRESETS["deepseek-v3"], PRESETS["llama-3.1-8b"]
TINY = PRESETS["tiny"]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_v3_latent_cache_needs_70272_bytes_per_token():
    cache = LatentCache(V3, batch=1, capacity=8, dtype=torch.bfloat16)
    cache.append(random(1, 3, 576, dtype=torch.bfloat16))
    assert cache.nbytes == 3 * 576 * 2
    assert 61 * cache.nbytes == 3 * 70_272  # Insights into DeepSeek-V3 (arXiv 2505.09343), table 1


@pytest.mark.parametrize(
    ("name", "kib_per_token"),
    [("llama-3.1-8b", 128), ("llama-3.1-70b", 320), ("llama-3.1-405b", 504), ("qwen2.5-72b", 320)],
)
def test_grouped_caches_need_two_heads_per_group_and_token(name, kib_per_token):
    config = PRESETS[name]
    cache = GroupedCache(config, batch=2, capacity=4, dtype=torch.bfloat16)
    cache.append(*random(2, 2, config.num_key_value_heads, 5, config.qk_head_dim, dtype=torch.bfloat16))
    assert config.num_hidden_layers * cache.nbytes == 2 * 5 * kib_per_token * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_models_caches_hold_width_times_tokens_times_batch(dtype, batch):
    cache = new_cache(TINY, batch, capacity=2, dtype=dtype)
    for tokens in (1, 4, 1, 1):
        cache.append(random(batch, tokens, TINY.latent_width, dtype=dtype))
    assert cache.length == 7
    assert cache.nbytes == TINY.latent_width * 7 * batch * dtype.itemsize
    assert cache.dtype == dtype


@pytest.mark.parametrize("capacity", [1, 2, 5, 64])
def test_growing_keeps_every_value(capacity):
    cache, whole = LatentCache(TINY, batch=2, capacity=capacity), random(2, 40, TINY.latent_width)
    start = 0
    for tokens in (1, 3, 1, 17, 1, 1, 16):
        seen = cache.append(whole[:, start : start + tokens])
        start += tokens
        assert torch.equal(seen, whole[:, :start])
    assert cache.allocated_nbytes >= cache.nbytes == whole.nbytes
    assert cache.allocated_nbytes <= 2 * max(cache.nbytes, capacity * 2 * TINY.latent_width * 4)


def test_a_growing_grouped_cache_keeps_keys_and_values_apart():
    cache = GroupedCache(LLAMA, batch=2, capacity=1)
    keys, values = random(2, 8, 9, 128), random(2, 8, 9, 128) + 1
    for t in range(9):
        seen = cache.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    assert torch.equal(seen[0], keys) and torch.equal(seen[1], values)


def test_views_are_not_copies():
    cache = LatentCache(TINY, capacity=8)
    seen = cache.append(random(1, 3, TINY.latent_width))
    assert seen.data_ptr() == cache.view()[0].data_ptr()


@pytest.mark.parametrize("shape", [(3, 1, 80), (2, 1, 79), (2, 80), (1, 1, 80)])
def test_what_does_not_fit_is_refused_and_changes_nothing(shape):
    cache = LatentCache(TINY, batch=2)
    cache.append(random(2, 4, 80))
    with pytest.raises(ValueError, match=r"LatentCache.append got .* expected"):
        cache.append(random(*shape))
    assert cache.length == 4


def test_a_cache_is_made_to_the_kind_of_attention():
    assert isinstance(new_cache(V3, capacity=1), LatentCache)
    assert isinstance(new_cache(LLAMA, capacity=1), GroupedCache)
