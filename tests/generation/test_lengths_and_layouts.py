"""Texts of different lengths in one batch, and every layout of the cache, change nothing about what is written."""

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import difference, token_ids

import deepseek_lab as lab
from deepseek_lab.attention import new_cache
from deepseek_lab.generation import first_difference, generate
from deepseek_lab.generation.step import CompiledStep, ModelStep, decode_step

EXACT = 1e-5
LATENT, GROUPED = ["latent", "latent_fp8", "expanded", "paged"], ["grouped", "expanded"]
KINDS = {"v3": "deepseek_v3", "v2": "deepseek_v2", "llama": "llama", "qwen2": "qwen2"}
CASES = [(kind, layout) for kind in KINDS for layout in (LATENT if kind in ("v2", "v3") else GROUPED)]


@pytest.fixture(scope="module", params=["reference", "numba"])
def kernels(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_KERNELS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def models(kernels, tmp_path_factory):
    return {
        name: references.ours(references.build(kind), tmp_path_factory.mktemp(name)) for name, kind in KINDS.items()
    }


def filled_up(texts: list[torch.Tensor], align: str, filling: int = 0) -> torch.Tensor:
    """Rows of one length, filled up with some token behind or in front of the texts."""
    rows = torch.full((len(texts), max(map(len, texts))), filling)
    for row, text in zip(rows, texts, strict=True):
        row[slice(len(text)) if align == "left" else slice(-len(text), None)] = text
    return rows


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_every_text_of_a_batch_is_written_as_if_it_were_alone(models, kind, layout, align):
    texts = [token_ids(1, n, seed=n)[0] for n in (7, 1, 12, 4)]
    alone = [generate(models[kind], text[None], 25, layout=layout)[0, len(text) :] for text in texts]
    for filling in (0, 63, -100):
        rows = filled_up(texts, align, filling)
        got = generate(models[kind], rows, 25, lengths=[7, 1, 12, 4], align=align, layout=layout)
        assert got.shape == (4, 37)
        assert torch.equal(got[:, :12], rows)
        assert torch.equal(got[:, 12:], torch.stack(alone))


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), align=st.sampled_from(["left", "right"]),
       case=st.sampled_from(CASES), cuts=st.lists(st.integers(1, 6), min_size=1), more=st.integers(1, 4),
       seed=st.integers(0, 9))  # fmt: skip
def test_every_logit_of_a_batch_is_that_of_the_text_alone(models, lengths, align, case, cuts, more, seed):
    """Prefill in chunks of any size, then some decoded tokens."""
    kind, layout = case
    model, longest = models[kind], max(lengths)
    tokens, places = token_ids(len(lengths), longest + more, seed), torch.arange(longest + more)
    own = torch.tensor(lengths)[:, None]
    hidden = (places >= own) & (places < longest) if align == "left" else places < longest - own
    ends = sorted({end for end in torch.tensor(cuts).cumsum(0).tolist() if end < longest} | {longest})
    ends += [longest + i + 1 for i in range(more)]
    caches, parts = model.new_caches(len(lengths), 5 if layout != "paged" else 64, layout), []
    with torch.no_grad():
        for start, end in zip([0, *ends], ends, strict=False):
            parts.append(model(tokens[:, start:end], caches, hidden[:, :end]))
        got = torch.cat(parts, dim=1)
        for row, padding in enumerate(hidden):
            text = tokens[row : row + 1, ~padding]
            cache = model.new_caches(1, 64, layout) if layout == "latent_fp8" else None
            assert difference(got[row, ~padding], model(text, cache)[0]) < EXACT


@pytest.mark.parametrize(("kind", "layout"), [case for case in CASES if case[1] != "latent_fp8"])
def test_greedy_text_is_the_same_in_every_layout(models, kind, layout):
    tokens = token_ids(3, 9)
    assert torch.equal(generate(models[kind], tokens, 60, layout=layout), generate(models[kind], tokens, 60))


def test_a_ragged_batch_may_be_streamed_and_drawn(models):
    tokens, settings = token_ids(2, 6), dict(lengths=torch.tensor([6, 2]), temperature=1.2, seed=3)
    whole = generate(models["v3"], tokens, 10, **settings)
    stream = generate(models["v3"], tokens, 10, stream=True, **settings)
    assert torch.equal(torch.stack(list(stream), dim=1), whole[:, 6:])


def test_a_text_may_be_longer_than_the_positions_if_that_is_padding(models):
    tokens = token_ids(2, 140)  # the model has 128 positions
    got = generate(models["llama"], tokens, 8, lengths=[20, 120])
    assert torch.equal(got[0, 140:], generate(models["llama"], tokens[:1, :20], 8)[0, 20:])
    with pytest.raises(ValueError, match="max_new_tokens=9 after 120 prompt tokens"):
        generate(models["llama"], tokens, 9, lengths=[20, 120])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(lengths=[3]), r"lengths=\[3\] for tokens \(2, 5\); give 2 whole numbers from 1 to 5"),
        (dict(lengths=[3, 0]), r"lengths=\[3, 0\]"),
        (dict(lengths=[3, 6]), r"lengths=\[3, 6\]"),
        (dict(lengths=[3.0, 2.0]), r"lengths=\[3\.0, 2\.0\]"),
        (dict(lengths=[3, 2], align="middle"), "align='middle'; choose 'left' .* or 'right'"),
        (dict(align="right"), "align='right' without lengths; say how many tokens of each row are real"),
        (dict(layout="grouped"), "layout='grouped' is not possible .* latent"),
    ],
)
def test_impossible_lengths_and_layouts_are_refused(models, more, words):
    with pytest.raises(ValueError, match=words):
        generate(models["v3"], token_ids(2, 5), 4, **more)


# The compiled step ----------------------------------------------------------------------------------------------------


def test_the_compiled_step_leaves_to_the_model_what_it_would_misread(models, kernels):
    model = models["v3"]
    plain = CompiledStep if kernels == "numba" else ModelStep
    assert type(decode_step(model, 2, model.new_caches(2))) is plain
    for layout in LATENT[1:]:
        assert type(decode_step(model, 2, model.new_caches(2, layout=layout))) is ModelStep
    assert type(decode_step(model, 2, model.new_caches(2), torch.zeros(2, 9, dtype=torch.bool))) is ModelStep
    if kernels == "numba":
        step = decode_step(model, 2)
        for layout in LATENT[1:]:
            caches = model.new_caches(2, layout=layout)
            with pytest.raises(ValueError, match="expected a float32 LatentCache"):
                step(torch.tensor([1, 2]), caches)
            assert {cache.length for cache in caches} == {0}


def test_a_cache_in_another_dtype_is_left_to_the_model(models):
    model, tokens = models["v3"], token_ids(2, 9)
    caches = [new_cache(model.config, 2, dtype=torch.bfloat16) for _ in model.layers]
    with torch.no_grad():
        model(tokens[:, :8], caches)
        step = decode_step(model, 2, caches)
        assert type(step) is ModelStep and step(tokens[:, 8], caches).isfinite().all()


@pytest.mark.parametrize("part", ["input_layernorm.weight", "self_attn.kv_a_layernorm.weight"])
def test_a_step_that_would_store_what_is_no_number_is_refused_and_changes_no_cache(models, part):
    model, tokens = models["v3"], token_ids(2, 9)
    caches = model.new_caches(2)
    with torch.no_grad():
        model(tokens[:, :8], caches)
        step, before = decode_step(model, 2, caches), [cache.view()[0].clone() for cache in caches]
        expected = step(tokens[:, 8], [cache.fork() for cache in caches])
        weight = model.layers[1].get_parameter(part)
        good = weight[3].item()
        weight[3] = float("nan")
        with pytest.raises(ValueError, match=r"LatentCache.append got nan at \["):
            step(tokens[:, 8], caches)
        weight[3] = good
        assert all(torch.equal(cache.view()[0], old) for cache, old in zip(caches, before, strict=True))
        assert torch.equal(step(tokens[:, 8], caches), expected)


# A cache that does not take its tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_one_layer_that_refuses_leaves_the_caches_of_all_layers_as_they_were(models, kind, layout):
    model, tokens = models[kind], token_ids(2, 9)
    with torch.no_grad():
        expected = model(tokens, model.new_caches(2, 64, layout))
        caches = model.new_caches(2, 64, layout)
        model(tokens[:, :4], caches)
        with pytest.raises(ValueError, match="batch size"):
            model(tokens[:1, 4:], caches)
        for error in (ValueError, KeyboardInterrupt):

            def refuse(*new, error=error, **more):
                raise error

            caches[2].store = refuse
            with pytest.raises(error):
                model(tokens[:, 4:], caches)
            del caches[2].store
            assert [cache.length for cache in caches] == [4, 4, 4]
        assert difference(model(tokens[:, 4:], caches), expected[:, 4:]) < EXACT


def test_layers_whose_sequences_are_not_cut_alike_are_refused(models):
    model, tokens = models["v3"], token_ids(2, 9)
    for cuts in ([(0, 4)], [(1, 4)], [(0, 4), (1, 4), (2, 5)]):
        caches = model.new_caches(2, 64, "paged")
        with torch.no_grad():
            model(tokens[:, :6], caches)
            for layer, length in cuts:
                caches[layer].truncate(length, sequence=1)
            with pytest.raises(ValueError, match=r"caches hold .*\[6, 4\].* tokens"):
                model(tokens[:, 6:], caches)
        assert [cache.length for cache in caches] == [6, 6, 6]


def test_one_cache_for_all_layers_is_refused_with_how_to_make_as_many_as_are_needed(models):
    model = models["v3"]
    with pytest.raises(ValueError, match=r"got a LatentCache for 3 layers; use model\.new_caches\(batch\)"):
        model(token_ids(1, 3), new_cache(model.config))


# FP8 on the shipped model -------------------------------------------------------------------------------------------


def test_the_first_difference_of_two_texts():
    text = token_ids(3, 8)
    other = text.clone()
    other[1, 5:] += 1
    other[2, 0] += 1
    assert first_difference(text, other) == [None, 5, 0]
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(3, 7\); expected two texts"):
        first_difference(text, other[:, 1:])


@pytest.mark.parametrize(
    ("prompt", "margin"),
    [("The with statement", None), ("Lists are", None), ("def f(x):", None), ("If the", 0.05)],
)
def test_the_shipped_model_writes_the_same_from_an_fp8_cache_until_two_tokens_are_nearly_equal(prompt, margin):
    model, tokens = lab.checkpoints.load("tiny"), lab.data.ByteTokenizer().encode(prompt)[None]
    text = generate(model, tokens, 256)
    (place,) = first_difference(text, generate(model, tokens, 256, layout="latent_fp8"))
    if margin is None:
        assert place is None
    else:
        with torch.no_grad():
            first, second = model(text[:, :place])[0, -1].topk(2).values
        assert place > tokens.shape[1] and first - second < margin
