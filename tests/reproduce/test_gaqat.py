"""The quick reproduction of GAQAT reaches its bars; what it measures is what it says."""

import copy

import pytest
import torch
from torch import nn

from netweight.core.task import Data
from netweight.reproduce import gaqat as reproduction


def test_quick():
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [0.02, 0.9, 1.0, -0.01, 0.0, 1.0]
    assert all(bar.passed for bar in claim.bars), claim.bars
    assert len(claim.figures["outside"]) == 2


def test_the_rise_of_a_quadratic_is_known_and_weights_come_back():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().eval()
    before = copy.deepcopy(model.state_dict())
    x, y = torch.rand(20, 1, 2, 2).double(), torch.arange(20) % 3
    data = Data(x, y)
    tiny = reproduction.rise(model, data, 1e-6) / 1e-6
    value = nn.functional.cross_entropy(model(x), y)
    norm = nn.utils.get_total_norm(torch.autograd.grad(value, [*model.parameters()]))
    assert tiny == pytest.approx(norm.item(), rel=1e-4)
    assert reproduction.rise(model, data) > 0.2 * norm.item()  # the loss is convex
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_differences_are_paired():
    def found(outside: float, inside: float, rise: float) -> reproduction.Found:
        return reproduction.Found(outside, inside, rise, {})

    results = {
        ("SAGM", "clean", 3): found(0.5, 0.9, 1.0), ("GAQAT", "clean", 3): found(0.52, 0.9, 0.5),
        ("SAGM", "clean", 4): found(0.6, 0.9, 2.0), ("GAQAT", "clean", 4): found(0.61, 0.8, 2.0),
        ("LSQ", "clean", 4): found(0.0, 0.0, 0.0),
    }  # fmt: skip
    assert reproduction.paired(results, "outside") == pytest.approx([0.02, 0.01])
    flatter, outside = reproduction.outcome(results)
    assert (flatter.measured, outside.measured) == pytest.approx((-0.25, 0.015))
    assert reproduction.figures(results, 0)["outside, GAQAT - SAGM, 90 % of means"] == pytest.approx(
        [0.01, 0.02]
    )
