"""A ledger adds up exactly, finds its entries, refuses nonsense and shows itself safely."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from deepseek_lab.accounting import Ledger, Line, parameters
from deepseek_lab.accounting.ledger import grow
from deepseek_lab.presets import PRESETS


def small():
    return grow("memory", [
        ("weights/experts", Line("experts", 2**60 + 1, "bytes", "a × b", ("hidden_size",), "a report")),
        ("weights/norms", Line("norms", 3, "bytes")),
        ("cache", Line("cache", 70_272, "bytes", "61 layers × 576 × 2 bytes")),
    ])  # fmt: skip


def test_integers_of_any_size_add_up_exactly():
    assert small().total == 2**60 + 1 + 3 + 70_272
    assert isinstance(small().total, int)


def test_rows_are_the_lines_and_add_up_to_the_total():
    rows = small().rows()
    assert [row["path"] for row in rows] == ["weights/experts", "weights/norms", "cache"]
    assert sum(row["amount"] for row in rows) == small().total
    assert rows[0]["keys"] == ("hidden_size",)


def test_an_entry_is_found_by_its_path():
    assert small()["weights/norms"].amount == 3
    assert small()["weights"].total == 2**60 + 4
    assert "cache" in small() and "weights/cache" not in small()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("caches", "'memory' has no entry 'caches'; it has: weights, cache"),
        ("weights/norm", "'weights' has no entry 'norm'; it has: experts, norms"),
        ("cache/latent", "'cache' has no entry 'latent'; it has: nothing below it"),
    ],
)
def test_a_wrong_path_is_answered_with_what_is_there(path, message):
    with pytest.raises(KeyError) as error:
        small()[path]
    assert error.value.args[0] == message


def test_different_units_are_not_added():
    with pytest.raises(ValueError, match="'a' in bytes and 'b' in GPU-hours; a ledger adds one unit"):
        Ledger("bill", (Line("a", 1, "bytes"), Line("b", 1, "GPU-hours")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ledger("empty", ()), "has no lines"),
        (lambda: Ledger("twice", (Line("a", 1, "bytes"), Line("a", 2, "bytes"))), "two entries called a"),
        (lambda: Line("a/b", 1, "bytes"), "without '/'"),
        (lambda: Line("", 1, "bytes"), "cannot name an entry"),
        (lambda: Line("a", float("nan"), "bytes"), "not a finite number"),
        (lambda: Line("a", True, "bytes"), "not a finite number"),
        (lambda: Line("a", 1, ""), "has no unit"),
    ],
)
def test_nonsense_is_refused_with_a_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lines_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small()["cache"].amount = 1


def test_the_printed_table_is_aligned_and_says_each_amount_twice():
    table = str(parameters(PRESETS["deepseek-v3"])).splitlines()
    column = table[0].index("formula")
    assert table[1].split() == ["parameters,", "total", "671,026,419,200", "671.0", "B"]
    routed = next(row for row in table if "routed experts" in row)
    assert routed[column:] == "58 layers × 256 experts × 3 matrices × 2,048 × 7,168"
    assert all(row[column - 1] == " " for row in table[:-1] if len(row) > column)
    assert max(map(len, table)) <= 120


def test_the_html_table_is_well_formed_and_every_number_opens():
    ledger = parameters(PRESETS["deepseek-v3"])
    table = ElementTree.fromstring(ledger._repr_html_().replace("<br>", "<br/>"))
    opened = table.findall(".//details")
    assert len(opened) == len(ledger.rows())
    text = "".join(opened[-1].itertext())
    assert text == ("926,679,040formula: 129,280 × 7,168config keys: vocab_size, hidden_size"
                    "source: DeepSeek-V3 report (arXiv 2412.19437)")  # fmt: skip


def test_html_in_names_and_sources_is_shown_and_not_obeyed():
    line = Line("<script>", 1, "bytes", "a < b", ("<i>",), "<img src=x onerror=alert(1)>")
    page = Ledger("<b>bold", (line,), note="<u>note</u>")._repr_html_()
    assert "<script>" not in page and "<img" not in page and "<b>bold" not in page and "<u>" not in page
    assert "&lt;script&gt;" in page and "a &lt; b" in page
