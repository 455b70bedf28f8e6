"""What is proven: linear networks, for which intervals are exact, and the law that found <= possible."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from netweight.core.intervals import clopper_pearson
from netweight.core.perturbation import L2, Box, Linf
from netweight.core.result import POSSIBLE
from netweight.core.task import Data, Task
from netweight.evidence.found import Attacked, search
from netweight.evidence.possible import Proven, check, measure, prove

NOTHING = Proven([], torch.zeros(1, 2) > 0, torch.zeros(1) > 0)


def threshold(at: float) -> nn.Module:
    """Class 1 above `at`."""
    model = nn.Linear(1, 2)
    model.weight.data, model.bias.data = torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -at])
    return model


def line(count: int = 101, **how) -> Data:
    x = torch.linspace(0, 1, count)[:, None]
    return Data(x, (x[:, 0] > 0.5).long(), 40, **how)


def task_of(data: Data) -> Task:
    return Task(data, data)


def test_thresholds_are_proven_exactly_where_they_hold():
    proven = prove(threshold(0.5), threshold(0.3), task_of(line()), Linf(0.1), limit=101)
    x = line().x[:, 0]
    clear = torch.stack([(x - at).abs() > 1e-3 for at in (0.2, 0.4, 0.5, 0.6)]).all(0)
    first = (x - 0.5).abs() > 0.1
    second = (x < 0.2) | (x > 0.5)  # between 0.4 and 0.5 it is proven to be wrong
    assert torch.equal(proven.held[clear, 0], first[clear]) and torch.equal(
        proven.held[clear, 1], second[clear]
    )
    assert torch.equal(proven.agreed[clear], ((x < 0.2) | (x > 0.6))[clear])
    held, agreed = proven.rows
    assert held.question == agreed.question == POSSIBLE and held.n == agreed.n == 101
    assert (held.quantity, agreed.quantity) == ("accuracy proven", "agreement proven")
    count = int(proven.held[:, 1].sum())
    assert held.original == int(proven.held[:, 0].sum()) / 101 and held.compressed == count / 101
    assert (held.low, held.high) == clopper_pearson(count, 101)
    assert math.isnan(agreed.original) and agreed.compressed == int(proven.agreed.sum()) / 101
    assert "crown" in held.method and "linf=0.1" in held.method and held.arithmetic == "float32"


def test_networks_that_are_sure_of_different_classes_do_not_agree():
    proven = prove(threshold(2.0), threshold(-2.0), task_of(replace(line(5), y=None)), Linf(0.1), limit=5)
    assert proven.held.all() and not proven.agreed.any()


def test_without_labels_a_class_that_cannot_change_is_enough():
    proven = prove(threshold(0.5), threshold(0.3), task_of(replace(line(), y=None)), Linf(0.1), limit=101)
    x = line().x[:, 0]
    assert proven.held[(x > 0.41) & (x < 0.49), 1].all() and proven.rows[0].quantity == "unchanged, proven"


def test_range_and_limit():
    data = line(11, low=0.0, high=1.0)
    assert prove(threshold(1.01), threshold(1.01), task_of(data), Linf(9.0), limit=5).held[:5].all()
    assert not prove(threshold(1.01), threshold(1.01), task_of(line(11)), Linf(9.0), limit=11).held.any()
    assert len(prove(threshold(0.5), threshold(0.5), task_of(data), Linf(0.1), limit=5).held) == 5


def test_thorough_proves_on_the_examples_that_are_attacked(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "netweight.evidence.possible.prove", lambda *args, **how: asked.append(how) or NOTHING
    )
    model = threshold(0.5)
    measure(model, model, task_of(line()), Linf(0.1))
    measure(model, model, task_of(line()), Linf(0.1), thorough=True)
    assert asked == [{"method": None, "limit": 200}, {"method": None, "limit": 1000}]


def test_a_network_without_bounds_has_nothing_proven_and_says_why():
    class Odd(nn.Module):
        """Multiplies inputs up, which has no bounds."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = threshold(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Scores of the products."""
            return self.inner(x.cumprod(1))

    proven = prove(Odd(), threshold(0.5), task_of(line()), Linf(0.1), limit=101)
    assert not proven.held.any() and not proven.agreed.any()
    assert proven.rows[0].original == 0 and "nothing is proven" in proven.rows[0].method


@pytest.mark.parametrize("within", [Linf(0.15), L2(0.3), Box(-0.2, 0.3)], ids=str)
def test_found_never_contradicts_possible(within):
    g = torch.Generator().manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for p, q in zip(original.parameters(), small.parameters()):
        p.data = torch.randn(p.shape, generator=g)
        q.data = p.data + 0.05 * torch.randn(p.shape, generator=g)
    x = torch.randn(80, 4, generator=g) if not isinstance(within, Box) else torch.zeros(80, 4) + 0.05
    task = task_of(Data(x, original(x).argmax(1)))
    attacked = search(original, small, task, within, limit=80)
    proven = prove(original, small, task, within, limit=80)
    check(attacked, proven)
    assert proven.rows[0].compressed <= attacked.rows[0].compressed
    assert proven.rows[1].compressed <= 1 - attacked.rows[1].compressed
    if not isinstance(within, Box):
        assert attacked.broken.any() and proven.held.any() and proven.agreed.any()


def test_the_law_bites():
    no, yes = torch.zeros(4, 2, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.bool)
    yes[2, 1] = True
    attacked = Attacked([], yes, no[:, 0], torch.zeros(4, 1), [])
    check(attacked, Proven([], no, yes[:, 1]))
    with pytest.raises(AssertionError, match="test example 2: the compressed network is proven right"):
        check(attacked, Proven([], yes, no[:, 0]))
    with pytest.raises(AssertionError, match="test example 2: the original is proven right"):
        check(replace(attacked, broken=yes.flip(1)), Proven([], yes.flip(1), no[:, 0]))
    with pytest.raises(AssertionError, match="test example 2: both networks are proven to agree"):
        check(replace(attacked, broken=no, parted=yes[:, 1]), Proven([], no, yes[:, 1]))
    check(attacked, Proven([], yes[:2], no[:2, 0]))  # only the examples that both looked at
