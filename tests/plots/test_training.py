"""Pictures of a run show its records: losses step by step, and the share of tokens of each expert."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from deepseek_lab import plots


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
