"""Pictures of runs with other arithmetic show every value of every run under its name."""

import matplotlib.pyplot as plt
import pytest

from deepseek_lab import plots


def test_curves_begin_at_their_first_step_and_carry_their_names():
    curves = {"FP32": [3.0, 2.5, 2.0], "FP8": [3.1, 2.6, 2.0]}
    ax = plots.run_curves(curves, first=7, ylabel="loss")
    assert [line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else list(line.get_xdata())
            for line in ax.lines] == [[7, 8, 9]] * 2  # fmt: skip
    assert [list(line.get_ydata()) for line in ax.lines] == list(curves.values())
    assert {text.get_text() for text in ax.texts} == set(curves)
    heights = sorted(text.xy[1] for text in ax.texts)
    low, high = ax.get_ylim()
    assert heights[1] - heights[0] >= 0.07 * (high - low)  # both end at 2: the names stand apart
    plt.close(ax.figure)


def test_a_bound_is_a_band_around_zero_in_per_cent():
    ax = plots.run_curves({"FP8": [0.001, -0.002]}, first=0, ylabel="gap", bound=0.0025)
    band = ax.patches[0]
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((-0.0025, 0.0025))
    assert ax.get_ylim()[1] == -ax.get_ylim()[0] > 0.003  # the edges of the band are seen
    assert ax.yaxis.get_major_formatter()(0.001, 0) == "+0.10 %"
    plt.close(ax.figure)


def test_token_errors_are_drawn_from_the_smallest_with_the_share_reached():
    ax = plots.token_errors({"tile": [0.04, 0.01, 0.02, 0.03], "tensor": [1.0, 0.1, 0.2, 0.3]})
    assert list(ax.lines[0].get_xdata()) == [0.01, 0.02, 0.03, 0.04]
    assert list(ax.lines[0].get_ydata()) == [25, 50, 75, 100]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["tile", "tensor"]
    plt.close(ax.figure)


@pytest.mark.parametrize("draw", [lambda c: plots.run_curves(c, 0, "loss"), plots.token_errors])
def test_what_cannot_be_drawn_is_refused(draw):
    with pytest.raises(ValueError, match="got 0 r"):
        draw({})
    with pytest.raises(ValueError, match="give 1 to 5"):
        draw({str(n): [1.0] for n in range(6)})
    with pytest.raises(ValueError, match=r"curves of \[1, 2\] values"):
        draw({"a": [1.0], "b": [1.0, 2.0]})
    assert not plt.get_fignums()
