"""Fingerprints, dataset inference, radioactive data and passports against hand examples and their nulls."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data, outputs
from netweight.inspection.ownership.boundary_fingerprint import area, between, boundary_fingerprint, matching
from netweight.inspection.ownership.dataset_inference import (
    by_gradients,
    dataset_inference,
    farther,
    nearest,
    walked,
)
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# Boundary fingerprints --------------------------------------------------------------------------------------


def test_fingerprints_match_their_own_network_and_lie_in_range():
    model, data = tiny_model(), tiny_task().test
    model.train()
    before = torch.get_rng_state()
    points = boundary_fingerprint(model, data, steps=20)
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert matching(model, points) == 1.0
    assert points.x.shape == data.x.shape and points.x.min() >= 0 and points.x.max() <= 1
    assert torch.equal(points.x, boundary_fingerprint(model, data, steps=20).x)


def test_a_point_ends_between_its_class_and_the_least_likely():
    data = tiny_task().test
    model = tiny_model()
    z, far = outputs(model, data), outputs(model, boundary_fingerprint(model, data, steps=300, margin=0.01))
    i, j = z.argmax(1), z.argmin(1)
    first = between(z, i, j, 0.01)
    last = between(far, i, j, 0.01)
    assert (first > 0.01).all() and last.mean() < 0.5 * first.mean()
    reached = last < 1e-3
    assert reached.any() and (far.argmax(1)[reached] == j[reached]).all()


def test_what_is_minimised_by_hand():
    z = torch.tensor([[3.0, 1.0, 0.5, 4.0], [1.0, 3.0, 0.0, 0.5]])
    found = between(z, torch.tensor([0, 0]), torch.tensor([1, 1]), 1.0)
    # 3 - 1 + 1 beside 4 - 3;   1 - 3 + 1 < 0 beside 0.5 - 1 < 0
    assert found.tolist() == [4.0, 0.0]


def test_conferrable_points_go_over_to_copies_and_not_to_others():
    data, model, net = tiny_task().test, tiny_model(), tiny_model(5)
    j = outputs(model, data).argmin(1)

    def share(**nets: list[nn.Module]) -> float:
        points = boundary_fingerprint(model, data, steps=60, weight=20, **nets)
        return float(outputs(net, points).softmax(1).gather(1, j[:, None]).mean())

    assert share(others=[net]) < share() - 0.01 and share() + 0.01 < share(copies=[net])


def test_the_area_counts_pairs():
    assert area([1.0, 0.9], [0.2, 0.9]) == 3.5 / 4
    assert area([0.5], [0.7]) == 0 and area([0.5], [0.5]) == 0.5
    with pytest.raises(BadInput, match="0 copies"):
        area([], [0.5])


def test_fingerprints_that_cannot_be_made():
    model, data = tiny_model(), tiny_task().test
    for options in ({"steps": 0}, {"margin": -1.0}, {"rate": 0.0}):
        with pytest.raises(BadInput, match="give one step"):
            boundary_fingerprint(model, data, **options)
    with pytest.raises(DoesNotFit, match="of 2: give a network of three"):
        boundary_fingerprint(nn.Linear(3, 2), Data(torch.randn(4, 3)))
    with pytest.raises(DoesNotFit, match="whole numbers"):
        boundary_fingerprint(tiny_language_model(), tiny_text_task().test)
    with pytest.raises(BadInput, match="with the owner's classes"):
        matching(model, Data(data.x))


# Dataset inference ------------------------------------------------------------------------------------------


class Above(nn.Module):
    """Class 1 where the only number is above 0."""

    def forward(self, x):
        return torch.cat([-x, x], 1)


def test_a_walk_ends_where_the_class_is_left():
    data = Data(torch.tensor([[0.25], [-0.75], [0.25], [9.0]]), torch.tensor([1, 0, 0, 1]))
    found = walked(Above(), data, directions=12, size=0.1, most=20)
    assert found.shape == (4, 12)
    rounded = [set(row.round(decimals=4).tolist()) for row in found.double()]
    assert rounded == [{0.3, 2.0}, {0.8, 2.0}, {0.0}, {2.0}]  # away from 0 nobody ever leaves
    again, other = (walked(Above(), data, directions=12, size=0.1, most=20, seed=s) for s in (0, 1))
    assert torch.equal(found, again) and not torch.equal(found, other)


def test_the_nearest_class_of_a_linear_network_by_hand():
    model = nn.Linear(2, 3, bias=False)
    model.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    data = Data(torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, -4.0]]), torch.tensor([0, 1, 0]), batch=2)
    # to class 1: (3 - 1) / sqrt(2), to class 2: 6 / 2; the second is wrong; (1 + 4) / sqrt(2), 2 / 2
    assert nearest(model, data).tolist() == pytest.approx([2**0.5, 0.0, 1.0])
    found = by_gradients(model, data, data)
    assert found.own == found.public and found.p == pytest.approx(0.5)
    far = Data(data.x * torch.tensor([[10.0], [1], [10]]), data.y)
    assert by_gradients(model, far, data).p < 0.5 < by_gradients(model, data, far).p


def test_own_examples_that_lie_farther_are_found_and_no_others():
    g = torch.Generator().manual_seed(0)
    near, far = torch.rand(80, 1, generator=g), torch.rand(80, 1, generator=g) + 0.3
    one = torch.ones(80, dtype=torch.int64)
    assert dataset_inference(Above(), Data(far, one), Data(near, one), size=0.05, directions=20).p < 1e-3
    assert dataset_inference(Above(), Data(near, one), Data(far, one), size=0.05, directions=20).p > 0.9
    found = dataset_inference(Above(), Data(far, one), Data(near, one), size=0.05, directions=20)
    assert found.own > found.public > 0


def test_walks_are_compared_by_geometric_means():
    data = Data(torch.tensor([[0.25], [0.25]]), torch.tensor([1, 0]))
    apart = walked(Above(), data, directions=9, size=0.1, most=20, seed=0) + 0.1
    found = dataset_inference(Above(), data, data, size=0.1, most=20, directions=9)
    assert found.own == pytest.approx(math.exp(float(apart.log().mean())), rel=1e-5)


def test_p_values_are_scipys_and_uniform_where_nothing_differs():
    g = np.random.default_rng(0)
    a, b = g.normal(size=30) + 1, 3 * g.normal(size=50)
    wanted = stats.ttest_ind(a, b, equal_var=False)
    assert farther(a, b) == pytest.approx(
        wanted.pvalue / 2 if wanted.statistic > 0 else 1 - wanted.pvalue / 2
    )
    ps = [farther(g.normal(size=40), g.normal(size=60)) for _ in range(500)]
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert farther(np.ones(3), np.zeros(3)) == 0 and farther(np.ones(3), np.ones(3)) == 1


def test_inference_that_cannot_be_made():
    data = Data(torch.randn(4, 1), torch.ones(4, dtype=torch.int64))
    for options in ({"directions": 0}, {"size": 0.0}, {"most": 0}):
        with pytest.raises(BadInput, match="a walk needs one direction and step"):
            walked(Above(), data, **options)
    for call in (walked, nearest):
        with pytest.raises(DoesNotFit, match="give data with class numbers"):
            call(Above(), Data(data.x))
    with pytest.raises(BadInput, match="1 own and 4 public examples"):
        dataset_inference(Above(), data.take(1), data)
