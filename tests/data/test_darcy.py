"""The simulated plate against the series solution, its scaling law and its symmetries."""

import math

import pytest
import torch

from netweight.data import darcy


def test_a_uniform_plate_has_the_known_pressure():
    u = darcy.solved(torch.full((1, 1, 24, 24), 0.5))[0, 0]  # k = 1
    series = sum(
        16 * math.sin(n * math.pi / 2) * math.sin(m * math.pi / 2) / (math.pi**4 * n * m * (n * n + m * m))
        for n in range(1, 60, 2)
        for m in range(1, 60, 2)
    )
    assert float(u.max()) == pytest.approx(
        series * 25**2 / darcy.UNIT, rel=0.02
    )  # 25 steps from edge to edge
    assert torch.allclose(u, u.T) and torch.allclose(u, u.flip(0), atol=1e-6) and u.min() > 0


def test_pressure_is_inverse_to_conductivity_and_follows_the_plate():
    a = darcy.fields(2, torch.Generator().manual_seed(1)) * 0.5
    u = darcy.solved(a)
    more = darcy.solved(a + 0.25)
    assert torch.allclose(more * math.exp(2 * 0.25 * darcy.CONTRAST), u, rtol=1e-4)
    assert torch.allclose(darcy.solved(a.flip(3)), u.flip(3), rtol=1e-4)
    assert torch.allclose(darcy.solved(a.transpose(2, 3)), u.transpose(2, 3), rtol=1e-4)


def test_two_halves_by_hand():
    left, right = 0.2, 0.7
    u = darcy.solved(torch.tensor([[[[left, right], [left, right]]]]))[0, 0] * darcy.UNIT
    k, m = (math.exp(darcy.CONTRAST * (2 * a - 1)) for a in (left, right))
    between = 2 * k * m / (k + m)
    balance = torch.tensor([[2 * k + between, -between], [-between, 2 * m + between]])
    assert torch.allclose(u[0], torch.linalg.solve(balance, torch.ones(2)), rtol=1e-4)
    assert torch.allclose(u[0], u[1])


def test_fields_are_smooth_and_the_sets_apart():
    train, test = darcy.train(50), darcy.test()
    assert train.x.shape == (50, 1, 24, 24) == train.y.shape and len(test) == 100
    assert train.x.min() >= 0 and train.x.max() <= 1
    assert train.x.diff(dim=3).square().mean() < 0.7 * train.x.var()  # of independent pixels: 2 times
    assert not (train.x[:, None] == test.x[None]).flatten(2).all(2).any()
