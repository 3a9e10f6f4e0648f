"""Text that is written from a cache is the text that reading everything again would write."""

import numpy
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import token_ids, yarn

from deepseek_lab.generation import generate, sample

MODELS = {
    "v3": ("deepseek_v3", {}),
    "v3 with yarn": ("deepseek_v3", dict(rope_parameters=yarn())),
    "v3 with half-split rope": ("deepseek_v3", dict(rope_interleave=False)),
    "v2-lite": ("deepseek_v2", references.V2_LITE),
    "v2": ("deepseek_v2", {}),
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
}


@pytest.fixture(scope="module", params=["reference", "numba"])
def kernels(request):
    """Every test here runs with and without compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_KERNELS", request.param)
        yield request.param


@pytest.fixture(scope="module", params=MODELS)
def pair(request, kernels, tmp_path_factory):
    """(published model, our model)"""
    kind, changes = MODELS[request.param]
    reference = references.build(kind, **changes)
    return reference, references.ours(reference, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(kernels, tmp_path_factory):
    return references.ours(references.build("deepseek_v3"), tmp_path_factory.mktemp("model"))


@torch.no_grad()
def by_recomputing(model, tokens, count):
    """Greedy text without any cache: the whole text is read again for every token."""
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 9), (5, 3)])
def test_greedy_text_is_that_of_reading_everything_again(pair, batch, length):
    _, model = pair
    tokens = token_ids(batch, length)
    got = generate(model, tokens, 40)
    assert got.dtype == torch.int64
    assert torch.equal(got, by_recomputing(model, tokens, 40))


def test_greedy_text_is_the_published_implementations(pair):
    reference, model = pair
    tokens = token_ids(2, 8)
    expected = reference.generate(
        tokens, max_new_tokens=32, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(tokens)
    )
    assert expected.shape == (2, 40)
    assert torch.equal(generate(model, tokens, 32), expected)


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.3, top_p=0.9, seed=4)])
def test_a_stream_is_the_same_text_as_it_is_made(model, settings):
    tokens = token_ids(2, 5)
    steps = generate(model, tokens, 12, stream=True, **settings)
    first = next(steps)
    assert first.shape == (2,)
    assert torch.equal(torch.stack([first, *steps], dim=1), generate(model, tokens, 12, **settings)[:, 5:])


def test_a_stream_may_be_left_early(model):
    steps = generate(model, token_ids(1, 5), 100, stream=True)
    assert len([next(steps) for _ in range(3)]) == 3
    steps.close()


def test_the_same_seed_draws_the_same_text(model):
    tokens = token_ids(2, 5)
    texts = [generate(model, tokens, 30, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    torch.manual_seed(3)  # the numbers of others play no part and are left alone
    state = torch.get_rng_state()
    assert torch.equal(generate(model, tokens, 30, temperature=1.0, seed=1), texts[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*(generate(model, tokens, 30, temperature=1.0) for _ in range(2)))


def test_a_temperature_close_to_zero_and_a_tiny_top_p_are_greedy(model):
    tokens = token_ids(2, 5)
    greedy = generate(model, tokens, 30)
    for temperature in (1e-6, 1e-300, 1e-308, 5e-324):
        assert torch.equal(generate(model, tokens, 30, temperature=temperature, seed=0), greedy)
    assert torch.equal(generate(model, tokens, 30, temperature=1.0, top_p=1e-9, seed=0), greedy)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drawn_tokens_follow_the_models_own_probabilities(model, temperature):
    tokens = token_ids(1, 6).repeat(3000, 1)
    with torch.no_grad():
        chances = model(tokens[:1])[0, -1].softmax(-1)
    drawn = generate(model, tokens, 1, temperature=temperature, seed=0)[:, -1]
    shares = torch.bincount(drawn, minlength=64) / 3000
    if temperature:
        assert (shares - chances).abs().max() < 0.03
    else:
        assert shares[chances.argmax()] == 1


def test_the_prompt_is_left_as_it_was_and_the_model_in_its_mode(model):
    tokens = token_ids(2, 5)
    before = tokens.clone()
    text = generate(model, tokens, 3)
    assert torch.equal(tokens, before) and torch.equal(text[:, :5], before)
    assert not model.training and not text.is_inference() | text.requires_grad


def test_the_text_may_fill_the_models_positions_but_not_outgrow_them(model):
    tokens = token_ids(1, 100)
    assert generate(model, tokens, 28).shape == (1, 128)
    with pytest.raises(ValueError, match=r"max_new_tokens=29 after 100 prompt tokens; .* at most 128 together"):
        generate(model, tokens, 29)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(top_p=0.0), r"top_p=0\.0"),
        (dict(top_p=1.1), r"top_p=1\.1"),
        (dict(top_p=float("nan")), "top_p=nan"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(tokens=torch.tensor([1, 2])), "shape"),
        (dict(tokens=torch.ones(1, 2)), "dtype"),
        (dict(tokens=torch.ones(1, 0).long()), "at least one"),
        (dict(tokens=torch.tensor([[64]])), "token 64 is outside the vocabulary 0..63"),
        (dict(tokens=torch.tensor([[-1]])), "token -1"),
    ],
)
def test_impossible_settings_are_refused(model, settings, words):
    with pytest.raises(ValueError, match=words):
        generate(**{"model": model, "tokens": token_ids(1, 3), "max_new_tokens": 2, **settings})


@pytest.mark.parametrize("wrong", ["a text", [[1, 2]], numpy.ones((1, 2), int)])
def test_what_is_no_tensor_is_refused_with_how_to_make_one(model, wrong):
    says = rf"generate got {type(wrong).__name__}; .* encode it first: tokenizer\.encode\(text\)\[None\]"
    with pytest.raises(TypeError, match=says):
        generate(model, wrong, 2)


@pytest.mark.parametrize("wrong", [2.0, "2", None])
def test_the_number_of_new_tokens_is_a_whole_one(model, wrong):
    with pytest.raises(TypeError, match=f"max_new_tokens={wrong!r} is no whole number; choose one, such as 64"):
        generate(model, token_ids(1, 3), wrong)
    assert generate(model, token_ids(1, 3), numpy.int64(2)).shape == (1, 5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_point_to_the_models_weights(temperature, value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(ValueError, match=r"logits hold nan or infinity.* weights"):
        sample(logits, temperature)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.15, 0.1])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.2, {1}),
        (0.399, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 3, 4}),
        (0.86, {1, 3, 4, 5}),
        (1.0, {0, 1, 3, 4, 5}),
    ],
)
def test_top_p_keeps_the_likeliest_tokens_until_they_reach_it(top_p, kept):
    logits = PROBABILITIES.log().expand(20_000, -1)
    drawn = sample(logits, 1.0, top_p, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    assert set(shares.nonzero().flatten().tolist()) == kept
    expected = torch.zeros(6).index_copy(0, torch.tensor(sorted(kept)), PROBABILITIES[sorted(kept)])
    assert (shares - expected / expected.sum()).abs().max() < 0.015


@pytest.mark.parametrize(("temperature", "power"), [(0.5, 2.0), (1.0, 1.0), (2.0, 0.5)])
def test_temperature_sharpens_and_flattens(temperature, power):
    logits = PROBABILITIES.log().expand(20_000, -1)
    drawn = sample(logits, temperature, generator=torch.Generator().manual_seed(1))
    expected = PROBABILITIES**power / (PROBABILITIES**power).sum()
    assert (torch.bincount(drawn, minlength=6) / len(drawn) - expected).abs().max() < 0.015


@given(seed=st.integers(0, 10**6), temperature=st.floats(1e-3, 1e3), top_p=st.floats(1e-6, 1.0))
def test_every_row_is_drawn_from_its_own_logits(seed, temperature, top_p):
    generator = torch.Generator().manual_seed(seed)
    favourites = torch.randint(50, (7,), generator=generator)
    logits = torch.full((7, 50), -1e9).scatter(1, favourites[:, None], 0.0)
    assert torch.equal(sample(logits, temperature, top_p, generator), favourites)
    assert torch.equal(sample(logits, 0.0), favourites)
