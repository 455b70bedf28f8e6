"""The counting of oscillations, by hand and by definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.nn.oscillation import MOMENTUM, Oscillations, rounded_weights
from netweight.nn.quantized import Roundings, attach
from netweight.nn.quantizer import FromMean, Learnt, Levels


class Fixed(Learnt):
    """Levels of a step of 1, unless told otherwise."""

    def size(self, x):
        return self.step.detach()


def whole() -> Fixed:
    return Fixed(Levels.signed(8))


def test_back_and_forth_by_hand():
    rounding, ways = (
        whole(),
        torch.tensor([[0.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 2, 0], [1, 1, 0], [2, 2, 0]]),
    )
    watch = Oscillations({"w": (ways[0], rounding)}, phases=2)
    for now in ways[1:]:
        watch.see({"w": (now, rounding)}, phase=1)
    # the first: up, down, -, up, up: 2 turns; the second: up, -, up, down, up: 2 turns
    assert watch.counts[1].tolist() == [4.0, 8.0, 0.0] and watch.counts[0].tolist() == [0.0] * 3
    assert watch.steps.tolist() == [0, 5] and watch.weights == 3
    assert watch.rates(1) == {"oscillations": 4 / 15, "changes": 8 / 15, "changes by the step size": 0.0}
    assert math.isnan(watch.rates(0)["changes"])
    m = MOMENTUM
    wanted = torch.tensor([m * (1 - m) ** 3 + m * (1 - m), m * (1 - m) + m, 0.0])
    assert torch.allclose(watch.get_buffer("often0"), wanted)
    assert watch.oscillating() == {"w": pytest.approx(2 / 3)}
    assert watch.notes()["per weight and step"] == [watch.rates(1)]


def test_changes_by_the_step_alone_are_told_apart():
    rounding, w = whole(), torch.tensor([1.4, 2.6, 0.1])
    watch = Oscillations({"w": (w, rounding)})
    with torch.no_grad():
        rounding.step.fill_(0.9)  # 1.4 / 0.9 = 1.56: the code goes up; 2.6 / .9 = 2.9 and .1: as they were
    watch.see({"w": (w, rounding)})
    assert watch.counts[0].tolist() == [0.0, 1.0, 1.0]
    watch.see({"w": (w + torch.tensor([0.0, 1.0, 1.0]), rounding)})  # the weights alone
    assert watch.counts[0].tolist() == [0.0, 3.0, 1.0]


@given(rows=st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=2, max_size=12))
def test_it_counts_what_the_definition_says(rows):
    rounding, x = whole(), torch.tensor(rows).float()
    watch = Oscillations({"w": (x[0], rounding)})
    for now in x[1:]:
        watch.see({"w": (now, rounding)})
    turns = 0
    for column in x.T.tolist():
        ways = [(b > a) - (b < a) for a, b in zip(column, column[1:]) if a != b]
        turns += sum(a == -b for a, b in zip(ways, ways[1:]))
    assert watch.counts[0, 0] == turns
    assert watch.counts[0, 1] == (x[1:] != x[:-1]).sum()


def test_it_goes_on_from_its_buffers_and_finds_rounded_weights():
    model = attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)),
                   lambda name, layer: Roundings(FromMean.stats(2) if name == "0" else None))  # fmt: skip
    weights = rounded_weights(model)
    assert [*weights] == ["0"] and weights["0"][0] is model[0].like.weight
    first = Oscillations(weights)
    with torch.no_grad():
        model[0].like.weight.add_(0.3)
    first.see(weights)
    second = Oscillations(weights)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        model[0].like.weight.sub_(0.3)
    for each in (first, second):
        each.see(weights)
    assert first.rates() == second.rates() and first.rates()["oscillations"] > 0
