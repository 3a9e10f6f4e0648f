"""The outlier explorer shows the record of the size and place that are chosen."""

import xml.etree.ElementTree as ElementTree

import torch

from deepseek_lab.plots.outliers import outlier_sheet
from deepseek_lab.precision import outlier_study
from deepseek_lab.widgets import outlier_explorer


def test_it_begins_at_a_telling_size_and_follows_its_controls():
    study, seen = outlier_study(), []
    widget = outlier_explorer(study)
    assert widget.summary() == outlier_sheet(study, 100_000, study.places[0]).label
    widget.picture.observe(lambda event: seen.append(event["new"]), names="value")
    widget.controls["size"].value = 1e6
    widget.controls["place"].value = (255, 511)
    assert ElementTree.fromstring(seen[-1]).get("aria-label") == widget.summary()
    assert widget.summary() == outlier_sheet(study, 1e6, (255, 511)).label and len(seen) == 2


def test_a_study_of_other_values_has_its_own_sizes_and_places():
    study = outlier_study(torch.ones(4, 200), sizes=(200_000.0, 300_000.0), places=((1, 2),))
    widget = outlier_explorer(study)
    assert [text for text, _ in widget.controls["size"].options] == ["200,000 x typical", "300,000 x typical"]
    assert widget.controls["place"].label == "row 1, column 2"
    assert widget.summary() == outlier_sheet(study, 200_000, (1, 2)).label


def test_controls_are_labelled_and_the_bundle_has_a_picture_and_a_line():
    widget = outlier_explorer()
    assert [c.description for c in widget.controls.values()] == ["outlier", "place"]
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == widget.summary() and bundle["image/png"].startswith(b"\x89PNG")
