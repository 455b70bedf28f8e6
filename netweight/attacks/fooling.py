"""Fooling images: what a network is sure to see in images that show nothing.

Paper: Nguyen, Yosinski and Clune, "Deep Neural Networks are Easily Fooled: High Confidence Predictions for
Unrecognizable Images", CVPR 2015, arXiv:1412.1897.

Two searches over all images, not over a set around one:

    MAP-Elites    one cell per class c holds the genome with the largest p_c seen. A generation draws pairs of
                  parents from the cells, varies them, and every child enters every cell where its p_c is
                  larger. Genomes are pixels ("direct") or networks that paint them ("cppn", `core.cppn`)
    ascent        X <- clip(X),  X <- m + (1 - DECAY) (X - m + a g),   g = grad p_c,  m the mean image,
                  a = min(EARLY, LATE (1 - p_c)) / |g|^2,  so that p_c is to rise by a |g|^2

p are softmax outputs. Direct variation: simulated binary crossover of a pair with chance 1/2 (eta 10), then
each pixel moves with chance 0.1, halved every 1,000 generations, by a polynomial mutation (eta 15), clipped.

Differs from the paper: direct colour genomes are RGB (there HSV); coordinates of CPPNs are normalised (on
MNIST there x and y are pixel numbers); ascent without blur and without small pixels set to 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core import cppn, progress
from netweight.core.ascent import per_example, slope
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.victim import Victim, victim

ENCODINGS = ("direct", "cppn")
RATE, MUTATION, CROSSING, CROSSED, HALVED = 0.1, 15.0, 10.0, 0.5, 1000
DECAY, EARLY, LATE = 0.01, 0.03, 0.1
LEVELS = (0.99, 0.999, 0.9999)


@dataclass(frozen=True)
class Evolution:
    """How images are evolved.

    encoding: "direct" or "cppn". generations: at most. population: of the start and children in each
    generation. enough: it ends once every class has this confidence. low, high: the range of pixels.
    """

    encoding: str = "direct"
    generations: int = 200
    population: int = 200
    enough: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise unknown("encoding", self.encoding, ENCODINGS)
        if self.generations < 0 or self.population < 2 or self.population % 2:
            raise BadInput(
                f"generations={self.generations}, population={self.population}: children come in pairs; "
                "give no fewer than 0 generations and an even population"
            )
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise BadInput(f"low={self.low}, high={self.high}: give the finite range that pixels lie in")


@dataclass(frozen=True)
class Fooled:
    """One image for each class.

    images: `classes *in`. confidence: the probability of its class. median: of the confidences after each
    generation, the start first.
    """

    images: Tensor
    confidence: Tensor
    median: tuple[float, ...]

    def reached(self, level: float) -> int | None:
        """The first generation with this median, None where there is none."""
        return next((number for number, median in enumerate(self.median) if median >= level), None)


def fooling(
    model: nn.Module,
    like: Float[Tensor, "1 ..."],
    how: Evolution = Evolution(),
    *,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> Fooled:
    """Evolve an image for each class, or for those given. MAP-Elites; it needs no gradient.

    like: one input, for shape and place; its values are not looked at. Raises `DoesNotFit` for outputs that
    are not `b classes`, inputs of whole numbers, and a cppn for what is not grey or colour images.
    """
    chance = np.random.default_rng(seed)
    with victim(model, like[:1], None, "fooling") as v, torch.no_grad():
        wanted = list(range(v.clean.shape[1]) if classes is None else classes)
        genes = _direct(v.x, how, chance) if how.encoding == "direct" else _painted(v.x, how, chance)

        def judged(population: list[Any]) -> Float[Tensor, "n classes"]:
            return v.scores(genes.images(population)).softmax(1)[:, wanted].cpu()

        cells, best, medians = _evolved(genes, judged, how, chance)
        images = genes.images(cells)
    return Fooled(images.cpu(), best, tuple(medians))


# MAP-Elites -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Genes:
    """An encoding: a random genome, two children of each pair in a generation, and what they look like."""

    first: Callable[[], Any]
    children: Callable[[list[tuple[Any, Any]], int], list[Any]]
    images: Callable[[list[Any]], Tensor]


def _evolved(
    genes: Genes,
    judged: Callable[[list[Any]], Float[Tensor, "n classes"]],
    how: Evolution,
    chance: np.random.Generator,
) -> tuple[list[Any], Float[Tensor, " classes"], list[float]]:
    """(the genome in each cell, its confidence, the median of these after each generation)."""
    population = [genes.first() for _ in range(how.population)]
    best, rows = judged(population).max(0)
    cells, medians = [population[row] for row in rows.tolist()], [statistics.median(best.tolist())]
    for generation in progress.steps(range(how.generations), "Evolving images"):
        if float(best.min()) >= how.enough:
            break
        drawn = chance.integers(len(cells), size=(how.population // 2, 2))
        population = genes.children([(cells[a], cells[b]) for a, b in drawn], generation)
        found, rows = judged(population).max(0)
        for cell in (found > best).nonzero()[:, 0].tolist():
            cells[cell] = population[int(rows[cell])]
        best = torch.maximum(best, found)
        medians.append(statistics.median(best.tolist()))
    return cells, best, medians


def _direct(x: Float[Tensor, "1 ..."], how: Evolution, chance: np.random.Generator) -> Genes:
    shape = tuple(x.shape[1:])

    def children(pairs: list[tuple[Any, Any]], generation: int) -> list[Any]:
        one, other = (np.stack(side) for side in zip(*pairs))
        both = np.stack(crossed(one, other, chance), 1).reshape(2 * len(pairs), -1)
        return [*moved(both, RATE * 0.5 ** (generation // HALVED), chance)]

    def images(population: list[Any]) -> Tensor:
        pixels = torch.from_numpy(np.stack(population)).to(x).reshape(-1, *shape)
        return (how.low + (how.high - how.low) * pixels).clamp(how.low, how.high)

    return Genes(lambda: chance.random(math.prod(shape)), children, images)


def crossed(
    one: Float[np.ndarray, "k n"], other: Float[np.ndarray, "k n"], chance: np.random.Generator
) -> tuple[Float[np.ndarray, "k n"], Float[np.ndarray, "k n"]]:
    """Simulated binary crossover within [0, 1] of each pair with chance `CROSSED`, of each pixel with 1/2."""
    low, high = np.minimum(one, other), np.maximum(one, other)
    apart = np.maximum(high - low, 1e-9)
    u = chance.random(one.shape)

    def spread(room: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
        most = 2 - (1 + 2 * room / apart) ** -(CROSSING + 1)
        inner = (u * most) ** (1 / (CROSSING + 1))
        return np.where(u * most <= 1, inner, (1 / np.maximum(2 - u * most, 1e-12)) ** (1 / (CROSSING + 1)))

    below = 0.5 * (low + high - spread(low) * apart)
    above = 0.5 * (low + high + spread(1 - high) * apart)
    swapped = chance.random(one.shape) < 0.5
    happens = (chance.random((len(one), 1)) < CROSSED) & (chance.random(one.shape) < 0.5)
    first, second = np.where(swapped, above, below), np.where(swapped, below, above)
    return np.where(happens, first, one).clip(0, 1), np.where(happens, second, other).clip(0, 1)


def moved(
    pixels: Float[np.ndarray, "k n"], rate: float, chance: np.random.Generator
) -> Float[np.ndarray, "k n"]:
    """Each pixel with this chance moved by a polynomial mutation, within [0, 1]."""
    step = cppn.polynomial(chance.random(pixels.shape), MUTATION)
    return np.where(chance.random(pixels.shape) < rate, pixels + step, pixels).clip(0, 1)


def _painted(x: Float[Tensor, "1 ..."], how: Evolution, chance: np.random.Generator) -> Genes:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DoesNotFit(
            f"a cppn paints grey or colour images, not inputs {tuple(x.shape[1:])}; use the direct encoding"
        )
    channels, height, width = x.shape[1:]
    inputs = cppn.places(height, width)

    def children(pairs: list[tuple[Any, Any]], generation: int) -> list[Any]:
        rate = cppn.RATE * 0.5 ** (generation // HALVED)
        return [cppn.mutated(parent, chance, rate) for pair in pairs for parent in pair]

    def images(population: list[Any]) -> Tensor:
        painted = [cppn.painted(genome, inputs) for genome in population]
        if channels == 3:
            painted = [cppn.rgb(values) for values in painted]
        pixels = torch.from_numpy(np.stack(painted)).to(x).reshape(-1, channels, height, width)
        return (how.low + (how.high - how.low) * pixels).clamp(how.low, how.high)

    return Genes(lambda: cppn.first(channels, chance), children, images)


# Gradient ascent --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ascended:
    """One image for each class: the most confident one, and the step that first reached each level.

    when: by "majority" (the class is the network's answer) and by level; -1 where it never was.
    """

    images: Tensor
    confidence: Tensor
    when: dict[str, tuple[int, ...]]


def ascent(
    model: nn.Module,
    mean: Float[Tensor, "1 ..."],
    *,
    steps: int = 300,
    low: float = 0.0,
    high: float = 1.0,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> Ascended:
    """Follow the gradient of each class's probability from the mean image plus noise.

    mean: `1 *in`, what images decay to. The noise has a deviation of 1/255 of the range. Raises `DoesNotFit`
    as `fooling` does, and for networks that pass no gradients on.
    """
    generator = torch.Generator().manual_seed(seed)
    with victim(model, mean[:1], None, "ascent") as v:
        wanted = torch.tensor(list(range(v.clean.shape[1])) if classes is None else list(classes))
        noise = torch.randn(len(wanted), *mean.shape[1:], generator=generator).to(v.x)
        images, wanted = v.x + noise * (high - low) / 255, wanted.to(v.x.device)
        best, top = torch.full((len(wanted),), -1.0).to(v.x), images.clone()
        when = {name: torch.full((len(wanted),), -1) for name in ("majority", *map(str, LEVELS))}
        for step in progress.steps(range(steps), "Climbing"):
            images = images.clamp(low, high)
            p, climb, answers = _looked(v, images, wanted)
            for name, flags in when.items():
                now = answers if name == "majority" else p >= float(name)
                flags[(flags < 0) & now.cpu()] = step
            top[p > best], best = images[p > best], torch.maximum(p, best)
            images = v.x + (1 - DECAY) * (images - v.x + climb)
        return Ascended(top.cpu(), best.cpu(), {name: tuple(flags.tolist()) for name, flags in when.items()})


def _looked(v: Victim, images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p_c of each image, the step a g, whether c is the answer)."""
    images = images.detach().requires_grad_()
    scores = v.scores(images)
    own = scores.log_softmax(1).gather(1, wanted[:, None])[:, 0]
    h = slope(own, images)
    p = own.detach().double().exp()
    return p.to(images), progress_step(p, h), scores.detach().argmax(1) == wanted


def progress_step(p: Float[Tensor, " k"], h: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
    """a g, of h = grad log p and g = p h: does not underflow where p is small; 0 where g is."""
    square = h.double().flatten(1).square().sum(1)
    gain = torch.minimum(torch.full_like(p, EARLY), LATE * (1 - p))
    length = torch.where(square > 0, gain / (p * square).clamp(min=1e-300), 0.0)
    return per_example(length.clamp(max=1e30).to(h), h) * h
