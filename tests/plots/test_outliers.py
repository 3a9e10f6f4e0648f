"""Pictures of outliers show the records of the study: errors, zeros, bytes, and the tiles that are spoilt."""

import itertools

import pytest
import torch
from matplotlib.colors import to_rgba

from deepseek_lab import plots
from deepseek_lab.plots.outliers import HEIGHT, SHADES, outlier_sheet
from deepseek_lab.plots.sheet import WIDTH, Words
from deepseek_lab.plots.style import PALETTE
from deepseek_lab.precision import outlier_study

STUDY = outlier_study()
PLACE = STUDY.places[0]


def spoilt(sheet, way):
    return [box for box in sheet.shapes if box.kind == "spoilt" and box.name.startswith(way)]


@pytest.mark.parametrize("size", STUDY.sizes)
def test_the_picture_says_the_numbers_of_the_records(size):
    sheet = outlier_sheet(STUDY, size, PLACE)
    results = [s.text for s in sheet.shapes if s.kind == "result"]
    expected = []
    for way, record in STUDY.records[size, PLACE].items():
        expected += [f"error {100 * record.error:.3g} %", f"{record.zeros:,} became 0", f"{record.nbytes:,} bytes"]
        assert f"per {way}: error {100 * record.error:.3g} %, {record.zeros:,} zeros" in sheet.label
    assert results == expected and sheet.height == HEIGHT


def test_the_shaded_tiles_are_those_of_the_records():
    levels = sorted(SHADES)
    for size in (1e4, 1e5, 3e5, 1e6):
        sheet = outlier_sheet(STUDY, size, PLACE)
        for way, record in STUDY.records[size, PLACE].items():
            shown = torch.zeros(record.tile_errors.shape)
            for box in spoilt(sheet, way):
                start, end, tile = map(int, box.name.removeprefix(way).split())
                shown[start:end, tile] = list(SHADES.values()).index(box.fill)
            edges = torch.tensor(levels[1:], dtype=torch.float64)
            wanted = torch.bucketize(record.tile_errors.double(), edges, right=True)
            assert shown.long().equal(wanted)


def test_the_ring_stands_at_the_outlier_of_every_map():
    for place in STUDY.places:
        rings = [line for line in outlier_sheet(STUDY, 1e5, place).shapes if line.kind == "outlier"]
        centres = [sum(x for x, _ in ring.points[:16]) / 16 for ring in rings]
        width = (place[1] + 0.5) / 512 * 172
        assert centres == pytest.approx([14 + width, 204 + width, 394 + width])


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (300, 5), (128, 128)])
def test_any_matrix_has_a_picture_with_its_words_inside(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    study = outlier_study(x)
    for place in study.places:
        sheet = outlier_sheet(study, 1e6, place)
        for text in (s for s in sheet.shapes if isinstance(s, Words)):
            assert text.x + len(text.text) * 7.2 < WIDTH + 6, text.text
        for box in spoilt(sheet, ""):
            assert box.y >= 74 and box.y + box.height <= 74 + 130.01 and box.x + box.width <= 394 + 172.01


def test_the_static_twin_begins_at_the_first_place_and_refuses_what_is_not_in_the_study():
    texts = [t.get_text() for t in plots.outlier_explorer(STUDY).texts]
    assert "one value of 100,000 times the typical size, at row 102, column 204" in texts
    with pytest.raises(
        ValueError, match=r"no outlier of size 7 at \(102, 204\) in this study; it has sizes 1, 10, 100"
    ):
        plots.outlier_explorer(STUDY, 7)


def test_the_curves_are_the_errors_with_names_that_do_not_touch():
    errors = {"tensor": [0.02, 0.9], "block": [0.02, 0.021], "tile": [0.02, 0.0205]}
    ax = plots.error_against_outlier([1, 1e6], errors)
    assert [line.get_ydata().tolist() for line in ax.lines] == list(errors.values())
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [f"10{n}" for n in "⁰¹²³⁴⁵⁶"]
    ax.figure.canvas.draw()
    boxes = sorted((t.get_window_extent() for t in ax.texts), key=lambda box: box.y0)
    assert [t.get_text() for t in ax.texts] == list(errors)
    assert all(a.y1 <= b.y0 + 4 for a, b in itertools.pairwise(boxes))
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"got {count} curves"):
            plots.error_against_outlier([1], {str(i): [0.1] for i in range(count)})


def test_each_cell_of_a_product_is_128_long_in_the_direction_that_is_summed():
    """In the drawing 128 numbers are a quarter of a matrix: the shaded cell spans it along the arrow."""
    for ax in plots.shared_scales():
        shaded = [p for p in ax.patches if p.get_facecolor() == to_rgba(PALETTE["weights"])]
        arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
        assert len(shaded) == len(arrows) == 2
        for cell, arrow in zip(shaded, arrows, strict=True):
            along_rows = arrow.xy[1] == arrow.xyann[1]
            assert (cell.get_width() if along_rows else cell.get_height()) == 0.25
