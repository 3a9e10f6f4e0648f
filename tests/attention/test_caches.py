"""A cache holds what was put in, grows when it must, and says how many bytes that is."""

import pytest
import torch

from deepseek_lab.accounting import kv_cache
from deepseek_lab.attention import ExpandedCache, Fp8LatentCache, GroupedCache, LatentCache, PagedCache, new_cache
from deepseek_lab.model import Transformer
from deepseek_lab.presets import PRESETS

V3, LLAMA = PRESETS["deepseek-v3"], PRESETS["llama-3.1-8b"]
TINY = PRESETS["tiny"]
TINY_GROUPED = TINY.replace(kv_lora_rank=None, num_key_value_heads=2, head_dim=16)
LATENT_LAYOUTS, GROUPED_LAYOUTS = ("latent", "latent_fp8", "expanded", "paged"), ("grouped", "expanded")
EVERY = [(TINY, layout) for layout in LATENT_LAYOUTS] + [(TINY_GROUPED, layout) for layout in GROUPED_LAYOUTS]
every_kind = pytest.mark.parametrize(("config", "layout"), EVERY)


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


# Every kind behaves alike -------------------------------------------------------------------------------------------


def new_tokens(config, layout, batch, tokens, seed=0, dtype=torch.float32):
    """What a layer would append: latents with rope keys, or keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, config.latent_width)] if config.uses_latent_attention else []
    if layout in ("grouped", "expanded"):
        heads = config.num_key_value_heads if layout == "grouped" else config.num_attention_heads
        shapes = [(batch, heads, tokens, width) for width in (config.qk_head_dim, config.value_head_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def contents(cache):
    return [part.clone() for part in cache.view()]


def same(ones, others):
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def first(parts, tokens):
    return [part[..., :tokens, :] for part in parts]


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in ("deepseek-v3", "deepseek-v2-lite", "tiny") for layout in LATENT_LAYOUTS]
    + [(name, layout) for name in ("llama-3.1-8b", "qwen2.5-72b") for layout in GROUPED_LAYOUTS],
)
def test_predicted_bytes_are_what_the_cache_takes(name, layout):
    config, paged = PRESETS[name], layout == "paged"
    cache = new_cache(config, 2, 70, torch.bfloat16, layout=layout)
    for tokens in (3, 1, 66):
        cache.append(*new_tokens(config, layout, 2, tokens, dtype=torch.bfloat16))
    predicted = kv_cache(config, 70, 2, "latent" if paged else layout)
    assert config.num_hidden_layers * cache.nbytes == predicted.total
    in_blocks = kv_cache(config, 70, 2, "latent", block_size=64).total if paged else predicted.total
    assert config.num_hidden_layers * cache.allocated_nbytes == in_blocks


@every_kind
def test_every_kind_grows_past_its_capacity(config, layout):
    cache, new = new_cache(config, 2, capacity=1, layout=layout), new_tokens(config, layout, 2, 200)
    ample = new_cache(config, 2, capacity=200, layout=layout)
    ample.append(*new)
    start = 0
    for tokens in (1, 60, 2, 130, 7):
        seen = cache.append(*(part[..., start : start + tokens, :] for part in new))
        start += tokens
    assert same(contents(cache), contents(ample)) and len(seen) == 2


def test_the_caches_of_a_whole_model_add_up_to_the_prediction():
    model = Transformer(TINY).eval()
    tokens = torch.arange(2 * 70).view(2, 70)
    for layout in LATENT_LAYOUTS:
        caches = model.new_caches(2, 70, layout)
        with torch.no_grad():
            model(tokens, caches)
        expected = {
            "latent_fp8": kv_cache(TINY, 70, 2, "latent_fp8"),
            "expanded": kv_cache(TINY, 70, 2, "expanded", dtype="fp32"),
        }.get(layout, kv_cache(TINY, 70, 2, "latent", dtype="fp32"))
        assert sum(cache.nbytes for cache in caches) == expected.total, layout


@every_kind
def test_what_is_truncated_is_forgotten_and_the_rest_goes_on(config, layout):
    cache, whole = new_cache(config, 2, 20, layout=layout), new_cache(config, 2, 20, layout=layout)
    old, new = new_tokens(config, layout, 2, 9), new_tokens(config, layout, 2, 4, seed=1)
    cache.append(*old)
    cache.truncate(6)
    assert cache.length == 6 and cache.nbytes == cache.nbytes // 6 * 6
    cache.append(*new)
    whole.append(*first(old, 6))
    whole.append(*new)
    assert same(contents(cache), contents(whole)) and cache.nbytes == whole.nbytes
    cache.truncate(0)
    assert cache.length == cache.nbytes == 0 and all(not part.numel() for part in cache.view())


@every_kind
@pytest.mark.parametrize("length", [6, -1, True, 2.0, None])
def test_truncating_forward_is_refused(config, layout, length):
    cache = new_cache(config, 2, 20, layout=layout)
    cache.append(*new_tokens(config, layout, 2, 5))
    before = contents(cache)
    with pytest.raises(ValueError, match=r"truncate got .* from 0 to the 5 tokens"):
        cache.truncate(length)
    assert cache.length == 5 and same(contents(cache), before)


@every_kind
def test_a_fork_and_its_origin_do_not_see_each_others_later_tokens(config, layout):
    cache = new_cache(config, 2, 200, layout=layout)
    old = cache.append(*new_tokens(config, layout, 2, 5))
    twin = cache.fork()
    assert type(twin) is type(cache) and same(contents(twin), contents(cache)) and twin.length == 5
    left, right = (new_tokens(config, layout, 2, 3, seed=seed) for seed in (1, 2))
    cache.append(*left)
    twin.append(*right)
    expected = []
    for new in (left, right):
        alone = new_cache(config, 2, 200, layout=layout)
        alone.append(*new_tokens(config, layout, 2, 5))
        alone.append(*new)
        expected.append(contents(alone))
    assert same(contents(cache), expected[0]) and same(contents(twin), expected[1])
    assert not same(expected[0], expected[1]) and len(old)
    twin.truncate(1)
    assert cache.length == 8 and same(contents(cache), expected[0])


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_and_changes_nothing(config, layout, value):
    cache = new_cache(config, 2, 20, layout=layout)
    cache.append(*new_tokens(config, layout, 2, 5))
    before, bad = contents(cache), new_tokens(config, layout, 2, 3, seed=1)
    bad[-1][1, ..., -1] = value
    with pytest.raises(ValueError, match=r"append got (nan|inf|-inf) at \["):
        cache.append(*bad)
    assert cache.length == 5 and same(contents(cache), before)


@every_kind
def test_another_layout_width_or_batch_is_refused_and_changes_nothing(config, layout):
    cache = new_cache(config, 2, 20, layout=layout)
    cache.append(*new_tokens(config, layout, 2, 5))
    before = contents(cache)
    wrong = [new_tokens(config, layout, batch, 1) for batch in (1, 3)]
    wrong += [[part[..., :-1] for part in new_tokens(config, layout, 2, 1)], []]
    wrong += [[*new_tokens(config, layout, 2, 1), torch.zeros(2, 1, 1)], new_tokens(LLAMA, "grouped", 2, 1)]
    for new in wrong:
        with pytest.raises(ValueError, match=r"append got .* expected"):
            cache.append(*new)
        assert cache.length == 5 and same(contents(cache), before)


@every_kind
def test_a_cache_made_in_inference_mode_serves_any_later_mode(config, layout):
    with torch.inference_mode():
        cache = new_cache(config, 1, capacity=2, layout=layout)
        cache.append(*new_tokens(config, layout, 1, 3))
        twin = cache.fork()
    for one in (cache, twin):
        one.append(*new_tokens(config, layout, 1, 1, seed=1))
        assert one.length == 4


def test_finite_values_whose_sum_overflows_are_stored():
    cache = LatentCache(TINY, dtype=torch.float16)
    large = torch.full((1, 2, TINY.latent_width), 60_000.0, dtype=torch.float16)
    assert torch.equal(cache.append(large), large)
    with pytest.raises(ValueError, match="append got inf"):  # 70,000 does not exist in FP16
        cache.append(torch.full((1, 1, TINY.latent_width), 70_000.0))


def test_an_expanded_cache_stores_the_key_of_a_group_for_every_head_of_it():
    grouped = new_tokens(TINY_GROUPED, "grouped", 2, 3)
    keys, values = new_cache(TINY_GROUPED, 2, layout="expanded").append(*grouped)
    for head in range(TINY_GROUPED.num_attention_heads):
        group = head // 4  # 8 heads in 2 groups
        assert torch.equal(keys[:, head], grouped[0][:, group]) and torch.equal(values[:, head], grouped[1][:, group])


@pytest.mark.parametrize(
    ("config", "layout", "kind"),
    [(V3, None, LatentCache), (V3, "latent", LatentCache), (V3, "latent_fp8", Fp8LatentCache),
     (V3, "paged", PagedCache), (V3, "expanded", ExpandedCache), (LLAMA, None, GroupedCache),
     (LLAMA, "expanded", ExpandedCache)],
)  # fmt: skip
def test_a_layout_is_made_by_its_name(config, layout, kind):
    assert type(new_cache(config, capacity=1, layout=layout)) is kind


@every_kind
@pytest.mark.parametrize("sizes", [dict(batch=-1), dict(batch=1.5), dict(capacity=-3), dict(capacity=True)])
def test_sizes_that_are_none_are_refused(config, layout, sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"new_cache got {name}={value}; choose a whole number"):
        new_cache(config, layout=layout, **sizes)


@pytest.mark.parametrize(
    ("config", "layout", "possible"),
    [(V3, "grouped", "latent, latent_fp8, expanded, paged"), (LLAMA, "latent", "grouped, expanded"),
     (LLAMA, "paged", "grouped, expanded"), (V3, "int4", "latent, latent_fp8, expanded, paged")],
)  # fmt: skip
def test_an_impossible_layout_is_refused_with_those_that_are_possible(config, layout, possible):
    with pytest.raises(ValueError, match=f"layout='{layout}' is not possible .* choose one of {possible}"):
        new_cache(config, layout=layout)
