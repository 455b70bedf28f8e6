"""Exact k-means on a line against every partition there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netweight.core import line_clusters
from netweight.core.line_clusters import centres

NUMBERS = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=11)


def cost(values, means):
    return float(((np.asarray(values)[:, None] - means) ** 2).min(1).sum())


def least(values, clusters):
    ordered = np.sort(values)
    found = np.inf
    for parts in range(1, min(clusters, len(ordered)) + 1):
        for cuts in itertools.combinations(range(1, len(ordered)), parts - 1):
            pieces = np.split(ordered, cuts)
            found = min(found, sum(float(((piece - piece.mean()) ** 2).sum()) for piece in pieces))
    return found


@given(values=NUMBERS, clusters=st.integers(1, 5))
def test_no_partition_is_better(values, clusters):
    means = centres(np.array(values), clusters)
    assert len(means) == clusters and (np.diff(means) >= -1e-12).all()
    assert cost(values, means) == pytest.approx(least(values, clusters), abs=1e-9)


def test_by_hand_and_far_from_zero():
    assert centres(np.array([10.0, 0.0, 1.0, 11.0, 5.0]), 3).tolist() == [0.5, 5.0, 10.5]
    far = centres(np.array([0.0, 1.0, 10.0, 11.0]) + 1e8, 2)
    assert far.tolist() == [1e8 + 0.5, 1e8 + 10.5]
    assert centres(np.array([2.0, 2.0]), 3).tolist() == [2.0, 2.0, 2.0]


def test_many_numbers_are_averaged_over_neighbours_first(monkeypatch):
    values = np.random.default_rng(0).normal(size=5000)
    exact = centres(values, 4)
    monkeypatch.setattr(line_clusters, "POINTS", 500)
    coarse = centres(values, 4)
    assert not np.array_equal(coarse, exact)
    assert cost(values, coarse) <= 1.001 * cost(values, exact)


def test_nonsense():
    for values, clusters in (([], 2), ([1.0], 0)):
        with pytest.raises(ValueError, match="need at least one cluster and one number"):
            centres(np.array(values), clusters)
