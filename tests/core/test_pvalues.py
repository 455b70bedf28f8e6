"""p-values against SciPy, against what is drawn at random, and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from netweight.core.errors import BadInput
from netweight.core.pvalues import combined, cosine, tail


@given(n=st.integers(1, 60), chance=st.floats(0.01, 0.99), data=st.data())
def test_the_tail_is_scipys_and_its_sum(n, chance, data):
    hits = data.draw(st.integers(0, n))
    wanted = stats.binomtest(hits, n, chance, alternative="greater").pvalue
    assert tail(hits, n, chance) == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    terms = [math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(hits, n + 1)]
    assert tail(hits, n, chance) == pytest.approx(sum(terms), rel=1e-6)


def test_a_cosine_by_hand():
    assert cosine(0.0, 7) == pytest.approx(0.5)
    assert cosine(1.0, 7) == 0 and cosine(-1.0, 7) == 1
    for t in (-0.9, -0.2, 0.4, 0.8):  # in two dimensions the angle is uniform, in three the cosine is
        assert cosine(t, 2) == pytest.approx(math.acos(t) / math.pi)
        assert cosine(t, 3) == pytest.approx((1 - t) / 2)


@pytest.mark.parametrize("d", [2, 5, 64])
def test_the_cosine_of_a_random_direction_gives_uniform_p_values(d):
    g = torch.Generator().manual_seed(d)
    u, v = torch.randn(2000, d, generator=g, dtype=torch.float64), torch.randn(d, generator=g).double()
    ps = [cosine(t, d) for t in torch.cosine_similarity(u, v[None]).clamp(-1, 1).tolist()]
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    joined = [combined(ps[start : start + 5]) for start in range(0, 2000, 5)]
    assert stats.kstest(joined, "uniform").pvalue > 0.01


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=8))
def test_fishers_method_is_scipys(ps):
    assert combined(ps) == pytest.approx(stats.combine_pvalues(ps, "fisher").pvalue, rel=1e-6, abs=1e-300)


def test_a_p_value_of_zero_is_taken():
    assert 0 <= combined([0.0, 0.5]) < 1e-200


def test_nonsense():
    for arguments in ((-1, 5, 0.5), (6, 5, 0.5), (0, 0, 0.5), (1, 5, 1.5)):
        with pytest.raises(BadInput, match=r"hits of|chance="):
            tail(*arguments)
    for arguments in ((0.5, 1), (1.5, 3)):
        with pytest.raises(BadInput, match="a cosine of"):
            cosine(*arguments)
    for ps in ([], [1.5], [-0.1]):
        with pytest.raises(BadInput, match="p-values lie between"):
            combined(ps)
