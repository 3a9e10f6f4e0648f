"""The training replay: bars are loads, the marker stands at the step, the sample is as written, one size always."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from deepseek_lab.experts import balance
from deepseek_lab.plots.replay import BOTTOM, LOSS_LEFT, LOSS_RIGHT, TOP, at_step, replay_sheet
from deepseek_lab.training import StepRecord
from deepseek_lab.widgets import training_replay
from deepseek_lab.widgets.sheet_svg import sheet_svg

SVG = "{http://www.w3.org/2000/svg}"


def run(steps=60, layers=3, experts=16):
    random = torch.Generator().manual_seed(0)
    for step in range(steps):
        load = torch.randint(1, 200, (layers, experts), generator=random) + 40 * torch.arange(experts) // (step + 1)
        loss = 1.5 + 4.1 * 0.95**step + 0.1 * torch.rand((), generator=random).item()
        yield StepRecord(step, loss, 3e-3, 1.0, 1024, 0.1, load, {})


RECORDS = list(run())
SAMPLES = {
    0: "The \x00\x1b\ufffd<script>alert(1)</script>&amp;",
    20: "The with\n\n    indented = 'line'\n\tand a tab",
    60: "The statement is used to wrap the execution of a block with methods defined by a context manager. " * 3,
}
LOSSES = {0: 5.61, 20: 2.97}


def drawn(records=RECORDS, step=20, layer=0, losses=LOSSES, samples=SAMPLES):
    return ElementTree.fromstring(sheet_svg(replay_sheet(records, samples, losses, step, layer)))


def named(svg, kind):
    return [element for element in svg.iter() if element.get("class") == kind]


def words(svg, kind=None):
    return ["".join(t.itertext()) for t in svg.iter(f"{SVG}text") if kind in (None, t.get("class"))]


@pytest.mark.parametrize(("step", "layer"), [(0, 0), (20, 1), (60, 2)])
def test_bars_are_as_high_as_the_loads_and_the_line_stands_at_the_mean(step, layer):
    svg, load = drawn(step=step, layer=layer), at_step(RECORDS, step).load[layer].double()
    bars = named(svg, "load")
    heights = torch.tensor([float(bar.get("height")) for bar in bars]).double()
    fair = BOTTOM - float(named(svg, "fair")[0].get("d")[1:].split()[1])
    assert (heights / fair).tolist() == pytest.approx((load / load.mean()).tolist(), abs=2e-3)
    (busiest,) = (int(bar.get("data-name")) for bar in bars if bar.get("stroke"))
    assert busiest == load.argmax()
    assert f"MaxVio {balance.max_violation(load):.2f}, expert {busiest} got" in words(svg, "balance")[0]
    assert f"load of expert layer {layer + 1} of 3" in words(svg)


def test_the_scale_of_the_loads_is_one_for_all_moments():
    fair = {named(drawn(step=step, layer=layer), "fair")[0].get("d") for step in SAMPLES for layer in range(3)}
    assert len(fair) == 1


@pytest.mark.parametrize("step", SAMPLES)
def test_the_marker_stands_at_the_step_with_its_loss(step):
    svg = drawn(step=step)
    x = float(named(svg, "moment")[0].get("d")[1:].split()[0])
    assert x == pytest.approx(LOSS_LEFT + step / 60 * (LOSS_RIGHT - LOSS_LEFT), abs=0.01)
    kind, loss = ("held-out", LOSSES[step]) if step in LOSSES else ("training", RECORDS[-1].loss)
    assert words(svg, "loss") == [f"{loss:.2f}"]
    assert words(svg, "headline") == [f"step {step}: {kind} loss {loss:.2f} nats per token"]


def test_the_curve_runs_through_the_smoothed_losses_and_dots_are_the_held_out_ones():
    svg = drawn()
    points = [tuple(map(float, p.split())) for p in named(svg, "curve")[0].get("d")[1:].split(" L")]
    assert len(points) == 60
    smooth = [RECORDS[0].loss] + [(a.loss + b.loss) / 2 for a, b in itertools.pairwise(RECORDS)]
    pixels = (BOTTOM - TOP) / 6
    assert [BOTTOM - y for _, y in points] == pytest.approx([loss * pixels for loss in smooth], abs=0.02)
    assert [dot.get("data-name") for dot in named(svg, "held-out")] == ["0", "20"]
    assert named(drawn(losses=None), "held-out") == [] and "held-out text" not in words(drawn(losses=None))


def test_a_long_run_is_drawn_with_few_points():
    records = list(run(2000, layers=1))
    svg = drawn(records, step=1999, losses=None, samples={0: "a", 1999: "b"})
    assert len(named(svg, "curve")[0].get("d").split("L")) <= 241


def test_a_sample_is_escaped_keeps_its_lines_and_has_no_control_characters():
    markup = sheet_svg(replay_sheet(RECORDS, SAMPLES, LOSSES, 0))
    assert "<script>" not in markup and "&lt;script&gt;" in markup and "\x1b" not in markup
    assert words(drawn(step=0), "sample") == ["The \ufffd\ufffd\ufffd<script>alert(1)</script>&amp;"]
    assert words(drawn(step=20), "sample") == ["The with", "", "    indented = 'line'", "    and a tab"]
    lines = words(drawn(step=60), "sample")
    assert max(map(len, lines)) <= 64 and "".join(lines) == SAMPLES[60]


def test_a_sample_that_is_too_long_ends_in_an_ellipsis():
    lines = words(drawn(step=0, samples={0: "a line\n" * 20}), "sample")
    assert len(lines) == 8 and lines[-1].endswith("…")


def test_the_whole_sample_is_in_the_description_and_its_beginning_in_the_summary():
    svg = drawn(step=60)
    assert svg.get("role") == "img"
    assert svg.find(f"{SVG}desc").text == SAMPLES[60]
    load = RECORDS[-1].load[0].double()
    busiest, ratio = load.argmax().item(), (load.max() / load.mean()).item()
    assert svg.get("aria-label") == (
        f"step 60: training loss {RECORDS[-1].loss:.2f} nats per token. Expert layer 1 of 3: MaxVio {ratio - 1:.2f}, "
        f"expert {busiest} got {ratio:.2f} times its fair share. "
        "The model wrote: The statement is used to wrap the execution of a block with…"
    )


@pytest.mark.parametrize("experts", [8, 16, 64])
def test_every_moment_has_one_size_and_its_words_inside(experts):
    records = list(run(experts=experts))
    for step in SAMPLES:
        svg = drawn(records, step=step)
        assert (svg.get("viewBox"), svg.get("width"), svg.get("height")) == ("0 0 580 436", "580", "436")
        assert svg.find(f"{SVG}rect").get("fill") == "#fff" and svg.get("fill") == "#111111"
        assert [float(box.get("height")) for box in named(svg, "frame")] == [156]
        for text in svg.iter(f"{SVG}text"):
            wide = (
                len("".join(text.itertext())) * float(text.get("font-size")) * (0.6 if text.get("font-family") else 0.5)
            )
            start = float(text.get("x")) - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
            assert start > -4 and start + wide < 584, text.text
        assert max(float(text.get("y")) for text in named(svg, "sample")) < 56 + 156
        numbers = [float(text.get("x")) for text in named(svg, "number")]
        assert all(b - a > 12 for a, b in itertools.pairwise(numbers))


def test_a_model_without_experts_is_replayed_without_loads():
    records = list(run(layers=0))
    svg = drawn(records)
    assert named(svg, "load") == [] and "this model has no experts" in words(svg)
    assert "MaxVio" not in svg.get("aria-label")
    assert training_replay(records, SAMPLES).controls["layer"].disabled


def test_the_widget_starts_at_the_last_sample_and_redraws_once():
    widget, seen = training_replay(RECORDS, SAMPLES, LOSSES), []
    assert list(widget.controls) == ["step", "layer"]
    assert [c.description for c in widget.controls.values()] == ["step", "expert layer"]
    assert widget.controls["step"].value == 60 and widget.controls["layer"].label == "1 of 3"
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["step"].value = 20
    widget.controls["layer"].value = 2
    assert len(seen) == 2
    assert ElementTree.fromstring(seen[-1]).get("aria-label") == widget.summary()
    assert widget.summary() == replay_sheet(RECORDS, SAMPLES, LOSSES, 20, 2).label


def test_without_a_kernel_the_widget_is_a_picture_and_a_line():
    widget = training_replay(RECORDS, SAMPLES, LOSSES, step=20)
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and "\n" not in widget.summary()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "closest('.training-replay')" in widget.children[-1].value


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="no sample of step 7; choose one of 0, 20, 60"):
        training_replay(RECORDS, SAMPLES, step=7)
    with pytest.raises(ValueError, match="layer=3 is not among the 3 expert layers"):
        training_replay(RECORDS, SAMPLES, layer=3)
    with pytest.raises(ValueError, match="got 60 records and 0 samples"):
        training_replay(RECORDS, {})
