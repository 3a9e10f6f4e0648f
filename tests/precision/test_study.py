"""The records behind the pictures: neighbours and rounding against the list of all values, outliers against torch."""

import math
from fractions import Fraction

import pytest
import torch

from deepseek_lab.precision import (
    E4M3,
    FORMATS,
    Code,
    outlier_study,
    quantize_blocks,
    quantize_tensor,
    quantize_tiles,
    round_number,
    round_to,
    worst_errors,
)

SMALL = [fmt for fmt in FORMATS.values() if fmt.bits <= 16]
NUMBERS = [0.1, -0.1, 1.0625, 17.0, 464.0, 465.0, 1e5, -1e-7, 2.0**-10, 0.0, 3.3e38, math.inf, -math.inf, 5e-324]


@pytest.mark.parametrize("fmt", SMALL, ids=lambda fmt: fmt.name)
def test_the_neighbours_of_a_code_are_next_to_it_in_the_list_of_all_values(fmt):
    ordered = sorted({value for value in fmt.values() if not math.isnan(value)})
    at = {value: i for i, value in enumerate(ordered)}
    for number in range(1 << fmt.bits):
        code = Code(fmt, number)
        if code.kind == "NaN":
            assert code.neighbours == (None, None) and code.step is None
            continue
        i = at[code.value]
        assert code.neighbours == (
            ordered[i - 1] if i else None,
            ordered[i + 1] if i + 1 < len(ordered) else None,
        )


@pytest.mark.parametrize("fmt", SMALL, ids=lambda fmt: fmt.name)
def test_every_code_is_of_one_kind_and_steps_outward_by_its_step(fmt):
    codes = [Code(fmt, number) for number in range(1 << (fmt.bits - 1))]
    count = 1 << fmt.mantissa_bits
    kinds = [code.kind for code in codes]
    assert kinds[0] == "zero" and kinds[1:count] == ["subnormal"] * (count - 1)
    assert kinds[count : fmt.max_code + 1] == ["normal"] * (fmt.max_code + 1 - count)
    assert kinds[fmt.max_code + 1 :] == ["infinity"] * fmt.infinities + ["NaN"] * (count - 1 if fmt.infinities else 1)
    for code in codes[: fmt.max_code]:
        assert code.value + code.step == fmt.value(code.code + 1)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("number", NUMBERS)
def test_the_error_of_a_number_is_exact_and_a_tie_lies_in_the_middle(fmt, number):
    rounded = round_number(number, fmt)
    assert rounded.code.code == fmt.code(number)
    if not math.isfinite(number) or math.isinf(rounded.code.value):
        assert not rounded.tie and (rounded.error == 0) == (number == rounded.code.value)
        return
    assert rounded.error == float(Fraction(rounded.code.value) - Fraction(number))
    assert rounded.relative == (rounded.error / abs(number) if number else None)
    neighbours = [Fraction(v) for v in rounded.code.neighbours if v is not None and math.isfinite(v)]
    middles = [(Fraction(rounded.code.value) + v) / 2 for v in neighbours]
    if abs(number) <= fmt.max:
        assert rounded.tie == (Fraction(number) in middles)


def test_ties_and_what_is_no_number_are_told_apart():
    assert round_number(464.0, E4M3).tie and round_number(464.0, E4M3).code.value == 448
    assert not round_number(465.0, E4M3).tie and not round_number(1e5, "FP16").tie
    assert round_number(math.nan, "E5M2").code.kind == "NaN" and math.isnan(round_number(math.nan, "E5M2").error)
    assert round_number(math.inf, "E4M3").code.value == 448 and round_number(math.inf, "E5M2").error == 0


def test_the_largest_errors_are_half_a_step_where_the_format_is_normal():
    for fmt in FORMATS.values():
        if fmt.mantissa_bits > 10:
            continue
        where, errors = worst_errors(fmt, 0, 4, bins=1, samples=4096)
        assert where.tolist() == [2 ** (i + 0.5) for i in range(4)]
        limit = fmt.epsilon / 2
        assert ((0.9 * limit / (1 + limit) < errors) & (errors <= limit * (1 + 1e-6))).all(), fmt.name
    assert worst_errors("E4M3", -13, -11)[1].tolist() == [1.0] * 16  # below half of 2^-9 everything becomes 0
    top = worst_errors("E4M3", 10, 11, bins=1)[1].item()
    assert top == pytest.approx(1 - 448 / 2048)


def test_an_outlier_study_records_what_quantize_does():
    x = torch.randn(130, 300, generator=torch.Generator().manual_seed(7))
    study = outlier_study(x, sizes=(2.0, 5e4), places=((3, 299), (129, 0)))
    typical = x.square().mean().sqrt()
    ways = {"tensor": quantize_tensor, "128 x 128 block": quantize_blocks, "1 x 128 tile": quantize_tiles}
    assert (study.shape, study.typical) == ((130, 300), pytest.approx(typical.item()))
    assert list(study.records) == [(s, p) for s in (2.0, 5e4) for p in ((3, 299), (129, 0))]
    for (size, place), records in study.records.items():
        changed = x.clone()
        changed[place] = size * study.typical
        others = torch.ones_like(x, dtype=bool)
        others[place] = False
        for way, quantize in ways.items():
            scaled, record = quantize(changed), records[way]
            wrong = (scaled.dequantize() - changed) * others
            assert record.error == pytest.approx((wrong[others].norm() / changed[others].norm()).item())
            assert record.zeros == ((scaled.codes.float() == 0) & (changed != 0) & others).sum()
            assert record.nbytes == scaled.nbytes
            assert record.tile_errors.shape == (130, 3)
            row = wrong[5, 256:].norm() / x[5, 256:].norm()
            assert record.tile_errors[5, 2].item() == pytest.approx(row.item(), rel=1e-5)


def test_an_outlier_spoils_its_tensor_then_its_block_then_its_tile():
    study = outlier_study()
    assert study.places == ((102, 204), (0, 0), (255, 511))
    for place in study.places:
        tensor, block, tile = study.errors(place).values()
        assert tensor[-1] > 0.9 > 2 * block[-1] > 10 * tile[-1]
        assert max(tensor[0], block[0], tile[0]) < 0.03
    assert study.errors() == study.errors(study.places[0])
    spoilt = {way: (r.tile_errors > 0.3).sum().item() for way, r in study.records[1e6, (102, 204)].items()}
    assert spoilt == {"tensor": 1024, "128 x 128 block": 128, "1 x 128 tile": 1}


def test_other_scales_and_formats_are_passed_on():
    plain, powers = outlier_study(sizes=(10.0,)), outlier_study(sizes=(10.0,), scale="ue8m0")
    wide = outlier_study(sizes=(10.0,), fmt="E5M2")
    assert wide.errors()["tensor"][0] > 1.8 * plain.errors()["tensor"][0]
    assert powers.errors() != plain.errors()


def test_what_cannot_be_studied_is_refused():
    with pytest.raises(ValueError, match=r"got shape \(4,\); expected a matrix"):
        outlier_study(torch.ones(4))
    with pytest.raises(ValueError, match=r"got shape \(0, 4\)"):
        outlier_study(torch.ones(0, 4))
    with pytest.raises(ValueError, match="only zeros"):
        outlier_study(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"place \(2, 0\) is outside a matrix of 2 x 4"):
        outlier_study(torch.ones(2, 4), places=((2, 0),))
    with pytest.raises(ValueError, match="NaN or infinity among its values"):
        outlier_study(torch.full((2, 4), math.nan))
    for size in (math.inf, math.nan, 1e300):
        with pytest.raises(ValueError, match="times 1 is no finite number in float32"):
            outlier_study(torch.ones(2, 4), sizes=(2.0, size), nonfinite="pass")
    with pytest.raises(ValueError, match="got no sizes"):
        outlier_study(torch.ones(2, 4), sizes=())
    with pytest.raises(ValueError, match=r"no outlier at \(1, 1\); it has \(0, 1\)"):
        outlier_study(torch.ones(2, 4), places=((0, 1),)).errors((1, 1))
    alone = outlier_study(torch.ones(1, 1), sizes=(3.0,))
    assert alone.errors()["tensor"] == [0.0]


@pytest.mark.parametrize("typical", [1e-12, 1e-25, 1e-40])
def test_what_is_lost_altogether_is_an_error_of_one(typical):
    """Below 1e-4 scales stop to follow the largest value, and all the others become 0."""
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(3)) * typical
    study = outlier_study(x, sizes=(1e3,))
    assert study.typical == pytest.approx(x.double().square().mean().sqrt().item())
    for place in study.places:
        assert study.errors(place) == {way: [1.0] for way in ("tensor", "128 x 128 block", "1 x 128 tile")}
    record = study.records[1e3, (0, 0)]["tensor"]
    assert record.zeros == (x != 0).sum() - 1 and (record.tile_errors == 1).all()


def test_places_may_come_as_lists_and_from_a_generator():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    study = outlier_study(x, sizes=(3.0,), places=([i, 2 * i] for i in range(2)))
    assert study.places == ((0, 0), (1, 2)) and study.errors([1, 2]) == study.errors((1, 2))


def test_the_nearest_value_is_one_of_all_values():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 30
    assert [round_number(v, E4M3).code.value for v in x.tolist()] == round_to(x, E4M3).tolist()
