"""Two Gaussian classes in closed form against draws and brute force; the scatter of classes by definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.inspection.separability import Errors, Gaussians, price, scatter_ratio

ETA, K = st.floats(0.2, 3), st.floats(1.5, 100)


@settings(deadline=None)
@given(eta=ETA, imbalance=K, rho=st.floats(0.2, 200))
def test_no_other_threshold_has_a_smaller_weighted_risk(eta, imbalance, rho):
    classes = Gaussians(eta, 1.0, imbalance)
    t = classes.threshold(rho)

    def risk(t: float) -> float:
        frequent, rare = (0.5 * math.erfc(-s / math.sqrt(2)) for s in (t - eta, -t - eta))
        return imbalance * frequent + rho * rare

    found = classes.errors(rho)
    assert imbalance * found.frequent + rho * found.rare == pytest.approx(risk(t))
    assert all(risk(t) <= risk(t + d) * (1 + 1e-12) for d in (-1, -0.1, -0.01, 0.01, 0.1, 1))


@pytest.mark.parametrize(("eta", "sigma", "d"), [(0.5, 1.0, 1), (0.3, 0.5, 4), (2.0, 2.0, 2)])
def test_the_errors_are_those_of_draws(eta, sigma, d):
    classes, g = Gaussians(eta, sigma, 10, d), np.random.default_rng(0)
    for rho in (1.0, 10.0):
        found, line = classes.errors(rho), classes.threshold(rho) * sigma / math.sqrt(d)
        for y, error in ((-1, found.rare), (1, found.frequent)):
            x = y * eta + sigma * g.standard_normal((200_000, d))
            assert ((x.mean(1) > line) != (y > 0)).mean() == pytest.approx(error, abs=4e-3)


@settings(deadline=None)
@given(eta=ETA, imbalance=K)
def test_the_price_falls_with_the_distance_from_1_to_the_root_of_k(eta, imbalance):
    near, far = Gaussians(eta, 1.0, imbalance).price(), Gaussians(1.2 * eta, 1.0, imbalance).price()
    assert 1 > near > far > imbalance**-0.5


def test_limits_and_what_dimensions_do():
    assert Gaussians(1e-3, 1.0, 10).price() == pytest.approx(1, abs=0.02)
    assert Gaussians(9.0, 1.0, 4).price() == pytest.approx(0.5, abs=0.01)
    assert Gaussians(1.0, 2.0, 10, 4).errors() == Gaussians(1.0, 1.0, 10).errors()
    assert Gaussians(1.0, 1.0, 1).price() == 1 == price(Errors(0.1, 0.2), Errors(0.1, 0.2))
    even = Gaussians(1.0, 1.0, 10).errors(10.0)
    assert even.rare == even.frequent
    assert price(Errors(rare=0.5, frequent=0.1), Errors(rare=0.3, frequent=0.2)) == pytest.approx(0.5)


def test_scatter_by_hand_and_its_invariances():
    z = torch.tensor([[0.0, 1.0], [0.0, -1.0], [4.0, 2.0], [4.0, -2.0], [4.0, 2.0], [4.0, -2.0]])
    y = torch.tensor([0, 0, 1, 1, 1, 1])
    assert scatter_ratio(z, y) == pytest.approx(2 * 4 / (1 + 4))
    turn, _ = torch.linalg.qr(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert scatter_ratio(5 * z @ turn + 3, y) == pytest.approx(8 / 5, rel=1e-5)
    assert scatter_ratio(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])) == math.inf


def test_numbers_that_are_none():
    for given_ in ((0.0, 1.0, 10), (1.0, -1.0, 10), (1.0, 1.0, 0.5), (1.0, 1.0, 10, 0), (math.nan, 1.0, 10)):
        with pytest.raises(BadInput, match="eta"):
            Gaussians(*given_)
    with pytest.raises(BadInput, match="rho"):
        Gaussians(1.0, 1.0, 10).threshold(0.0)
