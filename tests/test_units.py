"""Numbers as text: the unit fits the size, and GiB and GB stay apart."""

import math

import pytest

from deepseek_lab import facts
from deepseek_lab.units import (
    GB,
    GIB,
    byte_unit,
    format_bytes,
    format_count,
    format_dollars,
    format_flops,
    format_seconds,
)


@pytest.mark.parametrize(
    ("amount", "binary", "decimal"),
    [
        (0, "0 bytes", "0 bytes"),
        (1, "1 byte", "1 byte"),
        (656, "656 bytes", "656 bytes"),
        (70_272, "68.6 KiB", "70.3 KB"),
        (80 * GB, "74.5 GiB", "80.0 GB"),
        (673_150_611_808, "626.9 GiB", "673.2 GB"),
        (1_342_052_868_096, "1.2 TiB", "1.3 TB"),
        (-3 * GIB, "-3.0 GiB", "-3.2 GB"),
    ],
)
def test_bytes_are_written_in_the_family_that_was_asked_for(amount, binary, decimal):
    assert format_bytes(amount) == binary
    assert format_bytes(amount, "GB") == decimal


def test_a_number_that_rounds_up_to_the_next_unit_is_written_in_it():
    assert format_bytes(GIB - 1) == "1.0 GiB"
    assert format_bytes(GB - 1, "GB") == "1.0 GB"
    assert format_count(999_999) == "1.0 M"
    assert (format_count(999.94), format_count(999.95)) == ("999.9", "1.0 K")
    assert (format_flops(999_949), format_flops(999_950)) == ("999.9 KFLOP", "1.0 MFLOP")
    assert (format_bytes(1023.94), format_bytes(1023.95)) == ("1,023.9 bytes", "1.0 KiB")
    assert (format_dollars(999.994), format_dollars(999.995)) == ("$999.99", "$1,000")
    assert (format_dollars(999_999.4), format_dollars(999_999.5)) == ("$999,999", "$1.000 M")


def test_no_digits_do_not_promote_a_number_to_a_unit_that_it_has_not_reached():
    assert format_bytes(640 * GB, "GB", digits=0) == "640 GB"


def test_one_unit_can_be_kept_for_texts_that_stand_together():
    assert format_bytes(1_342_052_868_096, unit="GiB") == "1,249.9 GiB"
    with pytest.raises(ValueError, match="GB' is not in the GiB family"):
        format_bytes(1, unit="GB")


def test_an_unknown_family_is_refused_with_the_two_that_exist():
    with pytest.raises(ValueError, match=r"family='MB' is unknown; choose 'GiB' .* or 'GB'"):
        format_bytes(1, "MB")


def test_an_axis_takes_the_largest_unit_that_it_reaches_twice():
    assert byte_unit(3 * GIB) == ("GiB", GIB)
    assert byte_unit(1.5 * GIB) == ("MiB", 2**20)
    assert byte_unit(0) == ("bytes", 1)


def test_counts_and_operations_are_in_thousands():
    assert format_count(671_026_419_200) == "671.0 B"
    assert format_count(14.8e12) == "14.8 T"
    assert format_count(256) == "256"
    assert format_flops(250_456_000_000) == "250.5 GFLOP"
    assert format_flops(3.707e24, 2) == "3.71 YFLOP"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (120.96e-6, "121.0 µs"),
        (0.01476, "14.8 ms"),
        (19.926, "19.9 s"),
        (59.97, "1 min 0 s"),
        (200, "3 min 20 s"),
        (-200, "-3 min 20 s"),
        (5.5 * 3600, "5.5 h"),
        (54.25 * 86_400, "54.2 days"),
        (1e-3, "1.0 ms"),
        (1e-6, "1.0 µs"),
        (999.95e-6, "1.0 ms"),
        (999.94e-6, "999.9 µs"),
        (59.94, "59.9 s"),
        (3599.4, "59 min 59 s"),
        (3599.7, "1.0 h"),
        (47.94 * 3600, "47.9 h"),
        (47.96 * 3600, "2.0 days"),
    ],
)
def test_durations_are_said_in_the_unit_one_would_use(seconds, text):
    assert format_seconds(seconds) == text


def test_a_duration_is_rounded_before_its_unit_is_chosen_whatever_the_digits():
    assert (format_seconds(59.7, 0), format_seconds(59.97, 2)) == ("1 min 0 s", "59.97 s")


def test_dollars_keep_cents_while_cents_matter():
    amounts = [0.27, 2, 87_072, 5_576_000, -12.5]
    assert [format_dollars(x) for x in amounts] == ["$0.27", "$2.00", "$87,072", "$5.576 M", "-$12.50"]


@pytest.mark.parametrize("write", [format_bytes, format_count, format_flops, format_seconds, format_dollars])
@pytest.mark.parametrize("amount", [math.nan, math.inf])
def test_what_is_not_a_number_has_no_text(write, amount):
    with pytest.raises(ValueError, match="not a finite number"):
        write(amount)


def published():
    named = {name: value for name, value in vars(facts).items() if isinstance(value, facts.Fact)}
    return named | facts.GPU_MEMORY


def test_every_fact_has_a_unit_and_a_source():
    assert len(published()) > 40
    for name, fact in published().items():
        assert fact.unit and fact.source, name


def test_a_fact_without_a_source_is_refused():
    with pytest.raises(ValueError, match="needs a source"):
        facts.fact(1, "bytes", "")
    with pytest.raises(ValueError, match="not a number"):
        facts.fact("2.0", "$/GPU-hour", "table 1")


def test_the_published_figures_agree_with_each_other():
    hours = (
        facts.V3_PRETRAINING_HOURS.value + facts.V3_CONTEXT_EXTENSION_HOURS.value + facts.V3_POST_TRAINING_HOURS.value
    )
    assert hours == facts.V3_TRAINING_HOURS.value
    assert hours * facts.H800_RENT.value == facts.V3_TRAINING_COST.value
    tokens = facts.V3_TRAINING_TOKENS.value
    assert facts.V3_HOURS_PER_TRILLION_TOKENS.value * tokens == facts.V3_PRETRAINING_HOURS.value * 10**12
    by_dtype = facts.V3_CHECKPOINT_FP8, facts.V3_CHECKPOINT_BF16, facts.V3_CHECKPOINT_FP32
    assert sum(fact.value for fact in by_dtype) == facts.V3_CHECKPOINT_ELEMENTS.value
    sizes = zip(by_dtype, (1, 2, 4), strict=True)
    assert sum(fact.value * size for fact, size in sizes) == facts.V3_CHECKPOINT_BYTES.value
