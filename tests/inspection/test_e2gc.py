"""The energy model against its definitions, closed forms against searches, the fit on planted constants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import capture, layer_macs
from netweight.inspection.e2gc import (
    Constants,
    Conv,
    agreement,
    balance,
    best_size,
    choose,
    convolutions,
    e2gc,
    equal,
    features,
    fit,
    on_this_machine,
    readings,
    snapped,
)
from netweight.testing import tiny_model, tiny_task

positive = st.floats(0.01, 100)
GIVEN = Constants(compute=1.0, data=2000.0)


def layer(channels: int, side: int, size: int) -> Conv:
    return Conv(channels, channels, 9, side * side, side * side, size)


def test_by_hand():
    conv = Conv(4, 8, 9, 16, 4, 2)
    assert conv.macs == 8 * 2 * 9 * 4 and conv.weights == 8 * 2 * 9
    assert conv.moved == 4 * 16 + 8 * 4 + 144
    assert conv.ratio == 2.0
    assert features(conv) == (576, 32 * 240 / 576, 240, 1.0)
    constants = Constants(1.0, 3.0, 0.5, 7.0)
    assert constants.energy(conv) == pytest.approx(576 + 3 * 32 * 240 / 576 + 120 + 7)


@settings(deadline=None)
@given(positive, positive, st.sampled_from([1, 9, 25]), st.floats(0.1, 8), st.integers(1, 4096))
def test_the_balance_is_that_of_the_intensity_and_least_at_the_closed_form(compute, data, taps, r, places):
    best = best_size(Constants(compute, data), taps, r)

    def j(size):
        return balance(size, compute, data, taps, r, places)

    slope = (j(best * (1 + 1e-6)) - j(best * (1 - 1e-6))) / (2e-6 * best)
    assert abs(slope) <= 1e-6 * j(best) / best + 1e-9
    sizes = np.geomspace(best / 50, best * 50, 101)
    assert all(j(best) <= j(size) * (1 + 1e-12) for size in sizes)
    values = [j(size) for size in np.linspace(best / 2, best * 2, 31)]
    assert (np.diff(values, 2) >= -1e-9 * max(values)).all()  # convex


@settings(deadline=None)
@given(st.sampled_from([8, 32, 64]), st.sampled_from([1, 3, 8]), st.sampled_from([1, 2, 4, 8]))
def test_the_balance_of_a_layer_is_its_intensity(channels, side, size):
    one = layer(channels, side, size)
    j = balance(size, 2.0, 5.0, 9, one.ratio, one.places)
    assert j == pytest.approx(2.0 * size * 9 + 5.0 / one.intensity)
    assert Constants(2.0, 5.0).energy(one) == pytest.approx(one.outputs * one.places * j)


def test_a_size_that_the_channels_allow():
    assert snapped(6.4, [32, 64]) == 8 and snapped(5.0, [32, 64]) == 4
    assert snapped(100.0, [12, 32]) == 4 and snapped(0.0, [7]) == 1
    assert snapped(math.inf, [32]) == 32


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 2))
def test_equal_sizes_are_best_for_a_convex_cost(seed, place):
    draw = np.random.default_rng(seed)
    layers = [layer(int(2 ** draw.integers(4, 8)), int(draw.integers(1, 9)), 1) for _ in range(4)]
    size = (2, 4, 8)[place]
    a, b, c = draw.uniform(0.1, 2, 3)

    def cost(one):
        return one.outputs * one.places * (a * one.size + b / one.size + c * one.size**2)

    ceiling = float(sum(one.sized(size).macs for one in layers))
    assert equal(layers, ceiling) == pytest.approx(size)
    best = sum(cost(one.sized(g)) for one, g in zip(layers, choose(layers, (1, 2, 4, 8, 16), ceiling, cost)))
    least = min(sum(cost(one.sized(g)) for one in layers) for g in (1, 2, 4, 8, 16) if g <= size)
    assert best <= least * (1 + 1e-9)
    # among costs that only fall with G, the whole ceiling is used, by equal sizes
    chosen = choose(layers, (1, 2, 4, 8, 16), ceiling, lambda one: one.outputs * one.places * b / one.size)
    falling = sum(one.outputs * one.places / g for one, g in zip(layers, chosen))
    assert falling == pytest.approx(sum(one.outputs * one.places / size for one in layers))


def test_unequal_costs_are_chosen_layer_by_layer_as_by_all_choices():
    import itertools

    layers = [layer(8, 4, 1), layer(16, 2, 1), layer(32, 1, 1)]
    weight = {8: 1.0, 16: 5.0, 32: 0.3}

    def cost(one):
        return weight[one.inputs] * one.outputs * one.places / one.size

    ceiling = 9000.0
    every = [
        (sum(cost(o) for o in picked), [o.size for o in picked])
        for picked in itertools.product(*([one.sized(g) for g in (1, 2, 4, 8)] for one in layers))
        if sum(o.macs for o in picked) <= ceiling
    ]
    chosen = choose(layers, (1, 2, 4, 8), ceiling, cost)
    assert sum(cost(one.sized(g)) for one, g in zip(layers, chosen)) == pytest.approx(min(every)[0])
    with pytest.raises(DoesNotFit, match="the smallest possible sum is"):
        choose(layers, (1, 2, 4, 8), 10.0, cost)
    with pytest.raises(DoesNotFit, match="none of the group sizes"):
        choose(layers, (3,), ceiling, cost)


@settings(deadline=None)
@given(st.integers(0, 2**16))
def test_planted_constants_are_found_again(seed):
    draw = np.random.default_rng(seed)
    planted = Constants(*(10.0 ** draw.uniform(-2, 2, 4)))
    layers = [layer(m, s, g) for m in (32, 64, 256) for s in (2, 8, 16) for g in (2, 8, 32)]
    found = fit(layers, [planted.energy(one) for one in layers])
    assert [found.energy(one) for one in layers] == pytest.approx(
        [planted.energy(one) for one in layers], rel=1e-4
    )
    assert found.fit == pytest.approx(1.0, abs=1e-6)
    noisy = fit(layers, [planted.energy(one) * draw.uniform(0.5, 2) for one in layers])
    assert noisy.fit < 1 and min(noisy.compute, noisy.data, noisy.move, noisy.start) >= 0


def test_agreement_is_one_minus_errors_over_spread():
    assert agreement(np.exp([0.0, 1.0, 2.0]), np.exp([0.0, 1.0, 3.0])) == pytest.approx(1 - 1 / (14 / 3))


def test_counted_macs_are_those_of_the_graph():
    model, x = tiny_model(), tiny_task().test.x[:1]
    graph = capture(model, x)
    layers, left = convolutions(graph)
    counts = layer_macs(graph)
    assert {one.name: one.macs for one in layers} == {name: counts[name] for name in ("0", "3")}
    assert [one.size for one in layers] == [4, 8] and not left
    assert (layers[1].places_in, layers[1].places) == (36, 9)


def test_macs_do_not_grow_with_the_batch_and_what_is_not_modelled_is_named():
    net = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose1d(8, 4, 2))
    one, two = (convolutions(capture(net, torch.zeros(b, 4, 10))) for b in (1, 3))
    assert one == two
    assert one[0][0].macs == 8 * 2 * 3 * 8 and one[1] == {"2": "it is transposed"}


def test_advice_for_a_network():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 64, 1),
        nn.Conv2d(64, 64, 3, 2, 1),
    )
    found = e2gc(net.eval(), torch.zeros(1, 3, 8, 8), constants=GIVEN)
    first, second, point, last = found.layers
    assert found.size == snapped(np.average([second.best, last.best], weights=[2048, 1024]), [32, 64]) == 8
    assert (first.recommended, point.recommended) == (3, 32)
    assert second.recommended == last.recommended == 8
    assert second.best == best_size(GIVEN) and last.best == best_size(GIVEN, 9, 4.0)
    assert (
        second.joules_recommended
        == GIVEN.energy(layer(32, 8, 8))
        < second.joules
        == GIVEN.energy(layer(32, 8, 32))
    )


def test_constants_of_this_machine_and_stacks():
    grid = [(16, 8, 2), (16, 8, 8), (32, 4, 4), (32, 4, 16), (64, 4, 8)]
    constants, rows = on_this_machine(grid, runs=2)
    assert len(rows) == 5 and all(joules > 0 for _, joules in rows)
    assert constants.how and constants.fit <= 1
    found = readings({"one": [layer(16, 8, 4)], "five": [layer(16, 8, 4)] * 5}, runs=5)
    assert found["one"].joules < found["five"].joules


def test_nonsense_is_named():
    with pytest.raises(BadInput, match="joules are finite and not below 0"):
        Constants(-1.0, 1.0)
    with pytest.raises(BadInput, match="3 layers, 3 energies: fit at least 4"):
        fit([layer(8, 2, 2)] * 3, [1.0] * 3)
    with pytest.raises(BadInput, match="an energy above 0"):
        fit([layer(8, 2, 2)] * 4, [1.0, 1.0, 0.0, math.nan])
    with pytest.raises(DoesNotFit, match="do not divide into groups of 3"):
        layer(8, 2, 2).sized(3)
    with pytest.raises(DoesNotFit, match="has no convolution"):
        e2gc(nn.Linear(2, 2), torch.zeros(1, 2), constants=GIVEN)
    assert best_size(Constants(0.0, 1.0)) == math.inf
