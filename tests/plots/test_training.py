"""Pictures of a run show its records: losses step by step, and the share of tokens of each expert."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from deepseek_lab import plots
from deepseek_lab.training import Recipe


def records(steps: int):
    generator = torch.Generator().manual_seed(3)
    loads = torch.randint(1, 50, (steps, 2, 4), generator=generator)
    losses = torch.rand(steps, generator=generator).tolist()
    return [SimpleNamespace(step=s, loss=losses[s], load=loads[s]) for s in range(steps)]


def test_the_loss_curve_shows_every_loss_and_a_running_mean():
    run = records(120)
    ax = plots.loss_curve(run, marks={0: 0.9, 119: 0.4})
    raw, smooth, dots = ax.lines
    losses = [r.loss for r in run]
    assert raw.get_ydata().tolist() == losses
    assert smooth.get_ydata()[60] == pytest.approx(np.mean(losses[57:61]))  # three before it and itself
    assert smooth.get_ydata()[0] == losses[0]
    assert (dots.get_xdata().tolist(), dots.get_ydata().tolist()) == ([0, 119], [0.9, 0.4])
    assert ax.get_ylabel() == "loss (nats per token)"
    plt.close(ax.figure)


def test_the_load_map_shows_shares_of_one_layer_with_steps_across_and_experts_down():
    run = records(7)
    ax = plots.load_map(run, layer=1)
    image = ax.images[0]
    shares = np.array([[n / sum(r.load[1].tolist()) for n in r.load[1].tolist()] for r in run]).T
    np.testing.assert_allclose(image.get_array(), shares)
    assert tuple(image.get_extent()) == (-0.5, 6.5, 3.5, -0.5)
    assert image.get_clim() == (0, 0.75)  # three times the fair share of four experts
    plt.close(ax.figure)


def test_a_run_without_records_has_no_picture():
    for draw in (plots.loss_curve, plots.load_map):
        with pytest.raises(ValueError, match=f"{draw.__name__} got no records"):
            draw([])
    assert not plt.get_fignums()


def test_a_load_map_of_experts_that_are_not_there_is_refused():
    dense = [SimpleNamespace(step=0, loss=1.0, load=torch.zeros(0, 0))]
    with pytest.raises(ValueError, match="records of a dense model"):
        plots.load_map(dense)
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"layer={layer} is not one of the 2 expert layers; choose 0 to 1"):
            plots.load_map(records(3), layer)
    assert not plt.get_fignums()


def test_schedules_have_a_row_for_each_setting_and_a_column_for_each_run():
    short = Recipe(
        steps=10, learning_rate=2e-3, final_learning_rate=1e-3, warmup_steps=2, constant_steps=3, tail=((8, 5e-4),),
        batch_ramp=(1, 4), balance_speed=((0, 0.02), (9, 0.0)), multi_token_weight=((0, 0.3), (6, 0.1)),
    )  # fmt: skip
    axes = plots.schedules({"short": (short, 5, 16), "plain": (Recipe(steps=3, multi_token_weight=0.0), 2, 8)})
    assert axes.shape == (4, 2) and [ax.get_title("left") for ax in axes[0]] == ["short", "plain"]
    sizes = [short.batch_at(step, 5) for step in range(10)]
    assert sizes[0] == 1 and sizes[4:] == [5] * 6
    wanted = [short.learning_rate_at, sizes.__getitem__, short.balance_speed_at, short.multi_token_weight_at]
    for ax, value_at in zip(axes[:, 0], wanted, strict=True):
        (line,) = ax.lines
        assert line.get_ydata().tolist() == [value_at(step) for step in range(10)]
        assert line.get_xdata().tolist() == (16 * np.cumsum(sizes)).tolist()
    assert axes[3, 1].lines[0].get_ydata().tolist() == [0.0] * 3
    axes[0, 0].figure.canvas.draw()
    assert [tick.get_text() for tick in axes[0, 0].get_yticklabels()] == ["0", "5.0e-4", "0.002"]
    assert axes[3, 0].get_xlabel() == "tokens read" and not axes[0, 0].get_xlabel()
    plt.close("all")


def test_the_schedule_of_a_long_run_is_drawn_from_a_few_of_its_steps_and_from_its_last():
    long = Recipe(steps=100_001, balance_speed=((0, 0.01), (100_000, 0.0)))
    values = plots.schedules({"long": (long, 1, 1)})[2, 0].lines[0].get_ydata()
    assert len(values) < 2_500 and values[-1] == 0 and values[-2] == 0.01
    plt.close("all")


def test_schedules_of_no_run_are_refused():
    with pytest.raises(ValueError, match="schedules got no runs"):
        plots.schedules({})
    assert not plt.get_fignums()
