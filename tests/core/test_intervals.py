"""Intervals against their defining tail probabilities and by how often they cover."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from netweight.core.intervals import (
    bootstrap_mean,
    clopper_pearson,
    mean_interval,
    paired_difference,
    quantile_interval,
    resampled_means,
    upper_bound,
    upper_mean,
)


@given(n=st.integers(1, 400), share=st.floats(0, 1), level=st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_clopper_pearson_ends_where_the_count_becomes_unlikely(n, share, level):
    hits, tail = round(share * n), (1 - level) / 2
    low, high = clopper_pearson(hits, n, level)
    assert 0 <= low <= hits / n <= high <= 1
    assert low == 0 if hits == 0 else math.isclose(binom.sf(hits - 1, n, low), tail, rel_tol=1e-6)
    assert high == 1 if hits == n else math.isclose(binom.cdf(hits, n, high), tail, rel_tol=1e-6)
    top = upper_bound(hits, n, level)
    assert top == 1 if hits == n else math.isclose(binom.cdf(hits, n, top), 1 - level, rel_tol=1e-6)
    assert top <= high


def test_by_hand():
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert upper_bound(0, 100) == pytest.approx(1 - 0.01**0.01)  # nothing seen in a hundred: at most 4.5%
    assert upper_mean(np.zeros(100)) == upper_bound(0, 100)
    assert upper_mean(np.full(50, 0.5)) == pytest.approx(0.5 + math.sqrt(math.log(100) / 100))
    assert upper_mean(np.full(2, 0.9)) == 1.0
    assert mean_interval(np.array([0.0, 1.0, 1.0])) == clopper_pearson(2, 3)
    low, high = mean_interval(np.array([0.0, 0.5, 1.0]))
    assert (low, high) == bootstrap_mean(np.array([0.0, 0.5, 1.0])) and 0 <= low < 0.5 < high <= 1


@pytest.mark.parametrize(("gain", "loss", "n"), [(0.02, 0.05, 60), (0.0, 0.01, 200), (0.3, 0.3, 40)])
def test_paired_difference_covers(gain, loss, n):
    draws = np.random.default_rng(0).multinomial(n, [gain, loss, 1 - gain - loss], size=400)
    ends = [paired_difference(int(up), int(down), n) for up, down, _ in draws]
    assert np.mean([low <= gain - loss <= high for low, high in ends]) >= 0.95
    assert paired_difference(0, 0, 100)[1] > 0.02  # no change seen is no proof of none
    assert paired_difference(5, 2, 50) == tuple(-end for end in reversed(paired_difference(2, 5, 50)))


def test_bootstrap_covers_and_is_the_same_for_the_same_seed():
    g = np.random.default_rng(1)
    samples = g.exponential(size=(200, 60))
    ends = [bootstrap_mean(values) for values in samples]
    covered = np.mean([low <= 1.0 <= high for low, high in ends])
    assert 0.87 <= covered <= 0.98
    narrow = [bootstrap_mean(values, level=0.5) for values in samples]
    assert 0.35 <= np.mean([low <= 1.0 <= high for low, high in narrow]) <= 0.6
    assert bootstrap_mean(samples[0]) == bootstrap_mean(samples[0]) != bootstrap_mean(samples[0], seed=1)
    assert bootstrap_mean(np.array([3.0])) == (-math.inf, math.inf)
    assert bootstrap_mean(np.full(5, 3.0)) == (3.0, 3.0)


def test_resampled_columns_use_the_same_rows_in_any_number_of_chunks(monkeypatch):
    values = np.random.default_rng(0).normal(size=(30, 1))
    means = resampled_means(np.hstack([values, 2 * values]), draws=50)
    assert means.shape == (50, 2) and np.allclose(means[:, 1], 2 * means[:, 0])
    assert means[:, 0].std() == pytest.approx(values.std() / math.sqrt(30), rel=0.3)
    monkeypatch.setattr("netweight.core.intervals.CHUNK", 70)
    assert np.allclose(resampled_means(values, draws=50)[:, 0], means[:, 0])


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_quantile_interval_covers(q):
    samples = np.random.default_rng(2).exponential(size=(500, 80))
    truth = -math.log(1 - q)
    ends = [quantile_interval(values, q) for values in samples]
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.93 <= covered <= 1.0 and np.mean([high < 9 for _, high in ends]) > 0.5
    low, high = quantile_interval(np.arange(1.0, 6.0), q)
    assert high == math.inf and low == (-math.inf if q == 0.5 else 3.0 if q == 0.9 else None)


def test_nonsense_is_refused():
    for call in (
        lambda: clopper_pearson(3, 2),
        lambda: clopper_pearson(0, 0),
        lambda: upper_bound(0, 10, 1.0),
        lambda: bootstrap_mean(np.zeros(0)),
        lambda: quantile_interval(np.zeros(0), 0.5),
    ):
        with pytest.raises(ValueError, match="need 0 <= hits <= n"):
            call()
    with pytest.raises(ValueError, match="values in"):
        upper_mean(np.array([0.5, 1.5]))
