"""What a step does to the model and what its record says about it."""

import dataclasses
import math

import pytest
import references
import torch
import torch.nn.functional as F
from training_runs import DENSE, SMALL, TEXT, batches, fresh

from deepseek_lab.experts import balance
from deepseek_lab.training import Recipe, evaluate, train
from deepseek_lab.training.loop import next_token_loss
from deepseek_lab.training.optimizer import make_optimizer

RECIPE = Recipe(steps=60, learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=5)


@pytest.fixture(scope="module", params=["v3", "llama"])
def run(request):
    """(model after sixty steps, its records)"""
    model = fresh(SMALL if request.param == "v3" else DENSE)
    return model, list(train(model, batches(), RECIPE))


def test_losses_fall_from_the_uniform_guess(run):
    model, records = run
    assert records[0].loss == pytest.approx(math.log(260), abs=0.15)
    assert sum(r.loss for r in records[-5:]) / 5 < 0.6 * records[0].loss
    assert evaluate(model, TEXT, length=24) < 0.6 * records[0].loss
    assert not model.training


def test_records_tell_step_rate_and_tokens(run):
    _, records = run
    assert [r.step for r in records] == list(range(60))
    assert all(r.learning_rate == RECIPE.learning_rate_at(r.step) for r in records)
    assert all(r.tokens == 4 * 24 and r.seconds > 0 for r in records)
    assert all(r.tokens_per_second == r.tokens / r.seconds for r in records)
    assert all(math.isfinite(r.gradient_norm) and r.gradient_norm > 0 for r in records)
    with pytest.raises(dataclasses.FrozenInstanceError):
        records[0].loss = 0.0


def test_loads_sum_to_tokens_times_choices_in_every_layer(run):
    model, records = run
    layers = model.config.num_moe_layers
    for record in records:
        assert record.load.shape == ((layers, 8) if layers else (0, 0))
        assert record.load.sum(1).tolist() == layers * [4 * 24 * 2]
        worst = max((balance.max_violation(row) for row in record.load), default=0.0)
        assert record.max_violation == worst


def test_recorded_bytes_are_those_of_the_live_tensors(run):
    model, records = run
    optimizer = make_optimizer(model, RECIPE)
    next_token_loss(model, batches()[0]).backward()
    optimizer.step()
    weights = sum(t.nbytes for t in model.state_dict().values())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    moments = sum(optimizer.state[p][kind].nbytes for p in model.parameters() for kind in ("exp_avg", "exp_avg_sq"))
    model.zero_grad()
    values = sum(p.numel() for p in model.parameters())
    assert gradients == 4 * values and moments == 8 * values
    assert all(r.bytes == dict(weights=weights, gradients=gradients, moments=moments) for r in records)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, batch = fresh(SMALL), batches()[3]
    with torch.no_grad():
        chances = model(batch[:, :-1]).double().softmax(-1)
        expected = -chances.gather(2, batch[:, 1:, None]).log().mean()
        assert next_token_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_reads_every_whole_stretch_once_and_changes_nothing():
    model = fresh(SMALL).train()
    tokens = TEXT[: 7 * 24 + 1 + 5]  # five tokens too many for an eighth stretch
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        losses = [next_token_loss(model, tokens[None, i * 24 : (i + 1) * 24 + 1].long()).item() for i in range(7)]
    for batch in (1, 3, 16):
        assert evaluate(model, tokens, length=24, batch=batch) == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"evaluate got tokens of shape \(24,\); .* length \+ 1 = 25"):
        evaluate(model, tokens[:24], length=24)


def test_one_step_is_adamw_on_clipped_gradients():
    recipe = Recipe(steps=1, learning_rate=1e-2, warmup_steps=0, clip_norm=0.05, balance_speed=0.0)
    model, by_hand = fresh(SMALL), fresh(SMALL)
    record = next(train(model, batches(), recipe))
    batch = batches()[0]
    F.cross_entropy(by_hand(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
    assert record.gradient_norm == pytest.approx(norm.item(), rel=1e-5) and norm > 0.05
    for (name, got), start in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        g = start.grad * (0.05 / (norm + 1e-6))
        # At step one the corrected moments are g and g^2; decay acts on matrices only.
        moved = start.detach() * (1 - 1e-2 * (0.1 if start.dim() > 1 else 0.0)) - 1e-2 * g / (g.abs() + 1e-8)
        assert (got.detach() - moved).abs().max() < 2e-5, name
    assert all(p.grad is None for p in model.parameters())


def test_decay_spares_the_norms():
    groups = make_optimizer(fresh(SMALL), RECIPE).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.dim() for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(fresh(SMALL).parameters()))


def test_the_bias_follows_the_load_of_the_step_and_no_gradient():
    model = fresh(SMALL)
    before = model.expert_layers()[0].gate.e_score_correction_bias.clone()
    record = next(train(model, batches(), dataclasses.replace(RECIPE, balance_speed=0.01)))
    after = model.expert_layers()[0].gate.e_score_correction_bias
    expected = before + 0.01 * torch.sign(record.load[0].float().mean() - record.load[0])
    torch.testing.assert_close(after, expected)


def test_balancing_lowers_the_worst_violation():
    worst = {}
    for speed in (0.0, 0.01):
        model = references.fill(fresh(SMALL), seed=4)
        for layer in model.expert_layers():
            layer.gate.e_score_correction_bias.zero_()
        records = list(
            train(model, batches(batch=8), dataclasses.replace(RECIPE, learning_rate=3e-3, balance_speed=speed))
        )
        worst[speed] = sum(r.max_violation for r in records[-10:]) / 10
    assert worst[0.01] < 0.6 * worst[0.0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_no_number_stops_the_run_before_it_spreads(where, tmp_path):
    model = fresh(SMALL)
    run, file = train(model, batches(), RECIPE, checkpoint=tmp_path / "run.safetensors"), tmp_path / "run.safetensors"
    for _ in range(3):
        next(run)
    if where == "loss":
        hook = model.lm_head.register_forward_hook(lambda *_: torch.full((4, 24, 260), float("nan")))
    else:
        hook = model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"of step 3 is (nan|inf): the (output|gradient) of \S+ is .*; the weights are left as they were",
    ):
        next(run)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    hook.remove()
    again = fresh(SMALL, seed=9)
    records = list(train(again, batches(), RECIPE, checkpoint=file, resume=True))
    assert records[0].step == 3 and all(math.isfinite(r.loss) for r in records)
