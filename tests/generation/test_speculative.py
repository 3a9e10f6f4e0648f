"""Drafting changes how fast a text is written and nothing else: not a token, a probability or a cached number."""

import dataclasses
import itertools

import pytest
import references
import torch
from references import difference, token_ids

import deepseek_lab as lab
from deepseek_lab.generation import Speculation, generate, speculate
from deepseek_lab.generation.speculative import _Drawn
from deepseek_lab.generation.step import CompiledStep, ModelStep
from deepseek_lab.model import Transformer, multi_token_loss, weighted_loss

SMALL = lab.PRESETS["tiny"].replace(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=4, max_position_embeddings=128,
                                    num_nextn_predict_layers=1)  # fmt: skip
LAYOUTS = ["latent", "latent_fp8", "expanded", "paged"]


@pytest.fixture(scope="module", params=["reference", "numba"])
def kernels(request):
    """Every test here runs with and without compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_KERNELS", request.param)
        yield request.param


def filled(config=SMALL, seed: int = 0) -> Transformer:
    return references.fill(Transformer(config), seed).eval()


@torch.no_grad()
def successor(step: int, config=SMALL) -> Transformer:
    """A model in which token 5t + 1 follows token t, and whose modules draft the one that follows `step` times."""
    model = filled(config)
    d, vocabulary = config.hidden_size, config.vocab_size
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj", "eh_proj.weight")):
            parameter.zero_()  # layers leave x as it is
        if name.rpartition(".")[0].endswith("norm"):
            parameter.fill_(1.0)
    rows = torch.nn.functional.normalize(torch.randn(vocabulary, d, generator=torch.Generator().manual_seed(1)), dim=1)
    model.embed_tokens.weight.copy_(rows)
    follows = (5 * torch.arange(vocabulary) + 1) % vocabulary
    model.lm_head.weight[follows] = rows
    for module in model.multi_token:
        half = 0 if step == 1 else d  # the embedding of the token just seen, or the state of the one before
        module.eh_proj.weight[:, half : half + d] = torch.eye(d)
    return model


@pytest.fixture(scope="module")
def trained(kernels) -> Transformer:
    """Trained until drafts are often right and often wrong."""
    torch.manual_seed(0)
    model = Transformer(SMALL.replace(num_nextn_predict_layers=2))
    text = lab.data.ByteTokenizer().encode("the model says that the module says the same, and so they say. ") % 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        starts = torch.randint(len(text), (4,), generator=generator)
        main, further = multi_token_loss(model, torch.stack([text.repeat(3)[s : s + 65] for s in starts]).long())
        weighted_loss(main, further, 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def check_records(result: Speculation, prompt: int, depth: int) -> None:
    """Every token behind the first is written by one step, and the counts are those of the steps."""
    text = result.tokens[0].tolist()
    assert list(itertools.chain(*(step.written for step in result.steps))) == text[prompt + 1 :]
    place = prompt + 1
    for step in result.steps:
        assert step.place == place and len(step.drafted) <= depth
        assert step.drafted[: step.accepted] == step.written[:-1]
        assert len(step.odds) == min(step.accepted + 1, len(step.drafted))
        place += len(step.written)
    assert place == len(text)
    assert result.drafted == sum(len(step.drafted) for step in result.steps)
    assert result.accepted == sum(step.accepted for step in result.steps)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_greedy_text_is_that_of_plain_decoding(kernels, layout, depth):
    for seed in range(4):
        model, tokens = filled(SMALL.replace(num_nextn_predict_layers=depth), seed), token_ids(1, 1 + 3 * seed, seed)
        result = speculate(model, tokens, 50, layout=layout)
        assert torch.equal(result.tokens, generate(model, tokens, 50, layout=layout))
        check_records(result, tokens.shape[1], depth)


@pytest.mark.parametrize("change", [
    {}, dict(q_lora_rank=None), dict(tie_word_embeddings=True), dict(rope_interleave=False),
    dict(model_type="deepseek_v2", scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False),
    dict(rope_scaling=lab.RopeScaling("yarn", 4.0, 16, 32.0, 1.0, 0.707, 1.0)), dict(kv_lora_rank=None),
    dict(n_routed_experts=None, n_shared_experts=0, num_experts_per_tok=0),
])  # fmt: skip
def test_a_greedy_text_is_that_of_plain_decoding_in_every_kind_of_model(kernels, change):
    model, tokens = filled(SMALL.replace(**change)), token_ids(1, 7)
    assert torch.equal(speculate(model, tokens, 60).tokens, generate(model, tokens, 60))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 60])
def test_a_trained_model_writes_the_same_text_with_drafts_of_both_kinds(trained, layout, count):
    for seed in range(3):
        tokens = token_ids(1, 4, seed)
        result = speculate(trained, tokens, count, layout=layout)
        assert torch.equal(result.tokens, generate(trained, tokens, count, layout=layout))
        check_records(result, 4, 2)
        if count == 60:
            assert 0.05 < result.acceptance < 1 and result.tokens_per_step > 1.1
            assert {step.accepted for step in result.steps} > {0, 2}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_module_that_is_always_right_saves_every_pass_that_can_be_saved(kernels, depth):
    model, tokens = successor(1, SMALL.replace(num_nextn_predict_layers=depth)), token_ids(1, 3)
    result = speculate(model, tokens, 1 + 10 * (depth + 1))
    assert torch.equal(result.tokens, generate(model, tokens, 1 + 10 * (depth + 1)))
    assert torch.equal(result.tokens[:, 3:], (5 * result.tokens[:, 2:-1] + 1) % 64)
    assert (result.acceptance, result.tokens_per_step, len(result.steps)) == (1.0, depth + 1, 10)


def test_a_module_that_is_always_wrong_costs_passes_and_changes_nothing(kernels):
    model, tokens = successor(0), token_ids(1, 3)
    result = speculate(model, tokens, 21)
    assert torch.equal(result.tokens, generate(model, tokens, 21))
    assert (result.acceptance, result.tokens_per_step, len(result.steps)) == (0.0, 1.0, 20)
    assert result.steps[0].odds == (0.0,) and result.steps[-1].drafted == ()  # the last token needs no draft


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_caches_hold_what_plain_decoding_leaves_in_them(trained, kernels, layout, monkeypatch):
    made, make = [], type(trained).new_caches

    def remember(self, *sizes):
        made.append(make(self, *sizes))
        return made[-1]

    monkeypatch.setattr(type(trained), "new_caches", remember)
    tokens = token_ids(1, 4, 1)
    generate(trained, tokens, 60, layout=layout)
    text = speculate(trained, tokens, 60, layout=layout).tokens
    plain, caches, own = made
    for before, after in zip(plain, caches, strict=True):
        assert before.length == after.length == text.shape[1] - 1
        for expected, got in zip(before.view(), after.view(), strict=True):
            exact = kernels == "numba" and layout == "latent"
            assert torch.equal(got, expected) if exact else difference(got, expected) < 1e-5
    # The modules' caches hold what they would, had they read the text at once: nothing of a refused draft.
    fresh = make(trained, 1, 64, layout, True)
    with torch.no_grad():
        _, states = trained.read(text[:, :-1])
        for depth, (module, cache) in enumerate(zip(trained.multi_token, fresh, strict=True), start=1):
            further, count = text[:, depth:], text.shape[1] - depth
            states = module(states[:, :count], trained.embed_tokens(further), torch.arange(count), cache)
    sound = min(cache.length for cache in own) - 2
    for expected, got in zip(fresh, own, strict=True):
        for a, b in zip(got.view(), expected.view(), strict=True):
            if layout != "latent_fp8":  # a code may be the next one where states differ by a rounding
                assert difference(a[..., :sound, :], b[..., :sound, :]) < 1e-4


# Drawn texts ----------------------------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, chances: torch.Tensor) -> float:
    """How far counts lie from chances, in standard deviations of the chi-square statistic."""
    expected = chances * counts.sum()
    kept = expected > 5
    freedom = int(kept.sum()) - 1
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_drawn_texts_have_the_models_own_distribution(temperature, top_p):
    """Three tokens of a vocabulary of five, against the product of the model's chances; drafts are of another mind."""
    config = SMALL.replace(vocab_size=5, hidden_size=16, num_hidden_layers=1, num_nextn_predict_layers=1)
    model, tokens = filled(config, 3), torch.tensor([[1, 4]])
    chances = torch.zeros(5, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        for text in itertools.product(range(5), repeat=3):
            logits = model(torch.tensor([[1, 4, *text[:2]]]))[0, 1:]
            each = lab.generation.decode.chances(logits, temperature, top_p)
            each = each / each.sum(-1, keepdim=True)
            chances[text] = each[0, text[0]] * each[1, text[1]] * each[2, text[2]]
    torch.testing.assert_close(chances.sum().item(), 1.0)
    counts, results = (
        torch.zeros(5, 5, 5),
        [speculate(model, tokens, 3, temperature, top_p, seed) for seed in range(3000)],
    )
    for result in results:
        counts[tuple(result.tokens[0, 2:].tolist())] += 1
    assert not counts[chances == 0].any()
    assert chi_square(counts, chances) < 4
    assert 0.1 < sum(r.accepted for r in results) / sum(r.drafted for r in results) < 0.95
    flat = chances.sum((0, 1))[None, None].expand(5, 5, 5) * chances.sum((1, 2))[:, None, None] / 5
    assert chi_square(counts, flat / flat.sum()) > 10  # another distribution is noticed


@pytest.mark.parametrize("wrong", ["always accept", "draw from p when refused"])
def test_the_usual_mistakes_of_rejection_are_caught_by_the_distribution(wrong):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    judge, counts, mistaken = _Drawn(1.0, 1.0, 0, torch.device("cpu")), torch.zeros(3), torch.zeros(3)
    for _ in range(6000):
        draft = judge.draft(q.log()[None])
        written, odds = judge.check(p.log().expand(2, 3), [draft])
        counts[written[0]] += 1
        assert odds == (pytest.approx(min(1.0, float(p[draft] / q[draft]))),)
        refused = len(written) == 1
        mistaken[draft if wrong == "always accept" or not refused else int(torch.multinomial(p, 1))] += 1
    assert chi_square(counts, p) < 4
    assert chi_square(mistaken, p) > 10


def test_the_share_of_accepted_drafts_is_the_overlap_of_both_distributions():
    p, q = (torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).double() * 2).softmax(-1)
    judge, accepted = _Drawn(1.0, 1.0, 1, torch.device("cpu")), 0
    for _ in range(4000):
        draft = judge.draft(q.log()[None])
        accepted += len(judge.check(p.log().expand(2, 40), [draft])[0]) - 1
    assert abs(accepted / 4000 - torch.minimum(p, q).sum().item()) < 0.03


def test_the_same_seed_draws_the_same_text_and_leaves_the_numbers_of_others_alone(trained):
    torch.manual_seed(3)
    state, tokens = torch.get_rng_state(), token_ids(1, 5)
    results = [speculate(trained, tokens, 40, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(results[0].tokens, results[1].tokens) and results[0].steps == results[1].steps
    assert not torch.equal(results[0].tokens, results[2].tokens)
    assert torch.equal(torch.get_rng_state(), state)
    check_records(results[0], 5, 2)
    assert any(0 < odds < 1 for step in results[0].steps for odds in step.odds)


def test_a_tiny_temperature_is_greedy(trained):
    tokens = token_ids(1, 5)
    greedy = speculate(trained, tokens, 30)
    assert torch.equal(speculate(trained, tokens, 30, temperature=1e-300, seed=0).tokens, greedy.tokens)
    assert torch.equal(speculate(trained, tokens, 30, temperature=1.0, top_p=1e-9, seed=0).tokens, greedy.tokens)


# Faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["read", "draft"])
def test_an_interrupted_text_leaves_the_model_ready_for_the_next(trained, kernels, place, monkeypatch):
    tokens, expected = token_ids(1, 5), speculate(trained, token_ids(1, 5), 20)
    step = CompiledStep if kernels == "numba" else ModelStep
    real, calls = getattr(step, place), []

    def interrupted(*given):
        calls.append(place)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(step, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            speculate(trained, tokens, 20)
    assert len(calls) == 4 and not torch.is_inference_mode_enabled() and not trained.training
    assert torch.equal(speculate(trained, tokens, 20).tokens, expected.tokens)


def test_the_prompt_is_left_as_it_was_and_the_record_is_plain(trained):
    tokens = token_ids(1, 5)
    before = tokens.clone()
    result = speculate(trained, tokens, 9)
    assert torch.equal(tokens, before) and torch.equal(result.tokens[:, :5], before)
    assert result.tokens.dtype == torch.int64 and not result.tokens.is_inference()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.steps[0].place = 3
    one = speculate(trained, tokens, 1)
    assert (one.steps, one.drafted, one.acceptance, one.tokens_per_step) == ((), 0, 0.0, 0.0)


def test_the_text_may_fill_the_models_positions(trained):
    tokens = token_ids(1, 100)
    assert torch.equal(speculate(trained, tokens, 28).tokens, generate(trained, tokens, 28))
    with pytest.raises(ValueError, match="max_new_tokens=29 after 100 prompt tokens"):
        speculate(trained, tokens, 29)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(tokens=token_ids(3, 4)), r"got 3 texts, each of which would accept other drafts; call it for one"),
        (dict(model=filled(SMALL.replace(num_nextn_predict_layers=0))), "num_nextn_predict_layers=0; use generate"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), r"temperature=-1\.0"),
        (dict(top_p=0.0), r"top_p=0\.0"),
        (dict(layout="grouped"), "layout='grouped' is not possible"),
        (dict(tokens=torch.tensor([[64]])), r"token 64 is outside the vocabulary 0\.\.63"),
    ],
)
def test_what_cannot_be_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        speculate(**{"model": filled(), "tokens": token_ids(1, 4), "max_new_tokens": 4, **more})


def test_a_model_whose_answers_are_no_numbers_is_refused(kernels):
    model = filled()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="logits hold nan or infinity"):
        speculate(model, token_ids(1, 4), 4)
