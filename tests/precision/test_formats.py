"""Number formats: what every code means and what every float32 becomes, beside torch and ml_dtypes."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_lab.precision import BF16, E4M3, E5M2, FORMATS, FP16, FP32, TF32, decode, encode, find_format, round_to

NAN, INF = math.nan, math.inf
TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, FP16: torch.float16, BF16: torch.bfloat16}
ML_DTYPES = {E4M3: (ml_dtypes.float8_e4m3fn, "nan"), E5M2: (ml_dtypes.float8_e5m2, "inf")}
SLICE = 1 << 20  # float32 patterns at a time: input, codes and both casts stay in the cache

# Nearest, ties to even: (number, what it becomes).
ROUNDED = {
    E4M3: [(0.1, 0.1015625), (0.3, 0.3125), (1.0625, 1.0), (1.1875, 1.25), (17.0, 16.0), (18.9, 18.0), (2.0**-10, 0.0),
           (0.00097666015625, 2.0**-9), (449.0, 448.0), (464.0, 448.0)],
    E5M2: [(0.1, 0.09375), (0.3, 0.3125), (57344.0, 57344.0), (61439.0, 57344.0), (61440.0, INF), (2.0**-17, 0.0)],
    FP16: [(0.1, 0.0999755859375), (2049.0, 2048.0), (2051.0, 2052.0), (65519.0, 65504.0), (65520.0, INF)],
    BF16: [(0.1, 0.10009765625), (257.0, 256.0), (259.0, 260.0), (3.4e38, INF)],
    TF32: [(0.1, 0.0999755859375), (2049.0, 2048.0), (2051.0, 2052.0)],
}  # fmt: skip
# E4M3 and E5M2 beyond their largest number: (format, overflow, number, what it becomes).
TOO_LARGE = [
    (E4M3, None, 465.0, 448.0), (E4M3, None, INF, 448.0), (E4M3, "saturate", -1e30, -448.0),
    (E4M3, "nan", 464.0, 448.0), (E4M3, "nan", 465.0, NAN), (E4M3, "nan", -INF, NAN),
    (E5M2, None, 61440.0, INF), (E5M2, None, -INF, -INF), (E5M2, "inf", 61439.0, 57344.0),
    (E5M2, "saturate", INF, 57344.0), (E5M2, "saturate", 1e6, 57344.0), (E5M2, "nan", 61440.0, NAN),
    (FP16, "saturate", -1e6, -65504.0), (BF16, "saturate", INF, 2.0**128 - 2.0**120),
    (FP32, "saturate", INF, 2.0**128 - 2.0**104), (FP32, None, INF, INF),
]  # fmt: skip

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
formats = st.sampled_from(list(FORMATS.values()))


def each_float32():
    """Yield all 2^32 float32 patterns in slices, always the same tensor."""
    bits = torch.arange(SLICE, dtype=torch.int32) - 2**31
    for _ in range(2**32 // SLICE):
        yield bits.view(torch.float32)
        bits += SLICE  # wraps around after the last


def same_codes(ours, theirs, fmt):
    """Whether codes are equal, any NaN counting as any other (torch's BF16 drops the sign)."""
    return not (ours != theirs).any() or not (one_nan(ours, fmt) != one_nan(theirs, fmt)).any()


def one_nan(codes, fmt):
    is_nan = (codes & fmt.nan_code) > (fmt.inf_code if fmt.infinities else fmt.max_code)
    return np.where(is_nan, fmt.nan_code, codes)


@pytest.mark.parametrize("fmt", TORCH, ids=lambda fmt: fmt.name)
def test_each_of_all_float32_patterns_becomes_the_code_that_torch_gives(fmt, one_thread):
    theirs, width = torch.empty(SLICE, dtype=TORCH[fmt]), torch.uint8 if fmt.bits == 8 else torch.uint16
    for x in each_float32():
        theirs.copy_(x)
        assert same_codes(encode(x, fmt).numpy(), theirs.view(width).numpy(), fmt), x[0].item()


@pytest.mark.parametrize("fmt", ML_DTYPES, ids=lambda fmt: fmt.name)
def test_each_of_all_float32_patterns_becomes_the_code_that_ml_dtypes_gives(fmt, one_thread):
    dtype, overflow = ML_DTYPES[fmt]
    theirs = np.empty(SLICE, dtype)
    with np.errstate(all="ignore"):  # NumPy tells of numbers that become infinite
        for x in each_float32():
            np.copyto(theirs, x.numpy(), casting="unsafe")
            assert same_codes(encode(x, fmt, overflow).numpy(), theirs.view(np.uint8), fmt), x[0].item()


@pytest.mark.parametrize("fmt", TORCH, ids=lambda fmt: fmt.name)
def test_each_code_means_what_torch_says(fmt):
    codes = torch.arange(1 << fmt.bits).to(torch.uint8 if fmt.bits == 8 else torch.uint16)
    expected = codes.view(TORCH[fmt]).float()
    torch.testing.assert_close(decode(codes, fmt), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(decode(codes, fmt).signbit(), expected.signbit())  # of -0 and NaN too


def test_tf32_is_the_upper_19_bits_of_a_float32():
    codes = torch.arange(1 << 19)
    expected = (codes << 13).to(torch.int32).view(torch.float32)
    torch.testing.assert_close(decode(codes, TF32), expected, rtol=0, atol=0, equal_nan=True)


def test_fp32_codes_are_the_bits_of_a_float32():
    x = torch.randn(1000) * 10.0 ** torch.randint(-45, 38, (1000,))
    assert torch.equal(encode(x, FP32), x.view(torch.int32).long() & 0xFFFFFFFF)
    assert torch.equal(decode(x.view(torch.int32), FP32), x)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16], ids=lambda fmt: fmt.name)
def test_one_code_and_many_have_the_same_value(fmt):
    many = decode(torch.arange(1 << fmt.bits), fmt).tolist()
    for one, other in zip(fmt.values(), many, strict=True):
        assert math.copysign(1, one) == math.copysign(1, other)
        assert one == other or (math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_one_number_and_many_have_the_same_code(fmt):
    bits = torch.randint(-(2**31), 2**31, (3000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, INF, -INF, NAN, 448.0, 464.0, 2.0**-10])])
    for overflow in ("saturate", "nan", *(["inf"] if fmt.infinities else [])):
        many = encode(x, fmt, overflow).tolist()
        assert many == [fmt.code(number, overflow) for number in x.tolist()]


@pytest.mark.parametrize("fmt", TORCH, ids=lambda fmt: fmt.name)
def test_a_format_has_the_properties_that_torch_lists(fmt):
    listed = torch.finfo(TORCH[fmt])
    assert (fmt.bits, fmt.max, -fmt.max) == (listed.bits, listed.max, listed.min)
    assert (fmt.smallest_normal, fmt.epsilon) == (listed.smallest_normal, listed.eps)
    assert fmt.smallest_subnormal == fmt.value(1) == fmt.smallest_normal * fmt.epsilon


def test_e4m3_keeps_254_codes_for_numbers_and_e5m2_248():
    e4m3, e5m2 = (np.array(fmt.values()) for fmt in (E4M3, E5M2))
    assert np.isfinite(e4m3).sum() == 254 and len(set(e4m3[np.isfinite(e4m3)])) == 253  # two zeros
    assert np.isnan(e4m3).nonzero()[0].tolist() == [127, 255]
    assert np.isfinite(e5m2).sum() == 248
    assert np.isinf(e5m2).nonzero()[0].tolist() == [124, 252]
    assert np.isnan(e5m2).nonzero()[0].tolist() == [125, 126, 127, 253, 254, 255]


def test_the_values_of_e4m3_are_those_of_the_paper():
    values = E4M3.values()
    assert values[:10] == [k * 2.0**-9 for k in range(10)]  # seven subnormals, and the step stays once more
    assert values[56:65] == [1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2.0]
    assert values[119:127] == [240.0, 256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0]
    assert values[128:] == [-value for value in values[:128]] or math.isnan(values[255])


@pytest.mark.parametrize(("fmt", "number", "rounded"), [(fmt, *case) for fmt in ROUNDED for case in ROUNDED[fmt]])
def test_a_number_becomes_the_nearest_and_of_two_the_even_one(fmt, number, rounded):
    for sign in (1, -1):
        expected = pytest.approx(sign * rounded, rel=1e-9)
        assert round_to(torch.tensor(sign * number), fmt).item() == expected
        assert fmt.value(fmt.code(sign * number)) == expected


@pytest.mark.parametrize(("fmt", "overflow", "number", "becomes"), TOO_LARGE)
def test_what_is_too_large_does_as_it_is_told(fmt, overflow, number, becomes):
    got = round_to(torch.tensor([number, 1.0]), fmt, overflow)
    torch.testing.assert_close(got, torch.tensor([becomes, 1.0]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("overflow", "says"), [("inf", "no infinity"), ("wrap", "unknown"), ("", "unknown")])
def test_an_overflow_that_cannot_be_is_refused(overflow, says):
    with pytest.raises(ValueError, match=says):
        encode(torch.ones(2), E4M3, overflow)
    with pytest.raises(ValueError, match=says):
        E4M3.code(1e9, overflow)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_nan_stays_nan_and_keeps_its_sign(fmt):
    x = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    assert round_to(x, fmt).isnan().all()
    assert encode(x, fmt).tolist() == [fmt.nan_code] * 2 + [fmt.nan_code | 1 << (fmt.bits - 1)] * 2


@given(st.lists(numbers, min_size=1, max_size=40), formats)
def test_rounding_twice_changes_nothing_more(values, fmt):
    once = round_to(torch.tensor(values), fmt)
    assert torch.equal(round_to(once, fmt), once)
    finite = once.isfinite()
    assert torch.equal(decode(encode(once, fmt), fmt)[finite], once[finite])


@given(st.lists(numbers, min_size=2, max_size=40), formats)
def test_rounding_keeps_the_order(values, fmt):
    rounded = round_to(torch.tensor(sorted(values)), fmt)
    assert (rounded[1:] >= rounded[:-1]).all()


@given(st.lists(numbers, min_size=1, max_size=40), formats)
def test_rounding_moves_no_number_by_more_than_half_a_step(values, fmt):
    x = torch.tensor(values).clamp(-fmt.max, fmt.max)
    step = [2.0 ** max(math.frexp(value)[1] - 1 - fmt.mantissa_bits, math.log2(fmt.smallest_subnormal)) for value in x]
    assert ((round_to(x, fmt).double() - x.double()).abs() <= torch.tensor(step, dtype=torch.float64) / 2).all()


@given(st.lists(numbers, min_size=1, max_size=40), formats)
def test_the_sign_decides_nothing_but_the_sign(values, fmt):
    x = torch.tensor(values)
    assert torch.equal(encode(-x, fmt), encode(x, fmt) ^ 1 << (fmt.bits - 1))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
@pytest.mark.parametrize("fmt", [E4M3, FP16, FP32], ids=lambda fmt: fmt.name)
def test_codes_have_the_shape_of_the_numbers(shape, fmt):
    x = torch.randn(shape)
    codes = encode(x, fmt)
    assert codes.shape == shape and codes.dtype == {8: torch.uint8, 16: torch.int32, 32: torch.int64}[fmt.bits]
    assert decode(codes, fmt).shape == shape and decode(codes, fmt).dtype == torch.float32


def test_tensors_that_do_not_lie_in_one_row_are_cast_by_their_values():
    x = torch.randn(6, 10)
    for view in (x.T, x[:, ::3], x[1:4, 2:5], x[:, :1].expand(6, 7), x.flip(0)):
        assert torch.equal(encode(view, E4M3), encode(view.contiguous(), E4M3))
        assert torch.equal(decode(encode(x, E4M3).T, E4M3), round_to(x.T, E4M3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_other_floating_point_types_are_taken_as_float32(dtype):
    x = torch.randn(100).mul(30).to(dtype)
    assert torch.equal(encode(x, E4M3), encode(x.float(), E4M3))


def test_a_tensor_in_training_is_cast_and_left_as_it_is():
    x = torch.randn(5, requires_grad=True)
    before = x.detach().clone()
    assert not round_to(x, "E4M3").requires_grad
    assert torch.equal(x.detach(), before)


def test_bits_of_a_signed_type_are_codes_too():
    codes = encode(torch.randn(50), E4M3)
    assert torch.equal(decode(codes.view(torch.int8), E4M3), decode(codes, E4M3))
    x = torch.randn(50).half()
    assert torch.equal(decode(x.view(torch.int16), FP16), x.float())


@pytest.mark.parametrize("bad", [torch.arange(3), torch.tensor([True]), torch.ones(2, dtype=torch.complex64), 0.1,
                                 [1.0], np.ones(2)])  # fmt: skip
def test_only_tensors_of_floating_point_numbers_are_encoded(bad):
    with pytest.raises(TypeError, match="floating-point"):
        encode(bad, E4M3)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(2).to(torch.float8_e4m3fn), torch.tensor([True]), 7])
def test_only_tensors_of_whole_numbers_are_decoded(bad):
    with pytest.raises(TypeError, match="whole numbers"):
        decode(bad, E4M3)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_codes_of_wide_unsigned_types_are_checked_too(dtype):
    assert decode(torch.tensor([1, 0x3F]).to(dtype), E4M3).tolist() == [2.0**-9, E4M3.value(0x3F)]
    with pytest.raises(ValueError, match="codes 0 to 255, got 256"):
        decode(torch.tensor([1, 256]).to(dtype), E4M3)


def test_codes_that_a_format_does_not_have_are_refused():
    with pytest.raises(TypeError, match="16 bits"):
        decode(torch.tensor([1], dtype=torch.uint8), FP16)
    for code in (256, -1):
        with pytest.raises(ValueError, match=f"codes 0 to 255, got {code}"):
            decode(torch.tensor([0, code]), E4M3)
        with pytest.raises(ValueError, match=f"codes 0 to 255, got {code}"):
            E4M3.value(code)


@pytest.mark.parametrize("name", ["E4M4", "e4m3", "", None, ["E4M3"]])
def test_a_format_that_does_not_exist_is_refused_with_the_names_that_do(name):
    for use in (find_format, lambda name: encode(torch.ones(1), name), lambda name: decode(torch.arange(2), name)):
        with pytest.raises(ValueError, match="E4M3, E5M2, FP16, BF16, TF32, FP32"):
            use(name)


def test_nobody_lists_the_values_of_a_wide_format():
    assert len(BF16.values()) == 1 << 16
    with pytest.raises(ValueError, match="up to 16 bits"):
        TF32.values()
