"""Fooling images: the paper's operators by their definitions, elites that never lose, and nonsense."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.attacks import fooling as file
from netweight.attacks.fooling import Evolution, ascent, crossed, fooling, moved, progress_step
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.testing import tiny_model, tiny_task

LIKE = tiny_task().test.x[:1]
SHORT = Evolution(generations=8, population=20)


class Grey(nn.Module):
    """Grey images `b 1 6 6` to 3 classes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(36, 3)

    def forward(self, x):
        """Scores."""
        return 4 * self.layer(x.flatten(1) - 0.5)


GREY = torch.zeros(1, 1, 6, 6)


@pytest.mark.parametrize("encoding", file.ENCODINGS)
def test_elites_never_lose_and_are_what_is_said(encoding):
    model, how = Grey(), Evolution(encoding, 12, 20)
    found = fooling(model, GREY, how, seed=3)
    assert found.images.shape == (3, 1, 6, 6) and found.images.min() >= 0 and found.images.max() <= 1
    with torch.no_grad():
        p = model(found.images).softmax(1).diagonal()
    assert torch.allclose(p, found.confidence, atol=1e-6)
    assert len(found.median) == 13 and list(found.median) == sorted(found.median)
    assert found.median[-1] > found.median[0] and found.median[-1] == pytest.approx(float(p.median()))
    again = fooling(model, GREY, how, seed=3)
    assert torch.equal(found.images, again.images) and found.median == again.median
    assert not torch.equal(found.images, fooling(model, GREY, how, seed=4).images)
    shorter = fooling(model, GREY, Evolution(encoding, 6, 20), seed=3)
    assert (shorter.confidence <= found.confidence).all() and found.median[:7] == shorter.median


def test_a_child_enters_every_cell_where_it_is_better():
    """Of two equal classes the same genome is the best of both."""

    class Twins(nn.Module):
        def forward(self, x):
            score = x.flatten(1).sum(1)
            return torch.stack([score, score, torch.full_like(score, 2.0)], 1)

    found = fooling(Twins(), GREY, SHORT)
    assert torch.equal(found.images[0], found.images[1])
    assert not torch.equal(found.images[0], found.images[2])


def test_it_ends_when_every_class_is_sure_and_looks_for_the_classes_asked_for():
    model = Grey()
    found = fooling(model, GREY, Evolution("direct", 500, 20, enough=0.9))
    assert 1 < len(found.median) < 500 and found.confidence.min() >= 0.9
    assert found.reached(0.9) < len(found.median) and found.reached(2.0) is None
    one = fooling(model, GREY, SHORT, classes=[2])
    assert one.images.shape == (1, 1, 6, 6)
    with torch.no_grad():
        assert float(model(one.images).softmax(1)[0, 2]) == pytest.approx(float(one.confidence[0]))


def test_pixels_lie_in_the_range_and_any_shape_has_a_direct_encoding():
    model = nn.Linear(5, 2)
    found = fooling(model, torch.zeros(1, 5), Evolution(generations=3, population=4, low=-3.0, high=2.0))
    assert found.images.shape == (2, 5) and found.images.min() >= -3 and found.images.max() <= 2
    assert found.images.min() < -1  # not only from 0 to 1
    colour = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 6, 2))
    found = fooling(colour, torch.zeros(1, 3, 4, 6), Evolution("cppn", 3, 10))
    assert found.images.shape == (2, 3, 4, 6) and found.images.min() >= 0 and found.images.max() <= 1


def test_the_network_stays_as_it_is():
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fooling(model, LIKE, SHORT)
    ascent(model, LIKE, steps=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(seed=st.integers(0, 9999))
@settings(max_examples=30, deadline=None)
def test_crossover_keeps_the_sum_where_nothing_is_cut_and_stays_in_range(seed):
    chance = np.random.default_rng(seed)
    one, other = chance.random((40, 9)), chance.random((40, 9))
    a, b = crossed(one, other, chance)
    assert min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) <= 1
    same = (a == one) & (b == other)
    rows = same.all(1)
    assert 0.2 < rows.mean() < 0.8  # half of the pairs pass through
    assert 0.35 < same[~rows].mean() < 0.65  # half of the pixels of the others do
    near = np.abs(one - other) < 0.05
    middle = (np.minimum(one, other) > 0.3) & (np.maximum(one, other) < 0.7)
    assert np.allclose((a + b)[near & middle], (one + other)[near & middle], atol=1e-6)


def test_crossover_near_an_edge_does_not_need_to_be_cut():
    chance = np.random.default_rng(0)
    one, other = np.full((400, 9), 0.98), 0.5 + 0.48 * chance.random((400, 9))
    for a, b in (crossed(one, other, chance), crossed(1 - one, 1 - other, chance)):
        assert min(a.min(), b.min()) > 0 and max(a.max(), b.max()) < 1


def test_equal_parents_have_equal_children():
    chance = np.random.default_rng(0)
    one = chance.random((30, 8))
    a, b = crossed(one, one.copy(), chance)
    assert np.allclose(a, one, atol=1e-6) and np.allclose(b, one, atol=1e-6)


def test_each_pixel_moves_with_its_chance():
    chance = np.random.default_rng(0)
    pixels = np.full((400, 50), 0.5)
    found = moved(pixels, 0.1, chance)
    assert 0.09 < (found != 0.5).mean() < 0.11
    assert 0.45 < (found > 0.5).sum() / (found != 0.5).sum() < 0.55
    assert moved(np.zeros((50, 50)), 1.0, chance).min() == 0


@given(p=st.floats(1e-6, 0.9999), seed=st.integers(0, 99))
def test_the_step_predicts_the_progress_that_is_asked_for(p, seed):
    h = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = progress_step(torch.tensor([p], dtype=torch.float64), h)
    gradient = p * h
    assert float((step * gradient).sum()) == pytest.approx(min(0.03, 0.1 * (1 - p)), rel=1e-6)
    assert (progress_step(torch.tensor([p], dtype=torch.float64), 0 * h) == 0).all()


def test_one_step_of_ascent_by_hand():
    model, mean = Grey(), torch.full((1, 1, 6, 6), 0.5)
    noise = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) / 255
    x = (mean + noise).requires_grad_()
    p = model(x).softmax(1)[0, 1]
    (g,) = torch.autograd.grad(p, x)
    p = p.detach()
    a = min(0.03, 0.1 * (1 - float(p))) / g.square().sum()
    expected = (mean + 0.99 * (x.detach() - mean + a * g)).clamp(0, 1)
    found = ascent(model, mean, steps=2, classes=[1])
    assert torch.allclose(found.images, expected, atol=1e-6)
    assert float(found.confidence) == pytest.approx(float(model(expected).softmax(1)[0, 1].detach()))
    assert float(found.confidence) - float(p) == pytest.approx(0.03, abs=0.005)  # as predicted


def test_ascent_says_when_each_level_was_first_reached_and_keeps_the_best():
    model, mean = Grey(), torch.full((1, 1, 6, 6), 0.5)
    found = ascent(model, mean, steps=120)
    assert set(found.when) == {"majority", "0.99", "0.999", "0.9999"}
    for row in range(3):
        times = [found.when[name][row] for name in ("majority", "0.99", "0.999")]
        reached = [time for time in times if time >= 0]
        assert reached == sorted(reached) and reached
        assert (found.when["0.99"][row] >= 0) == (float(found.confidence[row]) >= 0.99)
    row = max(range(3), key=lambda row: found.when["0.99"][row])
    first = found.when["0.99"][row]
    assert ascent(model, mean, steps=first).when["0.99"][row] == -1  # not before
    assert ascent(model, mean, steps=first + 1).when["0.99"][row] == first
    longer = ascent(model, mean, steps=150)
    assert (longer.confidence >= found.confidence).all()


def test_ascent_stays_in_the_range():
    found = ascent(Grey(), torch.zeros(1, 1, 6, 6), steps=40)
    assert found.images.min() == 0 and 0.05 < found.images.max() <= 1


def test_a_compressed_network_is_searched_as_it_is():
    model, task = tiny_model(), tiny_task()
    small = assemble(model, rtn(model, task, weighted(model), RTN(4)), Plan({}))
    found = [fooling(net, LIKE, SHORT) for net in (small.model, small.plain())]
    assert torch.equal(found[0].images, found[1].images)


def test_bad_input():
    with pytest.raises(BadInput, match="unknown encoding 'cpn'; did you mean 'cppn'"):
        Evolution("cpn")
    with pytest.raises(BadInput, match="population=3: children come in pairs"):
        Evolution(population=3)
    with pytest.raises(BadInput, match="low=1.0, high=0.0"):
        Evolution(low=1.0, high=0.0)
    with pytest.raises(DoesNotFit, match="a cppn paints grey or colour images, not inputs"):
        fooling(tiny_model(), LIKE, Evolution("cppn"))
    with pytest.raises(DoesNotFit, match="needs class scores"):
        fooling(nn.Conv2d(1, 1, 1), GREY, SHORT)
    with pytest.raises(DoesNotFit, match="whole numbers"):
        fooling(Grey(), GREY.long(), SHORT)

    class Hidden(Grey):
        def forward(self, x):
            return super().forward(x.detach().round()).detach()

    assert fooling(Hidden(), GREY, SHORT).median[-1] > 0.5  # it needs no gradient
    with pytest.raises(DoesNotFit, match="passes none on"):
        ascent(Hidden(), GREY, steps=1)
