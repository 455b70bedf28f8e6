"""CPPNs: small growing networks that map the place of a pixel to its value, and how they are mutated.

Papers: Stanley, "Compositional pattern producing networks", Genetic Programming and Evolvable Machines 2007;
the functions and rates are those of Nguyen, Yosinski and Clune 2015, arXiv:1412.1897, on MNIST.

    inputs      x, y in [-1, 1], distance from the centre, 1
    neuron      f( sum_j w_j input_j ),   f one of  sin p, 2 / (1 + e^-p) - 1, e^(-p^2), clip(p, -3, 3) / 3
    image       | output |: one output for grey; three are hue, lightness and saturation

A genome begins as inputs wired to outputs. A child is a copy of one parent, mutated: with the chances of
`RATES` a connection is added, deleted or led elsewhere, a connection is split by a neuron, a neuron deleted;
each weight moves with chance `RATE` by a polynomial mutation, each neuron draws its function anew with it.
Connections lead from earlier to later neurons alone and from no output, so that there are no cycles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

INPUTS = 4
FUNCTIONS = ("sine", "sigmoid", "gaussian", "linear")
RATES = {"add": 0.5, "delete": 0.3, "change": 0.5, "split": 0.5, "delete neuron": 0.2}
RATE, SHAPE, LARGEST = 0.1, 15.0, 10.0  # of weights and functions; of the polynomial; weights are in +-10
Weights = dict[tuple[int, int], float]


@dataclass(frozen=True, eq=False)
class Genome:
    """One network. 0 to 3 are its inputs.

    order: the neurons from first to last, the outputs at the end. functions: of each neuron. weights: by
    (from, to). outputs: how many there are.
    """

    order: tuple[int, ...]
    functions: Mapping[int, str]
    weights: Mapping[tuple[int, int], float]
    outputs: int


def first(outputs: int, chance: np.random.Generator) -> Genome:
    """Inputs wired to outputs, with random weights and functions."""
    order = tuple(range(INPUTS, INPUTS + outputs))
    functions = {neuron: _function(chance) for neuron in order}
    weights = {(i, neuron): _weight(chance) for neuron in order for i in range(INPUTS)}
    return Genome(order, functions, weights, outputs)


def mutated(genome: Genome, chance: np.random.Generator, rate: float = RATE) -> Genome:
    """A child. rate: of weights and functions."""
    order, weights = list(genome.order), dict(genome.weights)
    functions = {n: _function(chance) if chance.random() < rate else f for n, f in genome.functions.items()}
    happens = {name: chance.random() < share for name, share in RATES.items()}
    hidden = order[: len(order) - genome.outputs]
    if happens["delete neuron"] and hidden:
        gone = hidden[chance.integers(len(hidden))]
        order.remove(gone)
        del functions[gone]
        weights = {ends: w for ends, w in weights.items() if gone not in ends}
    if happens["delete"] and weights:
        del weights[_one(weights, chance)]
    if happens["change"] and weights:
        weight = weights.pop(_one(weights, chance))
        _connect(order, genome.outputs, weights, weight, chance)
    if happens["add"]:
        _connect(order, genome.outputs, weights, _weight(chance), chance)
    if happens["split"] and weights:
        start, end = _one(weights, chance)
        new = max(order) + 1
        order.insert(min(order.index(end), len(order) - genome.outputs), new)
        functions[new] = _function(chance)
        weights[new, end] = weights.pop((start, end))
        weights[start, new] = _weight(chance)
    for ends in [ends for ends in weights if chance.random() < rate]:
        moved = weights[ends] + 2 * LARGEST * float(polynomial(chance.random(1), SHAPE)[0])
        weights[ends] = min(max(moved, -LARGEST), LARGEST)
    return Genome(tuple(order), functions, weights, genome.outputs)


def polynomial(u: Float[np.ndarray, "*n"], shape: float) -> Float[np.ndarray, "*n"]:
    """The polynomial mutation: of u in [0, 1), a step in (-1, 1); the larger `shape`, the smaller it is."""
    power = 1 / (shape + 1)
    return np.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 * (1 - u)) ** power)


def places(height: int, width: int) -> Float[np.ndarray, "4 pixels"]:
    """The inputs at each pixel, row by row."""
    y, x = (np.linspace(-1, 1, side) if side > 1 else np.zeros(1) for side in (height, width))
    y, x = (grid.ravel() for grid in np.meshgrid(y, x, indexing="ij"))
    return np.stack([x, y, np.hypot(x, y), np.ones_like(x)])


def painted(genome: Genome, inputs: Float[np.ndarray, "4 pixels"]) -> Float[np.ndarray, "outputs pixels"]:
    """|output| at each pixel, in [0, 1]."""
    incoming: dict[int, list[tuple[int, float]]] = {neuron: [] for neuron in genome.order}
    for (start, end), weight in genome.weights.items():
        incoming[end].append((start, weight))
    values = dict(enumerate(inputs))
    for neuron in genome.order:
        p = np.zeros(inputs.shape[1])
        for start, weight in incoming[neuron]:
            p = p + weight * values[start]
        values[neuron] = _applied(genome.functions[neuron], p)
    return np.abs(np.stack([values[neuron] for neuron in genome.order[-genome.outputs :]]))


def rgb(hls: Float[np.ndarray, "3 pixels"]) -> Float[np.ndarray, "3 pixels"]:
    """Red, green and blue of hue, lightness and saturation, all in [0, 1]."""
    hue, lightness, saturation = hls
    reach = saturation * np.minimum(lightness, 1 - lightness)
    k = (np.array([0, 8, 4])[:, None] + 12 * hue) % 12
    return lightness - reach * np.clip(np.minimum(k - 3, 9 - k), -1, 1)


def _applied(function: str, p: Float[np.ndarray, " pixels"]) -> Float[np.ndarray, " pixels"]:
    if function == "sine":
        return np.sin(p)
    if function == "sigmoid":
        return np.tanh(p / 2)
    if function == "gaussian":
        return np.exp(-np.square(p))
    return np.clip(p, -3, 3) / 3


def _connect(
    order: list[int], outputs: int, weights: Weights, weight: float, chance: np.random.Generator
) -> None:
    """A connection to a neuron from an earlier one that is no output; none where chance hits one there is."""
    to = chance.integers(len(order))
    start = int(chance.integers(INPUTS + min(to, len(order) - outputs)))
    ends = (start if start < INPUTS else order[start - INPUTS], order[to])
    weights.setdefault(ends, weight)


def _one(weights: Weights, chance: np.random.Generator) -> tuple[int, int]:
    return [*weights][chance.integers(len(weights))]


def _function(chance: np.random.Generator) -> str:
    return FUNCTIONS[chance.integers(len(FUNCTIONS))]


def _weight(chance: np.random.Generator) -> float:
    return float(chance.uniform(-LARGEST, LARGEST))
