"""The two-sample test against definition and null, autocorrelation by hand; a district's indicators."""

import math

import pytest
import torch

from netweight.core.errors import BadInput
from netweight.data.district import synthetic
from netweight.inspection.load_profile import indicators, of_net, steering, without
from netweight.inspection.stealth import autocorrelation, kernel, two_samples, windows
from netweight.models.battery_district import district, run


def drawn(n: int, f: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed)) + shift


def test_mmd_is_its_definition():
    x, y = drawn(7, 3, 0), drawn(5, 3, 1, 0.5)
    z = [*x.double(), *y.double()]
    apart = sorted(math.dist(z[i].tolist(), z[j].tolist()) for i in range(12) for j in range(i))
    width = apart[(len(apart) - 1) // 2]

    def k(a, b) -> float:
        return math.exp(-(math.dist(a.tolist(), b.tolist()) ** 2) / (2 * width**2))

    def inner(rows) -> float:
        pairs = [k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(k(a, b) for a in z[:7] for b in z[7:]) / 35
    found = two_samples(x, y, permutations=50)
    assert found.mmd2 == pytest.approx(inner(z[:7]) + inner(z[7:]) - 2 * across, abs=1e-12)
    assert torch.allclose(kernel(torch.ones(3, 2)), torch.ones(3, 3))


def test_p_is_near_uniform_without_a_difference_and_small_with_one():
    p = [
        two_samples(drawn(30, 4, 2 * s), drawn(30, 4, 2 * s + 1), permutations=99, seed=s).p
        for s in range(120)
    ]
    ranked = torch.tensor(sorted(p))
    even = (torch.arange(120) + 0.5) / 120
    assert (ranked - even).abs().max() < 1.63 / math.sqrt(120)  # Kolmogorov and Smirnov, 1 %
    assert min(p) >= 0.01
    assert two_samples(drawn(30, 4, 0), drawn(30, 4, 1, 1.0)).p == 1 / 201
    same = drawn(20, 3, 5)
    assert two_samples(same, same).p > 0.5
    again = [two_samples(drawn(30, 4, 0), drawn(30, 4, 1), seed=3) for _ in range(2)]
    assert again[0] == again[1]


def test_autocorrelation_by_hand_and_of_what_repeats():
    found = autocorrelation(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)  # z = -1.5 -0.5 0.5 1.5
    assert found.tolist() == pytest.approx([(0.75 - 0.25 + 0.75) / 5, (-0.75 - 0.75) / 5])
    day = torch.sin(torch.arange(24 * 50) * 2 * torch.pi / 24)
    assert autocorrelation(torch.stack([day, -day], 1), 24)[-1].tolist() == pytest.approx(
        [0.98, 0.98], abs=1e-3
    )
    assert autocorrelation(torch.ones(5, 2), 3).abs().max() == 0
    assert windows(torch.arange(10.0).reshape(5, 2), 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_nonsense_is_refused():
    with pytest.raises(BadInput, match="two rows or more"):
        two_samples(drawn(1, 3, 0), drawn(5, 3, 0))
    with pytest.raises(BadInput, match="same columns"):
        two_samples(drawn(5, 2, 0), drawn(5, 3, 0))
    with pytest.raises(BadInput, match="permutations=0"):
        two_samples(drawn(5, 3, 0), drawn(5, 3, 0), permutations=0)
    with pytest.raises(BadInput, match="no window of 9"):
        windows(drawn(5, 3, 0), 9)
    with pytest.raises(BadInput, match="lags=5"):
        autocorrelation(drawn(5, 3, 0), 5)


# A district's indicators ----------------------------------------------------------------------------------

WHERE = district(synthetic(400, 2, 1))


def test_indicators_by_hand():
    net = torch.zeros(48, 1, 2)
    net[0, 0] = torch.tensor([3.0, -1.0])  # one house feeds the other
    net[30, 0] = torch.tensor([-2.0, 1.0])  # the district gives
    net[31, 0] = torch.tensor([4.0, 1.0])
    at = torch.arange(48)[:, None]
    price, carbon = WHERE.year.price[:, 0], WHERE.year.carbon[:, 0]
    found = of_net(net, at, WHERE)
    assert found.consumption == 2 + 5 and found.by_house == 3 + 1 + 5
    assert found.cost == pytest.approx(float(2 * price[0] + 5 * price[31]))
    assert found.emissions == pytest.approx(float(2 * carbon[0] + 5 * carbon[31]))
    assert found.daily_peak == (2 + 5) / 2 and found.ramping == 2 + 1 + 6 + 5
    twice = of_net(net.repeat(1, 3, 1), at.repeat(1, 3), WHERE)
    assert twice == found and set(found.beyond(found).values()) == {0.0}
    assert set(found.shares(twice).values()) == {1.0}
    with pytest.raises(BadInput, match="a day or more"):
        of_net(net[:20], at[:20], WHERE)


def test_without_batteries_is_doing_nothing_and_errors_are_measured():
    starts = torch.tensor([0, 50])

    def off(x, state):
        return (x + 0.1 * (torch.arange(x.shape[1]) == 9)).clamp(0, 2)

    idle = run(WHERE, lambda s: torch.zeros(len(s)), starts, 48, perceive=off)
    bare = without(idle, WHERE)
    assert indicators(idle, WHERE).consumption == pytest.approx(bare.consumption, rel=1e-5)
    true = torch.tensor([0.5, -0.5, 0.2, -0.1])
    found = steering(idle, torch.tensor([0.5, 0.5, -0.2, -0.1]), true)
    assert found.flips == 0.5 and found.moved == pytest.approx(1.4 / 4)
    assert found.l1 == pytest.approx(0.1, abs=1e-6) and found.l2 == pytest.approx(0.1, abs=1e-6)
