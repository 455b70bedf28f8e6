"""Dyadic numbers against exact fractions: how near they are, how they round, and in float64."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from netweight.core.errors import DoesNotFit
from netweight.nn.dyadic import Dyadic, WholeDyadic, half_up, rescale, rescale_whole

ratios = st.floats(2.0**-31, 2.0**13) | st.floats(0.001, 2.0)
codes = st.integers(-(2**31), 2**31 - 1) | st.integers(-300, 300)


def of(ratio):
    return Dyadic.of(torch.tensor([ratio], dtype=torch.float64))


def floor_of(q, factor):
    """floor(q m 2^-e + 1/2) in fractions."""
    value = Fraction(int(factor.multiplier), 2 ** int(factor.shift)) * q + Fraction(1, 2)
    return value.numerator // value.denominator


@given(ratios)
@example(1.0)
@example(1 - 2.0**-53)  # its mantissa rounds up to 2^31
@example(2.0**13)
def test_a_dyadic_number_is_near_its_factor(ratio):
    factor = of(ratio)
    m, e = int(factor.multiplier), int(factor.shift)
    assert 2**30 <= m < 2**31
    assert abs(Fraction(m, 2**e) - Fraction(ratio)) <= Fraction(ratio) / 2**31
    assert Fraction(float(factor.value())) == Fraction(m, 2**e)


@given(ratios, codes)
@example(0.5, -1)  # -1/2 goes up to 0
@example(0.5, -3)
@example(0.5, 3)
@example(2.0**-31, -(2**31))
def test_shifts_round_half_up_on_both_sides_of_zero(ratio, q):
    factor, number = of(ratio), torch.tensor([q], dtype=torch.int32)
    wanted = floor_of(q, factor)
    assert int(half_up(number, factor)) == wanted
    assert int(rescale(number, factor, -50, 70)) == min(max(wanted, -50), 70)


@given(ratios, codes)
@example(0.7, 2**31 - 1)
@example(2.0**13, 2**31 - 1)
@example(2.0**-30, -(2**31))
def test_float64_gives_the_same_whole_numbers_with_one_product_and_with_two(ratio, q):
    factor, wanted = of(ratio), floor_of(q, of(ratio))
    number = torch.tensor([q], dtype=torch.float64)
    exact = WholeDyadic.of(factor, abs(q))
    assert (exact.unit is None) == (abs(q) * int(factor.multiplier) < 2**52)
    assert float(rescale_whole(number, exact)) == wanted
    assert float(rescale_whole(number, WholeDyadic.of(factor, 2**31))) == wanted


def test_halves_by_hand():
    quarter = of(0.25)
    found = half_up(torch.arange(-6, 7, dtype=torch.int32), quarter)
    assert found.tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_what_always_rounds_to_zero_is_zero():
    factor = of(2.0**-40)
    ends = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    assert int(factor.multiplier) == 0 and half_up(ends, factor).tolist() == [0, 0]


@given(st.lists(codes, min_size=2, max_size=8), ratios)
def test_relu_and_maximum_commute_with_rescaling(numbers, ratio):
    q, factor = torch.tensor(numbers, dtype=torch.int32), of(ratio)
    assert torch.equal(half_up(q.clamp(min=0), factor), half_up(q, factor).clamp(min=0))
    assert torch.equal(half_up(q.max(), factor), half_up(q, factor).max()[None])


def test_factors_per_channel_broadcast():
    factor = Dyadic.of(torch.tensor([[[0.5]], [[0.125]]], dtype=torch.float64))
    q = torch.full((3, 2, 2, 2), 12, dtype=torch.int32)
    found = rescale(q, factor, -5, 5)
    assert found.dtype == torch.int32 and found[:, 0].unique().tolist() == [5]
    assert found[:, 1].unique().tolist() == [2]  # 3/2 goes up


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_scales_that_are_none(ratio):
    with pytest.raises(DoesNotFit, match="conv1: a scale is not positive and finite"):
        Dyadic.of(torch.tensor(ratio, dtype=torch.float64), "conv1")


def test_refuses_what_would_not_stay_exact():
    with pytest.raises(DoesNotFit, match="conv1: its scale grows by 2\\^14"):
        Dyadic.of(torch.tensor(2.0**14, dtype=torch.float64), "conv1")
    whole = torch.ones(1, dtype=torch.int64)
    for m, e in [(whole * 2**31, whole * 20), (-whole, whole * 20), (whole, whole), (whole, whole * 63),
                 (whole, (whole * 20).int()), (whole, torch.tensor([20, 20]))]:  # fmt: skip
        with pytest.raises(ValueError, match="a dyadic number has"):
            Dyadic(m, e)
