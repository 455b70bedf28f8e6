"""Branch and bound on inputs and neurons: networks whose least value is known, and bounds against samples."""

import copy
import itertools
import math
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.graph import capture
from netweight.verification import neurons
from netweight.verification.branch import (
    Boxes,
    Goals,
    Overtime,
    Tally,
    bounding,
    halves,
    mixture,
    pulls,
    split_inputs,
)
from netweight.verification.counterexample import Search, twin
from netweight.verification.neurons import children, errors, first, split_neurons
from netweight.verification.subdomains import Posed, optimised, root_of
from netweight.verification.vnnlib import Case, Unsafe

SOON = 60.0


def network(sizes, seed, act=nn.ReLU):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for layer in layers:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
        layer.bias.data = torch.randn(layer.bias.shape, generator=generator) * 0.5
    return nn.Sequential(*[part for layer in layers for part in (layer, act())][:-1])


@cache
def captured(sizes, seed, act=nn.ReLU):
    """(the network in float32, its graph, its float64 twin)."""
    model, shape = network(sizes, seed, act), (1, sizes[0])
    return model, capture(model, torch.zeros(shape)), twin(model, shape)


def box(inputs, *unsafe, radius=1.0):
    """unsafe: lists of (row, limit)."""
    ends = torch.full((inputs,), radius).double()
    sets = (Unsafe(*(torch.tensor(part, dtype=torch.float64) for part in zip(*one))) for one in unsafe)
    return Case(-ends, ends, tuple(sets))


def least(model, row, radius=1.0):
    """min <row, y> over the box for one hidden layer and two inputs: it lies where two of the lines cross at
    which a neuron or the box has its edge."""
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    eye = torch.eye(2).double()
    lines = [(w, -b) for w, b in zip(weight, bias)]
    lines += [(eye[i], torch.tensor(side).double()) for i in range(2) for side in (-radius, radius)]
    corners = []
    for (w, c), (v, d) in itertools.combinations(lines, 2):
        crossing = torch.stack([w, v])
        if abs(float(torch.linalg.det(crossing))) > 1e-9:
            x = torch.linalg.solve(crossing, torch.stack([c, d]))
            if bool((x.abs() <= radius + 1e-9).all()):
                corners.append(x)
    outputs = twin(model, (1, 2)).outputs(torch.stack(corners))
    return float((outputs @ torch.tensor(row).double()).min())


def outcome(split, model, shape, cases):
    tally = Tally(time.monotonic() + SOON)
    found = split(capture(model, torch.zeros(shape)), Search(twin(model, shape)), cases, "real", tally)
    return found, tally


def neurons_of(graph, search, cases, arithmetic, tally):
    """Where no neuron is left to split, inputs are: a linear program that Adam did not solve."""
    found = split_neurons(graph, search, cases[0], arithmetic, tally)
    return found if found or not tally.left else split_inputs(graph, search, cases, arithmetic, tally)


def test_a_subdomain_without_open_neurons_ends_the_search_undecided():
    """|x - 1/3| >= 0: both neurons split, the bound is 0 up to rounding, which is no proof."""
    model = network((1, 2, 1), 0)
    model[0].weight.data, model[0].bias.data = torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, 1.0]) / 3
    model[2].weight.data, model[2].bias.data = torch.tensor([[1.0, 1.0]]), torch.zeros(1)

    def alone(graph, search, cases, arithmetic, tally):
        return split_neurons(graph, search, cases[0], arithmetic, tally)

    found, tally = outcome(alone, model, (1, 1), [box(1, [([1.0], -1e-13)])])
    assert found is None and tally.left > 0 and -1e-4 < tally.bound <= 0


WAYS = pytest.mark.parametrize("split", [split_inputs, neurons_of], ids=["inputs", "neurons"])


# Known answers -------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("seed", range(3))
def test_what_holds_is_proven_and_what_does_not_is_refuted(split, seed):
    model = network((2, 7, 2), seed)
    value = least(model, [1.0, -1.0])
    found, tally = outcome(split, model, (1, 2), [box(2, [([1.0, -1.0], value - 1e-2)])])
    assert found is None and tally.left == 0 and 0 < tally.bound <= 1e-2
    found, tally = outcome(split, model, (1, 2), [box(2, [([1.0, -1.0], value + 1e-2)])])
    assert found is not None and float(found.y[0] - found.y[1]) <= value + 1e-2
    assert bool((found.x.abs() <= 1).all())


@WAYS
def test_a_conjunction_needs_a_mixture_of_its_rows(split):
    """y = (t, -t) over t in [-1, 1]: y0 <= -e and y1 <= -e never hold together, though each does."""
    model = nn.Linear(1, 2)
    model.weight.data, model.bias.data = torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
    model = nn.Sequential(model, nn.Hardtanh(-5.0, 5.0), nn.Identity())
    found, tally = outcome(split, model, (1, 1), [box(1, [([1.0, 0.0], -1e-3), ([0.0, 1.0], -1e-3)])])
    assert found is None and tally.left == 0 and tally.domains == 1


@WAYS
def test_each_unsafe_set_has_to_be_missed(split):
    model = network((2, 7, 2), 5)
    low, high = least(model, [1.0, 0.0]), -least(model, [-1.0, 0.0])
    case = box(2, [([1.0, 0.0], low - 0.05)], [([-1.0, 0.0], -high - 0.05)])
    found, tally = outcome(split, model, (1, 2), [case])
    assert found is None and tally.left == 0 and 0 < tally.bound <= 0.05
    case = box(2, [([1.0, 0.0], low - 0.05)], [([-1.0, 0.0], -high + 0.05)])
    found, _ = outcome(split, model, (1, 2), [case])
    assert found is not None and float(found.y[0]) >= high - 0.05


def test_boxes_are_decided_together_and_the_unsafe_one_is_named():
    model = network((2, 7, 2), 6)
    value = least(model, [1.0, 0.0])
    fine, wrong = box(2, [([1.0, 0.0], value - 0.1)]), box(2, [([1.0, 0.0], value + 0.1)])
    found, tally = outcome(split_inputs, model, (1, 2), [fine] * 5)
    assert found is None and tally.left == 0
    found, _ = outcome(split_inputs, model, (1, 2), [fine, fine, wrong, fine])
    assert found is not None and found.case is wrong


@pytest.mark.parametrize(("act", "gap"), [(nn.ReLU, 0.5), (nn.Sigmoid, 0.03), (nn.Hardtanh, 0.5)])
def test_neurons_of_other_functions_are_split_too(act, gap):
    model = network((3, 8, 8, 1), 3, act)
    x = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    lowest = float(twin(model, (1, 3)).outputs(x).min())
    found, tally = outcome(neurons_of, model, (1, 3), [box(3, [([1.0], lowest - gap)])])
    assert found is None and tally.left == 0 and 0 < tally.bound <= gap and tally.domains > 1
    found, _ = outcome(neurons_of, model, (1, 3), [box(3, [([1.0], lowest + 1e-2)])])
    assert found is not None and float(found.y[0]) <= lowest + 1e-2


# What is claimed of a part, against samples of it --------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    net=st.integers(0, 3),
    seed=st.integers(0, 2**20),
    arithmetic=st.sampled_from(["real", "float32", "float64"]),
)
def test_no_sample_of_a_box_is_below_its_margin(net, seed, arithmetic):
    _, graph, double = captured((3, 6, 6, 3), net)
    generator = torch.Generator().manual_seed(seed)
    case = box(3, [([1.0, -1.0, 0.0], 0.3), ([0.0, 1.0, 1.0], -0.2)], [([0.0, -1.0, 2.0], 0.1)])
    ends = (torch.rand(2, 5, 3, generator=generator).double() * 2 - 1).sort(0).values
    boxes = Boxes(ends[0], ends[1], torch.zeros(5, dtype=torch.long), torch.zeros(5).double())
    goals = Goals.of([case])
    found = bounding(graph, boxes, goals.rows[boxes.case], goals.limits[boxes.case], arithmetic)
    share = torch.rand(1000, 5, 3, generator=generator).double()
    x = boxes.lower + (boxes.upper - boxes.lower) * share
    excess = case.excess(double.outputs(x.flatten(0, 1))).reshape(1000, 5)
    assert (excess.amin(0) >= found.margin).all() and found.margin.isfinite().all()
    assert ((found.worst == boxes.lower) | (found.worst == boxes.upper)).all()


@settings(max_examples=30, deadline=None)
@given(net=st.integers(0, 2), seed=st.integers(0, 2**20), act=st.sampled_from([nn.ReLU, nn.Sigmoid]))
def test_no_sample_of_a_subdomain_is_below_its_margin_whatever_the_multipliers(net, seed, act):
    """Random splits around a point, slopes, multipliers and row weights: each of them gives a bound."""
    model, graph, _ = captured((3, 6, 6, 2), net, act)
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(model).double()
    case = box(3, [([1.0, -1.0], 0.3), ([0.0, 1.0], -0.2)])
    root, goals = root_of(graph, case, "real"), Goals.of([case])
    x = torch.rand(3000, 3, generator=generator).double() * 2 - 1
    values = {"linear": model[:1](x).detach(), "linear_1": model[:3](x).detach()}
    z = torch.cat([values[slot.name][:, slot.index] for slot in root.slots], 1)
    parts = first(root, goals).take(torch.zeros(6, dtype=torch.long))
    cut = parts.lower + (parts.upper - parts.lower) * torch.rand(parts.lower.shape, generator=generator)
    split = torch.rand(cut.shape, generator=generator) < 0.3
    parts = replace(
        parts,
        lower=torch.where(split & (z[:6] >= cut), cut, parts.lower),
        upper=torch.where(split & (z[:6] < cut), cut, parts.upper),
        alpha=torch.rand(parts.alpha.shape, generator=generator),
        beta=torch.randn(parts.beta.shape, generator=generator),
        weight=torch.randn(parts.weight.shape, generator=generator),
    )
    with torch.no_grad():
        margin = Posed.of(root, parts, goals).margin(parts.alpha, parts.beta, parts.weight)
    inside = ((z >= parts.lower[:, None]) & (z <= parts.upper[:, None])).all(2)
    excess = case.excess(model(x).detach()).expand(6, -1).masked_fill(~inside, math.inf)
    assert len(root.slots) == 2 and inside.any(1).all() and split.any()
    assert (excess.amin(1) >= margin - 1e-9).all() and margin.isfinite().all()


def test_optimising_and_splitting_never_loosen_and_children_cover_their_parent():
    model = network((3, 8, 8, 1), 11)
    case = box(3, [([1.0], -3.0)])
    root, goals = root_of(capture(model, torch.zeros(1, 3)), case, "real"), Goals.of([case])
    start = first(root, goals)
    better = optimised(Posed.of(root, start, goals), 20, lambda: None)
    assert float(better.margin) > float(start.margin)
    cost, middle, worst = errors(Posed.of(root, better, goals))
    assert (cost >= -1e-5).all() and (middle == 0).all() and (worst.abs() == 1).all()
    both, rest = children(Posed.of(root, better, goals), cost, middle, goals)
    assert len(both) == 2 and len(rest) == 0 and (both.margin >= better.margin).all()
    changed = ((both.lower != better.lower) | (both.upper != better.upper)).nonzero()
    assert changed[:, 0].tolist() == [0, 1] and len(set(changed[:, 1].tolist())) == 1
    place = changed[0, 1]
    assert both.upper[0, place] == 0 == both.lower[1, place]
    for _ in range(3):
        both = optimised(Posed.of(root, both, goals), 20, lambda: None)
        posed = Posed.of(root, both, goals)
        after = children(posed, *errors(posed)[:2], goals)[0]
        assert (after.margin.unflatten(0, (2, -1)) >= both.margin).all()
        both = after
    signs = torch.sign(both.beta)
    assert ((signs <= 0) | (both.upper < start.upper)).all() and (
        (signs >= 0) | (both.lower > start.lower)
    ).all()
    without = replace(both, beta=torch.zeros_like(both.beta), margin=torch.full_like(both.margin, -math.inf))
    assert (neurons.bounded(root, without, goals).margin < both.margin - 1e-3).any()


# The parts of it -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_mixtures_are_shares_and_near_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(3, 1, 2, 4, generator=generator).double()
    margins = -torch.rand(3, 1, 2, generator=generator).double()
    radius = torch.rand(3, 4, generator=generator).double()
    shares = mixture(A, margins, radius)
    assert (shares >= 0).all() and torch.allclose(shares.sum(2), torch.ones(3, 1).double())
    h = margins + (A.abs() * radius[:, None, None]).sum(3)

    def value(s):
        return (s * h).sum(2) - ((s.unsqueeze(3) * A).sum(2).abs() * radius[:, None]).sum(2)

    grid = [value(torch.tensor([t, 1 - t]).double().expand(3, 1, 2)) for t in torch.linspace(0, 1, 201)]
    best, single = torch.stack(grid).amax(0), margins.amax(2)
    assert (torch.maximum(value(shares), single) >= best - 0.1 * (best - single) - 0.05).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), room=st.integers(0, 40))
def test_halves_tile_their_box(seed, room):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(-4, 5, (2, 3, 3), generator=generator).double().sort(0).values
    boxes = Boxes(ends[0], ends[1], torch.arange(3), torch.zeros(3).double())
    parts, whole = halves(boxes, torch.rand(3, 3, generator=generator).double(), room)
    points = torch.rand(300, 3, 3, generator=generator).double()
    points = boxes.lower + (boxes.upper - boxes.lower) * points
    both = parts.joined(whole)
    for i in range(3):
        own = both.take((both.case == i).nonzero()[:, 0])
        inside = (points[:, None, i] >= own.lower) & (points[:, None, i] <= own.upper)
        assert inside.all(2).any(1).all()
        assert (own.lower >= boxes.lower[i]).all() and (own.upper <= boxes.upper[i]).all()
        sizes = (own.upper - own.lower).prod(1).sum()
        assert float(sizes) == float((boxes.upper[i] - boxes.lower[i]).prod())
    points_only = (boxes.lower == boxes.upper).all(1)
    assert sorted(whole.case.tolist()) == points_only.nonzero()[:, 0].tolist()
    assert len(parts) <= max(room, 2 * 3)


def test_inputs_that_do_not_matter_do_not_pull():
    model = network((3, 8, 1), 1)
    model[0].weight.data[:, 1] = 0
    case = box(3, [([1.0], 0.0)])
    boxes = Boxes(
        case.lower[None], case.upper[None], torch.zeros(1, dtype=torch.long), torch.zeros(1).double()
    )
    goals = Goals.of([case])
    found = pulls(capture(model, torch.zeros(1, 3)), boxes, goals.rows, goals.limits, "real")[0]
    assert found[1] == 0 < min(found[0], found[2])


@WAYS
def test_a_search_stops_when_the_time_is_up_and_keeps_what_it_knows(split):
    """N(x) - N(x) >= 0 holds, but no bound of a box sees that the two are the same."""
    half, model = network((8, 24, 24, 1), 2), network((8, 48, 48, 1), 2)
    for mine, twice in zip(half[::2], model[::2]):
        mine.bias.data, twice.bias.data = torch.zeros_like(mine.bias), torch.zeros_like(twice.bias)
    model[0].weight.data = half[0].weight.data.repeat(2, 1)
    model[2].weight.data = torch.block_diag(half[2].weight.data, half[2].weight.data)
    model[4].weight.data = torch.cat([half[4].weight.data, -half[4].weight.data], 1)
    looking, graph = Search(twin(model, (1, 8))), capture(model, torch.zeros(1, 8))
    tally, begun = Tally(time.monotonic() + 2), time.monotonic()
    with pytest.raises(Overtime):
        split(graph, looking, [box(8, [([1.0], -1e-3)])], "real", tally)
    assert time.monotonic() - begun < 10 and tally.left > 0 and tally.domains > 0
    assert -math.inf < tally.bound <= 0


def test_a_point_that_rounding_leaves_open_is_not_proven():
    """x - 1 at x = 1 is 0; that it is above -1e-9 is more than a proof in float32 can tell."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    for layer, bias in zip(model[::2], (0.0, -1.0)):
        layer.weight.data, layer.bias.data = torch.ones(1, 1), torch.tensor([bias])
    unsafe = box(1, [([1.0], -1e-9)]).unsafe
    one = torch.ones(1, dtype=torch.float64)
    found, tally = outcome(split_inputs, model, (1, 1), [Case(one, one, unsafe)])
    assert found is None and tally.left == 1 and -1e-4 < tally.bound <= 0


def test_the_worst_point_of_a_linear_network_is_its_least():
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU())
    model[0].weight.data, model[0].bias.data = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([9.0])
    case = box(3, [([1.0], 0.0)])
    boxes = Boxes(
        case.lower[None], case.upper[None], torch.zeros(1, dtype=torch.long), torch.zeros(1).double()
    )
    goals = Goals.of([case])
    found = bounding(capture(model, torch.zeros(1, 3)), boxes, goals.rows, goals.limits, "real")
    assert found.worst.tolist() == [[-1.0, 1.0, -1.0]] and abs(float(found.margin) - 5.5) < 1e-4
