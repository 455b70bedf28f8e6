"""CPPNs: no cycles whatever happens to them, functions by hand, and mutations at the rates that are said."""

import colorsys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core import cppn
from netweight.core.cppn import FUNCTIONS, INPUTS, Genome, first, mutated, painted, places, polynomial, rgb


def grown(seed: int, generations: int, outputs: int = 1) -> Genome:
    chance = np.random.default_rng(seed)
    genome = first(outputs, chance)
    for _ in range(generations):
        genome = mutated(genome, chance)
    return genome


@given(st.integers(0, 999), st.integers(0, 60), st.sampled_from([1, 3]))
@settings(max_examples=40, deadline=None)
def test_whatever_is_mutated_stays_a_network_without_cycles(seed, generations, outputs):
    genome = grown(seed, generations, outputs)
    rank = {neuron: number for number, neuron in enumerate([*range(INPUTS), *genome.order])}
    assert genome.order[-outputs:] == tuple(range(INPUTS, INPUTS + outputs))  # the outputs themselves stay
    assert len(rank) == INPUTS + len(genome.order) and set(genome.functions) == set(genome.order)
    assert all(rank[start] < rank[end] and end >= INPUTS for start, end in genome.weights)
    assert not any(start in genome.order[-outputs:] for start, _ in genome.weights)
    assert all(abs(weight) <= cppn.LARGEST for weight in genome.weights.values())
    image = painted(genome, places(5, 7))
    assert image.shape == (outputs, 35) and image.min() >= 0 and image.max() <= 1
    again = grown(seed, generations, outputs)
    assert again.weights == genome.weights and np.array_equal(painted(again, places(5, 7)), image)


def test_a_parent_is_left_as_it_is_and_networks_grow():
    chance = np.random.default_rng(0)
    genome = grown(1, 20)
    order, weights = genome.order, dict(genome.weights)
    children = [mutated(genome, chance) for _ in range(200)]
    assert genome.order == order and genome.weights == weights
    assert any(len(child.order) < len(order) for child in children)
    assert np.mean([len(child.order) for child in children]) > len(order)
    kept = [
        child.weights[ends] == w for child in children for ends, w in weights.items() if ends in child.weights
    ]
    assert 0.85 < np.mean(kept) < 0.95  # each weight moves with chance 0.1
    steps = [
        abs(child.weights[ends] - w)
        for child in children
        for ends, w in weights.items()
        if abs(w) < 6 and child.weights.get(ends, w) != w
    ]
    assert 0.6 < np.median(steps) < 1.1  # 20 times the median of the polynomial mutation, 1 - 0.5^(1/16)


@pytest.mark.parametrize(
    ("function", "value"),
    [
        ("sine", np.sin(1.5)),
        ("sigmoid", 2 / (1 + np.exp(-1.5)) - 1),
        ("gaussian", np.exp(-2.25)),
        ("linear", 0.5),
    ],
)
def test_functions_by_hand(function, value):
    genome = Genome((4,), {4: function}, {(0, 4): -3.0}, 1)
    image = painted(genome, np.array([[-0.5], [9.0], [9.0], [1.0]]))
    assert image[0, 0] == pytest.approx(abs(value))
    assert function in FUNCTIONS


def test_a_chain_with_the_linear_function_clipped_at_three():
    genome = Genome((5, 4), {4: "linear", 5: "linear"}, {(3, 5): 10.0, (5, 4): -1.5, (0, 4): 0.0}, 1)
    assert painted(genome, places(1, 1))[0, 0] == pytest.approx(0.5)  # clip(10) / 3 = 1, |-1.5 / 3|


@given(st.sampled_from(FUNCTIONS), st.floats(-10, 10))
def test_with_the_constant_input_alone_the_image_is_constant(function, weight):
    image = painted(Genome((4,), {4: function}, {(3, 4): weight}, 1), places(6, 6))
    assert np.ptp(image) == 0


def test_places_are_normalised_and_symmetric():
    x, y, distance, one = places(3, 5)
    assert x.reshape(3, 5)[0].tolist() == [-1, -0.5, 0, 0.5, 1] and y.reshape(3, 5)[:, 0].tolist() == [
        -1,
        0,
        1,
    ]
    assert distance.max() == pytest.approx(2**0.5) and distance.reshape(3, 5)[1, 2] == 0 and (one == 1).all()


@given(st.floats(1, 40))
@settings(max_examples=20)
def test_the_polynomial_mutation_has_mean_zero_and_is_symmetric(shape):
    u = (np.arange(20000) + 0.5) / 20000
    step = polynomial(u, shape)
    assert step.min() > -1 and step.max() < 1 and abs(step.mean()) < 1e-9
    assert np.mean(step < 0) == 0.5 and np.allclose(step, -step[::-1])
    assert np.mean(np.abs(step)) == pytest.approx(
        1 / (shape + 2), rel=1e-3
    )  # the mean of 1 - v^(1 / (shape + 1))


def test_colours_are_those_of_the_standard_library():
    hls = np.random.default_rng(0).random((3, 50))
    assert np.allclose(rgb(hls), np.array([colorsys.hls_to_rgb(*one) for one in hls.T]).T)
