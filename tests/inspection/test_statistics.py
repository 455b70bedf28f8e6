"""Tests of differences against their formulas and tables, and groups without variance."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from netweight.core.errors import BadInput
from netweight.inspection.statistics import anova, difference

A, B = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5]


def by_definition(a: list[float], b: list[float]) -> tuple[float, float]:
    """t and the degrees of freedom of Welch (1947)."""
    x, y = np.array(a), np.array(b)
    parts = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    t = (y.mean() - x.mean()) / math.sqrt(sum(parts))
    return t, sum(parts) ** 2 / (parts[0] ** 2 / (len(x) - 1) + parts[1] ** 2 / (len(y) - 1))


groups = st.lists(st.floats(-100, 100).map(lambda v: round(v, 2)), min_size=2, max_size=8)


@given(a=groups, b=groups)
def test_p_is_welch_s_and_symmetric(a, b):
    if np.std(a) + np.std(b) < 1e-6:
        return
    t, freedom = by_definition(a, b)
    with np.errstate(all="ignore"):
        found, back = difference(a, b), difference(b, a)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-6, abs=1e-12)
    assert back.p == pytest.approx(found.p) and back.g == pytest.approx(-found.g)


def test_a_difference_by_hand():
    found = difference(A, B)
    pooled = math.sqrt((np.var(A, ddof=1) + np.var(B, ddof=1)) / 2)
    assert found.g == pytest.approx((np.mean(B) - np.mean(A)) / pooled * (1 - 3 / (4 * 12 - 9)))
    assert found.ratio == pytest.approx(np.mean(B) / np.mean(A)) and found.low < found.ratio < found.high
    assert difference(A, B) == found
    double = difference(A, [2 * v for v in A])
    assert double.ratio == pytest.approx(2.0) and double.low < 2 < double.high


def test_the_interval_covers_the_ratio():
    generator, inside = np.random.default_rng(0), 0
    for index in range(100):
        a, b = generator.normal(10, 1, 20), generator.normal(6, 1, 20)
        found = difference(list(a), list(b), seed=index)
        inside += found.low <= 0.6 <= found.high
    assert 86 <= inside <= 99


def test_variance_by_its_definition():
    third = [10.0, 12.0, 11.0, 14.0]
    groups = [np.array(g) for g in (A, B, third)]
    every = np.concatenate(groups)
    between = sum(len(g) * (g.mean() - every.mean()) ** 2 for g in groups) / 2
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (len(every) - 3)
    f, p = anova([A, B, third])
    assert f == pytest.approx(between / within) and p == pytest.approx(stats.f.sf(f, 2, len(every) - 3))
    two, p_two = anova([A, B])
    assert math.sqrt(two) == pytest.approx(abs(stats.ttest_ind(A, B).statistic)) and 0 < p_two < 1


def test_groups_without_variance():
    same, other = difference([2.0, 2.0], [2.0, 2.0, 2.0]), difference([2.0, 2.0], [1.0, 1.0])
    assert (same.p, same.g, same.ratio, same.low, same.high) == (1.0, 0.0, 1.0, 1.0, 1.0)
    assert (other.p, other.g, other.ratio) == (0.0, -math.inf, 0.5)
    assert anova([[1.0, 1.0], [1.0, 1.0]]) == (0.0, 1.0) and anova([[1.0, 1.0], [2.0, 2.0]]) == (
        math.inf,
        0.0,
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: difference([1.0], [1.0, 2.0]),
        lambda: difference([1.0, math.nan], [1.0, 2.0]),
        lambda: anova([[1.0, 2.0], [1.0]]),
    ],
)
def test_a_group_needs_numbers(call):
    with pytest.raises(BadInput, match="a group needs two or more finite numbers"):
        call()


def test_a_variance_needs_groups():
    with pytest.raises(BadInput, match="1 groups"):
        anova([A])
