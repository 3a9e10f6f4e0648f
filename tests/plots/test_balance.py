"""The balance theatre's picture: bars are loads and biases as they were, cut ones say so, every curve is a MaxVio."""

import itertools

import pytest
import torch
from matplotlib import pyplot as plt

from deepseek_lab import plots
from deepseek_lab.experts.balance import LoadHistory
from deepseek_lab.plots.balance import BIASES, CURVE, LEFT, LOADS, RIGHT, TOP, theatre_sheet
from deepseek_lab.plots.sheet import WIDTH, Box, Words


def history(seed, steps=40, layers=2, experts=16, bias=1.0):
    random = torch.Generator().manual_seed(seed)
    loads = torch.randint(0, 60, (steps, layers, experts), generator=random)
    loads[:, :, 3] += 900 // (torch.arange(steps)[:, None] + 1)  # one favourite, less and less
    loads[:, :, 5] = 0
    return LoadHistory(loads, bias * torch.randn(steps, layers, experts, generator=random))


HISTORIES = {"speed 0.001": history(0), "no bias": history(1, bias=0.0), "third": history(2, bias=1e-4)}


def named(sheet, kind):
    return [shape for shape in sheet.shapes if shape.kind == kind]


@pytest.mark.parametrize(("run", "step", "layer"), [("speed 0.001", 0, 0), ("no bias", 39, 1), ("third", 20, 1)])
def test_bars_are_loads_in_fair_shares_cut_at_the_top(run, step, layer):
    sheet = theatre_sheet(HISTORIES, run, step, layer)
    load = HISTORIES[run].loads[step, layer].double()
    shares = (load / load.mean()).tolist()
    bars = {int(box.name): box for box in named(sheet, "load")}
    pixel = (LOADS[1] - LOADS[0]) / TOP
    for expert, share in enumerate(shares):
        assert bars[expert].height == pytest.approx(min(share, TOP) * pixel)
    assert sorted(w.text for w in named(sheet, "beyond")) == sorted(f"{s:.0f}" for s in shares if s > TOP)
    assert [i for i, bar in bars.items() if bar.edge != "none"] == [load.argmax().item()]
    fair = named(sheet, "fair")[0].points[0][1]
    assert fair == pytest.approx(LOADS[1] - pixel)


def test_bars_of_the_bias_stand_out_from_their_mean_on_the_scale_of_their_run():
    sheet = theatre_sheet(HISTORIES, "third", 7, 1)
    all_of_it = HISTORIES["third"].biases[:, 1].double()
    ways = all_of_it - all_of_it.mean(-1, keepdim=True)
    zero = (BIASES[0] + BIASES[1]) / 2
    bars = [
        (zero - box.y if bias > 0 else -box.height) for box, bias in zip(named(sheet, "bias"), ways[7], strict=True)
    ]
    ratios = [bar / bias for bar, bias in zip(bars, ways[7].tolist(), strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 16, rel=1e-3) and ratios[0] > 0
    assert max(abs(b) for b in ways.flatten().tolist()) * ratios[0] <= (BIASES[1] - BIASES[0]) / 2 + 1e-6


def test_a_run_without_bias_says_so_and_has_no_scale():
    sheet = theatre_sheet(HISTORIES, "no bias", 3, 0)
    assert "bias: always 0 in this run" in [s.text for s in sheet.shapes if isinstance(s, Words)]
    assert {box.height for box in named(sheet, "bias")} == {0}
    assert sheet.label.endswith("every bias is 0")


def test_every_run_has_its_curve_and_the_marker_stands_on_the_chosen_one():
    sheet = theatre_sheet(HISTORIES, "speed 0.001", 10, 1)
    assert [line.name for line in named(sheet, "other")] == ["no bias", "third"]
    curve, marker = named(sheet, "curve")[0].points, named(sheet, "marked")[0].points
    way = HISTORIES["speed 0.001"].max_violation[:, 1].tolist()
    assert len(curve) == 40 and curve[0][0] == LEFT and curve[-1][0] == RIGHT
    ratios = [(CURVE[1] - y) / value for (_, y), value in zip(curve, way, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 40)
    middle = (marker[0][0] + marker[2][0]) / 2, marker[0][1]
    assert middle == pytest.approx(curve[10])
    assert named(sheet, "violation")[0].text == f"{way[10]:.2f}"


def test_the_label_says_what_the_picture_shows():
    past = HISTORIES["third"]
    sheet = theatre_sheet(HISTORIES, "third", 0, 1)
    assert sheet.label.startswith(
        f"third, step 0: MaxVio {past.max_violation[0, 1]:.2f}, {past.dead[0, 1]} of 16 experts without a token. "
        f"Expert 3 got {past.max_violation[0, 1] + 1:.2f} times its fair share; biases from \N{MINUS SIGN}"
    )
    assert sheet.detail == "tokens of each expert: " + ", ".join(map(str, past.loads[0, 1].tolist()))


@pytest.mark.parametrize("experts", [8, 16, 32, 64])
def test_every_moment_has_one_size_and_nothing_is_clipped(experts):
    plots.use_style()
    runs = {"no balancing at all": history(3, 300, 1, experts, 0.0), "speed 0.0001": history(4, 300, 1, experts, 5.7)}
    heights = set()
    for run, step in itertools.product(runs, (0, 150, 299)):
        heights.add(theatre_sheet(runs, run, step, 0).height)
        ax = plots.balance_theatre(runs, run, step)
        ax.figure.canvas.draw()
        frame = ax.figure.bbox
        for text in ax.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, text
        beyond = sorted(w.x for w in named(theatre_sheet(runs, run, step, 0), "beyond"))
        assert all(b - a >= 15 for a, b in itertools.pairwise(beyond))
        plt.close("all")
    assert len(heights) == 1


def test_the_twin_has_the_boxes_of_the_sheet():
    ax = plots.balance_theatre(HISTORIES)
    sheet = theatre_sheet(HISTORIES, "speed 0.001", 39, 0)
    boxes = [(b.x, b.y, b.width, b.height) for b in sheet.shapes if isinstance(b, Box) and b.kind == "load"]
    patches = [p for p in ax.patches if p.get_label().startswith("load")]
    assert [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in patches] == boxes
    assert ax.get_xlim() == (0, WIDTH)


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="got no histories"):
        plots.balance_theatre({})
    with pytest.raises(ValueError, match=r"there is no run 'fast'; choose one of speed 0\.001, no bias, third"):
        plots.balance_theatre(HISTORIES, "fast")
    with pytest.raises(ValueError, match="step=40 is not in this history; choose 0 to 39"):
        plots.balance_theatre(HISTORIES, step=40)
    with pytest.raises(ValueError, match="layer=2 is not among the 2 expert layers"):
        plots.balance_theatre(HISTORIES, layer=2)
    with pytest.raises(ValueError, match="give runs of the same steps, layers and experts"):
        plots.balance_theatre({"a": history(0), "b": history(0, steps=39)})
