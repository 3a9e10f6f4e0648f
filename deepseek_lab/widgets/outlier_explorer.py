"""What one outlier costs the rest of a matrix: its size and place over one picture."""

from __future__ import annotations

from ipywidgets import Dropdown, SelectionSlider

from deepseek_lab.plots.outliers import outlier_sheet
from deepseek_lab.precision import OutlierStudy, outlier_study

from .base import PictureWidget, choice


def outlier_explorer(study: OutlierStudy | None = None) -> PictureWidget:
    """Return a widget on an `OutlierStudy`: choose the size and place of an outlier, see which tiles it spoils.

    study: from `precision.outlier_study(x)`, for example of real activations; its default unless told. It begins with
    the largest size up to 100,000 times the typical value.
    """
    study = outlier_study() if study is None else study
    first = max((size for size in study.sizes if size <= 100_000), default=study.sizes[0])
    sizes = [(f"{size:,.10g} x typical", size) for size in study.sizes]
    places = [(f"row {row}, column {column}", (row, column)) for row, column in study.places]
    controls = {
        "size": choice(SelectionSlider, "outlier", sizes, first, 340, 50),
        "place": choice(Dropdown, "place", places, study.places[0], 230, 44),
    }
    return PictureWidget(
        "outlier-explorer", controls, lambda size, place: outlier_sheet(study, size, place), readout=130
    )
