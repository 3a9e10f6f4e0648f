"""What each setting of a recipe does to a step, written out by hand beside it."""

import copy
import dataclasses
import math

import pytest
import references
import torch
import torch.nn.functional as F
from training_runs import DENSE, SMALL, TEXT, batches, fresh

from deepseek_lab import accounting
from deepseek_lab.model import apply_policy, multi_token_logits, multi_token_loss
from deepseek_lab.precision import Fp8Linear, PrecisionPolicy
from deepseek_lab.training import Recipe, averaged, evaluate, make_optimizer, next_token_loss, train
from deepseek_lab.training.optimizer import NarrowAdamW

pytestmark = pytest.mark.usefixtures("one_thread")  # sums of several threads are not the same twice

AHEAD = SMALL.replace(num_nextn_predict_layers=2)
TIED = DENSE.replace(model_type="qwen2", tie_word_embeddings=True)
V2 = SMALL.replace(
    topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False, n_group=2, topk_group=1
)
RECIPE = Recipe(steps=6, learning_rate=5e-3, final_learning_rate=5e-4, warmup_steps=2)


def recipe(**settings) -> Recipe:
    return dataclasses.replace(RECIPE, **settings)


def state(model) -> dict:
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients_of(model, settings, step: int = 0) -> dict:
    """The unclipped gradients of the first step of a run, as the optimiser sees them, and its record."""
    seen = {}
    hooks = [p.register_post_accumulate_grad_hook(lambda p, n=n: seen.update({n: p.grad.clone()}))
             for n, p in model.named_parameters()]  # fmt: skip
    record = next(train(model, batches(), settings))
    for hook in hooks:
        hook.remove()
    return seen, record


# Batch and schedules -----------------------------------------------------------------------------------------------


def test_a_batch_ramp_reads_the_first_sequences_of_each_batch_and_no_more():
    settings, read = recipe(batch_ramp=(1, 4)), []
    model = fresh(SMALL)
    model.embed_tokens.register_forward_pre_hook(lambda _m, inputs: read.append(inputs[0].clone()))
    records = list(train(model, batches(batch=5), settings))
    assert [len(tokens) for tokens in read] == [1, 2, 3, 4, 5, 5]
    assert all(torch.equal(tokens, batches(batch=5)[step][: len(tokens), :-1]) for step, tokens in enumerate(read))
    assert [r.tokens for r in records] == [24 * len(tokens) for tokens in read]
    assert [r.load.sum().item() for r in records] == [2 * r.tokens for r in records]
    assert records[0].flops * 5 == records[4].flops


def test_a_ramp_that_begins_above_the_batch_is_refused():
    model = fresh(SMALL)
    before = state(model)
    with pytest.raises(ValueError, match=r"batch_ramp=\(5, 3\), but a whole batch has 4 sequences"):
        next(train(model, batches(), recipe(batch_ramp=(5, 3))))
    assert equal(state(model), before)
    assert next(train(model, batches(), recipe(batch_ramp=(4, 3)))).tokens == 4 * 24


def test_every_step_takes_the_rate_and_the_bias_speed_of_its_schedule():
    settings = recipe(tail=((4, 1e-3), (5, 1e-4)), balance_speed=((0, 0.02), (2, 0.005), (4, 0.0)))
    model, bias = fresh(SMALL), torch.zeros(1, 8)
    speeds = [0.02, 0.02, 0.005, 0.005, 0.0, 0.0]
    for record, speed in zip(train(model, batches(), settings), speeds, strict=True):
        load = record.load.double()
        bias = bias + speed * torch.sign(load.mean(1, keepdim=True) - load).float()
        torch.testing.assert_close(record.bias, bias)
        assert record.learning_rate == settings.learning_rate_at(record.step)


def test_the_optimiser_is_given_the_rate_of_the_step(monkeypatch):
    seen, settings = [], recipe(tail=((4, 1e-3), (5, 1e-4)))
    original = torch.optim.AdamW.step

    def listen(self, *rest):
        seen.append([group["lr"] for group in self.param_groups])
        return original(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", listen)
    list(train(fresh(SMALL), batches(), settings))
    assert seen == [2 * [settings.learning_rate_at(step)] for step in range(6)]
    assert len({rates[0] for rates in seen}) > 3


@pytest.mark.parametrize("weight", [0.3, 1.5])
@pytest.mark.parametrize("modules", [1, 2])
def test_the_modules_losses_are_weighted_in_the_gradient(weight, modules):
    config = SMALL.replace(num_nextn_predict_layers=modules)
    model = references.fill(fresh(config))
    by_hand = copy.deepcopy(model)
    got, record = gradients_of(model, recipe(multi_token_weight=weight))
    main, further = multi_token_loss(by_hand, batches()[0])
    (main + weight / modules * sum(further)).backward()
    assert record.loss == main.item() and record.multi_token_losses == tuple(loss.item() for loss in further)
    assert len(set(record.multi_token_losses) | {record.loss}) == modules + 1
    for name, p in by_hand.named_parameters():
        assert torch.equal(got[name], p.grad), name
    by_hand.zero_grad()
    next_token_loss(by_hand, batches()[0]).backward()  # what it would be without the modules
    assert (
        references.difference(got["layers.0.mlp.down_proj.weight"], by_hand.layers[0].mlp.down_proj.weight.grad) > 0.01
    )


def test_the_recorded_losses_are_cross_entropies_by_the_number_of_all_tokens():
    model, batch = references.fill(fresh(AHEAD)), batches()[0]
    with torch.no_grad():
        logits = multi_token_logits(model, batch[:, :-1])
    record = next(train(model, batches(), recipe()))
    for depth, loss in enumerate(record.multi_token_losses, start=1):
        chances = logits[depth].double().softmax(-1).gather(2, batch[:, 1 + depth :, None]).log()
        assert loss == pytest.approx(-chances.sum().item() / (4 * 24), rel=1e-5)


def test_modules_of_weight_zero_are_left_alone_and_cost_nothing():
    model, plain = fresh(AHEAD), fresh(SMALL)
    before = state(model.multi_token)
    records = list(train(model, batches(), recipe(multi_token_weight=0.0)))
    theirs = list(train(plain, batches(), recipe()))
    assert [r.loss for r in records] == [r.loss for r in theirs]
    assert all(r.multi_token_losses == () and r.load.shape == (1, 8) for r in records)
    assert [r.flops for r in records] == [r.flops for r in theirs]
    assert equal(state(model.multi_token), before)


def test_a_schedule_switches_the_modules_on_and_off():
    model = fresh(AHEAD)
    before = state(model.multi_token)
    settings = recipe(multi_token_weight=((0, 0.0), (2, 0.3), (4, 0.0)))
    for record in train(model, batches(), settings):
        assert bool(record.multi_token_losses) == (record.step in (2, 3))
        moved = not equal(state(model.multi_token), before)
        assert moved == (record.step in (2, 3)), record.step
        before = state(model.multi_token)


def test_loads_and_biases_of_modules_come_last():
    model, chosen = references.fill(fresh(AHEAD)), []
    for layer in model.expert_layers(multi_token=True):
        layer.gate.register_forward_hook(lambda _g, _x, routing: chosen.append(routing.experts.flatten()))
    record = next(train(model, batches(), recipe(balance_speed=0.02)))
    assert [c.numel() for c in chosen] == [4 * (24 - depth) * 2 for depth in range(3)]
    assert torch.equal(record.load, torch.stack([torch.bincount(c, minlength=8) for c in chosen]))
    live = [layer.gate.e_score_correction_bias for layer in model.expert_layers(multi_token=True)]
    assert torch.equal(record.bias, torch.stack(live)) and len(live) == 3


# Moments and the mean of the weights -------------------------------------------------------------------------------


def test_narrow_moments_are_torchs_rounded_after_every_step():
    torch.manual_seed(3)
    shapes = [(37, 19), (64, 8), (23,), (5, 3, 4)]
    wide = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    narrow = [torch.nn.Parameter(p.detach().clone()) for p in wide]

    def groups(ps):
        return [{"params": ps[:2], "weight_decay": 0.1}, {"params": ps[2:], "weight_decay": 0.0}]

    made = [kind(groups(ps), lr=1e-2, betas=(0.8, 0.97), fused=True)
            for kind, ps in ((torch.optim.AdamW, wide), (NarrowAdamW, narrow))]  # fmt: skip
    exact = [torch.nn.Parameter(p.detach().clone()) for p in wide]
    unrounded = torch.optim.AdamW(exact, lr=1e-2, betas=(0.8, 0.97), weight_decay=0.1)
    for step in range(20):
        for a, b, c in zip(wide, narrow, exact, strict=True):
            a.grad = torch.randn(a.shape) * 10.0 ** (step % 5 - 3)
            b.grad, c.grad = a.grad.clone(), a.grad.clone()
        for optimizer in (*made, unrounded):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        for p in wide:
            for kind in ("exp_avg", "exp_avg_sq"):
                made[0].state[p][kind].copy_(made[0].state[p][kind].bfloat16())
        for a, b in zip(wide, narrow, strict=True):
            assert torch.equal(a, b)
            for kind in ("exp_avg", "exp_avg_sq"):
                assert made[1].state[b][kind].dtype == torch.bfloat16
                assert torch.equal(made[0].state[a][kind], made[1].state[b][kind].float())
    assert not torch.equal(exact[0], narrow[0])  # rounding is seen


@pytest.mark.parametrize("config", [SMALL, AHEAD, TIED], ids=["v3", "modules", "tied"])
def test_narrow_moments_take_half_the_bytes(config):
    sizes = [next(train(fresh(config), batches(), recipe(moments=m))).bytes for m in ("fp32", "bf16")]
    assert sizes[0]["moments"] == 2 * sizes[1]["moments"] == 2 * sizes[0]["gradients"]
    assert all(sizes[0][part] == sizes[1][part] for part in ("weights", "gradients"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_models_of_other_dtypes_train_with_either_moments(moments, dtype, tmp_path):
    model = fresh(SMALL).to(dtype)
    settings, file = recipe(moments=moments, steps=30, ema_decay=0.99), tmp_path / "run.safetensors"
    run = train(model, batches(), settings, checkpoint=file)
    first = [next(run) for _ in range(15)]
    run.close()
    again = fresh(SMALL, seed=9).to(dtype)
    rest = list(train(again, batches(), settings, checkpoint=file, resume=True))
    whole = fresh(SMALL).to(dtype)
    assert [r.loss for r in first + rest] == [r.loss for r in train(whole, batches(), settings)]
    assert rest[-1].loss < first[0].loss - 0.5
    assert equal(again.average, whole.average)
    assert {mean.dtype for mean in again.average.values()} == {torch.promote_types(dtype, torch.float32)}
    if moments == "bf16" or dtype == torch.bfloat16:
        assert first[0].bytes["moments"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["v3", "tied"])
def test_the_mean_of_the_weights_is_the_one_computed_by_hand(config):
    model, mean = fresh(config), None
    for record in train(model, batches(), recipe(ema_decay=0.8)):
        now = {name: p.detach().double() for name, p in model.named_parameters()}
        mean = now if mean is None else {name: 0.8 * mean[name] + 0.2 * now[name] for name in now}
        assert record.bytes["average"] == 4 * sum(p.numel() for p in model.parameters())
    assert model.average.keys() == mean.keys()
    for name, value in mean.items():
        torch.testing.assert_close(model.average[name].double(), value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(model.average[name].double(), now[name])


@pytest.mark.parametrize("config", [SMALL, TIED, AHEAD], ids=["v3", "tied", "modules"])
def test_a_model_has_its_mean_weights_until_the_block_ends(config):
    model = fresh(config)
    list(train(model, batches(), recipe(ema_decay=0.8)))
    before, mean = state(model), {name: t.clone() for name, t in model.average.items()}
    with averaged(model) as lent:
        assert lent is model
        assert equal({name: p.detach() for name, p in model.named_parameters()}, mean)
        assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())
        within = evaluate(model, TEXT, 24)
    assert equal(state(model), before) and equal(model.average, mean)
    assert within != evaluate(model, TEXT, 24)
    with pytest.raises(KeyboardInterrupt), averaged(model):
        raise KeyboardInterrupt
    assert equal(state(model), before)
    del model.average["norm.weight"]  # fails in the middle of lending
    with pytest.raises(KeyError), averaged(model):
        pass
    assert equal(state(model), before)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_without_a_mean_says_how_to_get_one(trained):
    model = fresh(SMALL)
    if trained:
        list(train(model, batches(), recipe(ema_decay=0.9)))
        list(train(model, batches(), recipe()))  # the mean of another run is none of this one
    with (
        pytest.raises(ValueError, match=r"no running mean of its weights; train it with Recipe\(ema_decay"),
        averaged(model),
    ):
        pass


# Precision, recomputation, validation, counting --------------------------------------------------------------------


POLICIES = [PrecisionPolicy(), PrecisionPolicy(products="bf16", wide=("gate",)), PrecisionPolicy(gradients="block")]


@pytest.mark.parametrize("policy", POLICIES, ids=["v3", "bf16", "blocks"])
def test_a_policy_in_the_recipe_is_apply_policy_by_hand(policy):
    runs = []
    for where in ("recipe", "hand", "nowhere"):
        model = references.fill(fresh(AHEAD))
        if where == "hand":
            apply_policy(model, policy)
        settings = recipe(precision=policy) if where == "recipe" else recipe()
        runs.append(([r.loss for r in train(model, batches(), settings)], state(model)))
    assert runs[0][0] == runs[1][0] and equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_none_leaves_the_arithmetic_and_fp32_undoes_it():
    model = apply_policy(fresh(SMALL), PrecisionPolicy())
    next(train(model, batches(), recipe()))
    assert isinstance(model.layers[0].mlp.down_proj, Fp8Linear)
    next(train(model, batches(), recipe(precision=PrecisionPolicy(products="fp32"))))
    assert type(model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("policy", [None, PrecisionPolicy()], ids=["fp32", "fp8"])
@pytest.mark.parametrize("config", [AHEAD, V2, TIED], ids=["modules", "v2", "tied"])
def test_recomputation_changes_no_bit_of_a_run(config, policy):
    names, runs = ("norms", "swiglu", "up-projections"), []
    balance = dict(sequence_loss=0.1) if config.num_moe_layers else {}
    for recompute in (None, names, ()):
        model = references.fill(fresh(config))
        records = list(train(model, batches(), recipe(recompute=recompute, precision=policy, **balance)))
        assert model.recompute == frozenset(recompute or ())
        runs.append(([(r.loss, r.balance_loss, r.gradient_norm) for r in records], state(model)))
    assert runs[0][0] == runs[1][0] == runs[2][0]
    assert equal(runs[0][1], runs[1][1])


def test_none_leaves_what_is_recomputed_and_an_empty_set_ends_it():
    model = fresh(SMALL)
    model.recompute = {"norms"}
    next(train(model, batches(), recipe()))
    assert model.recompute == {"norms"}
    next(train(model, batches(), recipe(recompute=())))
    assert not model.recompute


@pytest.mark.parametrize("policy", [None, PrecisionPolicy()], ids=["fp32", "fp8"])
def test_records_hold_the_loss_on_other_text_where_it_was_asked_for(policy):
    model, found = fresh(SMALL), {}
    text = TEXT[:500].roll(11)
    for record in train(model, batches(), recipe(precision=policy), validation=text, validate_every=4):
        if record.validation_loss is not None:
            found[record.step] = record.validation_loss
            assert record.validation_loss == evaluate(model, text, 24)
    assert sorted(found) == [3, 5] and found[3] != found[5]
    plain = [r.loss for r in train(fresh(SMALL), batches(), recipe(precision=policy))]
    validated = train(fresh(SMALL), batches(), recipe(precision=policy), validation=text, validate_every=1)
    assert [r.loss for r in validated] == plain  # looking changes nothing


@pytest.mark.parametrize("weight", [0.3, 0.0])
@pytest.mark.parametrize("config", [AHEAD, V2, DENSE, TIED], ids=["modules", "v2", "dense", "tied"])
def test_flops_are_those_of_the_account(config, weight):
    settings = recipe(multi_token_weight=weight, recompute=("norms", "swiglu"))  # what is done twice counts once
    record = next(train(fresh(config), batches(), settings))
    ahead = weight > 0 and config.num_nextn_predict_layers > 0
    assert record.flops == 4 * 24 * accounting.training_flops(config, 24, with_mtp=ahead).total
    matrices = sum(p.numel() for p in fresh(config).parameters())
    assert 6 * 96 * matrices * 0.2 < record.flops < 6 * 96 * matrices * 2
    assert record.mfu(1e9) == pytest.approx(record.flops / record.seconds / 1e9)
    assert math.isclose(dataclasses.replace(record, flops=6e9, seconds=2.0).mfu(12e9), 0.25)


def test_optimisers_of_a_recipe_know_its_constants():
    for moments, kind in (("fp32", torch.optim.AdamW), ("bf16", NarrowAdamW)):
        optimizer = make_optimizer(fresh(AHEAD), recipe(moments=moments, betas=(0.5, 0.6), weight_decay=0.3))
        assert type(optimizer) is kind
        assert [(g["betas"], g["weight_decay"]) for g in optimizer.param_groups] == [
            ((0.5, 0.6), 0.3),
            ((0.5, 0.6), 0.0),
        ]


def test_the_loss_is_the_mean_of_the_next_tokens_with_modules_too():
    model, batch = references.fill(fresh(AHEAD)), batches()[0]
    expected = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).item()
    assert next(train(model, batches(), recipe())).loss == pytest.approx(expected, rel=1e-6)
