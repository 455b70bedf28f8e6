"""Randomized smoothing: a radius in which the class of a noisy majority vote provably cannot change.

Paper: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019,
arXiv:1902.02918, algorithm 1 and theorem 1. For any classifier f of inputs and noise e ~ N(0, sigma^2 I),

    g(x) = argmax_c P(f(x + e) = c),        g(x') = g(x) for all |x' - x|_2 < R = sigma Phi^-1(p),  p > 1/2,

where p is at most P(f(x + e) = g(x)). n0 votes select the class c; n fresh votes, n_c of them for c, give

    p = the one-sided lower limit of Clopper and Pearson at 1 - alpha = Beta^-1(alpha; n_c, n - n_c + 1);

p < 1/2 abstains. Each certificate is wrong with a probability of at most alpha, over the votes drawn.

    found = smooth(model, data, sigma=0.25)     # a class or ABSTAINED, and a radius, for every input
    curve(found, data.y, [0.0, 0.25, 0.5])      # certified accuracy at these radii
    report(found, data.y)                       # all of it as JSON values

It speaks about g, not about f: who ships f alone ships no certificate. sigma and R are in the units of the
data: noise is added before the network normalises, and is not clipped to the range of valid inputs. Noise is
pseudo-random, x + e is rounded to the dtype of x, and the network is taken to give an input the same class
in every batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.stats import beta, binom, norm
from torch import Tensor, nn

from netweight.core import progress
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.intervals import clopper_pearson
from netweight.core.task import Data, Task

ABSTAINED = -1
SLACK = 2.0**-40  # relative; above the error of SciPy's quantiles, so that p and R are rounded down


@dataclass(frozen=True)
class Smoothed:
    """What was certified about each of `b` inputs.

    selected: the class that won the first n0 votes. votes: how many of the n fresh votes each class got; a
    vote that is NaN counts for no class. p_lower: lower limit of the share of votes for the selected class.
    """

    selected: Int64[Tensor, " b"]
    votes: Int64[Tensor, "b classes"]
    p_lower: Float64[Tensor, " b"]
    sigma: float
    n0: int
    n: int
    alpha: float

    def __len__(self) -> int:
        return len(self.selected)

    @property
    def classes(self) -> Int64[Tensor, " b"]:
        """The certified class of each input, or `ABSTAINED`."""
        return self.selected.where(self.p_lower >= 0.5, ABSTAINED)

    @property
    def radius(self) -> Float64[Tensor, " b"]:
        """The certified radius of each input, L2 in input units; 0 where it abstains."""
        return radius(self.p_lower, self.sigma)


def smooth(
    model: nn.Module | Compressed,
    data: Data | Task,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    batch: int = 1000,
) -> Smoothed:
    """Certify the smoothed network on every input (of a task: every test input).

    sigma: standard deviation of the noise, in input units. n0, n: votes that select and that estimate.
    batch: noisy copies per forward pass. Runs where the model is; the same seed, device and batch give the
    same votes. Raises `BadInput` for settings out of range, `DoesNotFit` for inputs that are whole numbers
    and for outputs that are not `b classes`.
    """
    _check(sigma, alpha, n0=n0, n=n, batch=batch)
    data = data.test if isinstance(data, Task) else data
    found = []
    with _voting(model, data, sigma, seed, batch) as vote:
        for x in progress.steps(data.x, "Smoothing"):
            selected = int(vote(x, n0).argmax())
            found.append((selected, vote(x, n)))
    selected = torch.tensor([c for c, _ in found])
    votes = torch.stack([v for _, v in found])
    hits = votes.gather(1, selected[:, None])[:, 0]
    return Smoothed(selected, votes, lower_limit(hits, n, alpha), sigma, n0, n, alpha)


def predict(
    model: nn.Module | Compressed,
    data: Data | Task,
    sigma: float,
    *,
    n: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    batch: int = 1000,
) -> Int64[Tensor, " b"]:
    """The class that the smoothed network gives to each input, or `ABSTAINED`: no radius, but fewer votes.

    The two classes with most votes are told apart by the exact two-sided binomial test (algorithm 1 of the
    paper); a class is wrong with a probability of at most alpha. Raises as `smooth` does.
    """
    _check(sigma, alpha, n=n, batch=batch)
    data = data.test if isinstance(data, Task) else data
    with _voting(model, data, sigma, seed, batch) as vote:
        votes = torch.stack([vote(x, n) for x in progress.steps(data.x, "Smoothing")])
    (first, second), best = votes.topk(2).values.T, votes.argmax(1)
    return best.where(p_value(first, second) <= alpha, ABSTAINED)


def lower_limit(hits: Int64[Tensor, " b"], n: int, alpha: float) -> Float64[Tensor, " b"]:
    """With probability 1 - alpha a share seen `hits` times in n is at least this: one-sided, rounded down."""
    k = hits.numpy()
    limit = np.where(k > 0, beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)
    return torch.from_numpy(limit * (1 - SLACK))


def radius(p_lower: Float64[Tensor, " b"], sigma: float) -> Float64[Tensor, " b"]:
    """sigma Phi^-1(p), rounded down; 0 where p is at most 1/2."""
    return torch.from_numpy(sigma * norm.ppf(p_lower.clamp(min=0.5).numpy()) * (1 - SLACK))


def p_value(first: Int64[Tensor, " b"], second: Int64[Tensor, " b"]) -> Float64[Tensor, " b"]:
    """Probability of votes at least as far apart (first >= second) where both classes are equally likely."""
    tail = binom.sf(first.numpy() - 1, (first + second).numpy(), 0.5)
    return torch.from_numpy(np.minimum(1.0, 2 * tail))


def curve(found: Smoothed, labels: Int64[Tensor, " b"], radii: Sequence[float]) -> Float64[Tensor, " radii"]:
    """Certified accuracy: the share of all inputs whose label is certified with R at least each radius."""
    certified = found.radius.where(_right(found, labels), -torch.inf)
    return (certified >= torch.tensor(radii, dtype=torch.float64)[:, None]).double().mean(1)


def average_radius(found: Smoothed, labels: Int64[Tensor, " b"]) -> float:
    """ACR, the mean certified radius in input units; 0 where the class is wrong or it abstains.

    Zhai et al., "MACER", 2020, arXiv:2001.02378.
    """
    return float(found.radius.where(_right(found, labels), 0.0).mean())


def reach(sigma: float, n: int, alpha: float) -> float:
    """The largest radius that n votes can certify: all of them for one class."""
    return float(radius(lower_limit(torch.tensor([n]), n, alpha), sigma))


def report(
    found: Smoothed, labels: Int64[Tensor, " b"], radii: Sequence[float] | None = None
) -> dict[str, Any]:
    """Everything as JSON values: settings, counts, certified accuracy, ACR, one record per input.

    radii: of the curve, in input units; by default every half sigma up to what n votes can certify. Shares
    come with their 95% interval over the inputs. Raises `BadInput` for labels that do not fit.
    """
    if radii is None:
        most = reach(found.sigma, found.n, found.alpha)
        radii = [0.5 * found.sigma * i for i in range(math.floor(most / (0.5 * found.sigma)) + 1)]
    right, classes, size = _right(found, labels), found.classes, len(found)
    certified = []
    for r, share in zip(radii, curve(found, labels, radii).tolist()):
        low, high = clopper_pearson(round(share * size), size)
        certified.append({"radius": r, "share": share, "low": low, "high": high})
    columns = labels.tolist(), classes.tolist(), found.p_lower.tolist(), found.radius.tolist()
    return {
        "sigma": found.sigma,
        "selection_samples": found.n0,
        "samples": found.n,
        "alpha": found.alpha,
        "norm": "l2",
        "examples": size,
        "certified": int(right.sum()),
        "wrong": int(((classes != ABSTAINED) & ~right).sum()),
        "abstained": int((classes == ABSTAINED).sum()),
        "largest_possible_radius": reach(found.sigma, found.n, found.alpha),
        "average_certified_radius": average_radius(found, labels),
        "certified_accuracy": certified,
        "inputs": [
            {"label": label, "class": None if c == ABSTAINED else c, "p_lower": p, "radius": r, "votes": v}
            for label, c, p, r, v in zip(*columns, found.votes.tolist())
        ],
    }


@contextmanager
def _voting(
    model: nn.Module | Compressed, data: Data, sigma: float, seed: int, batch: int
) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """vote(x `*in`, count) -> votes `classes` on the CPU; inside, the network is in evaluation mode."""
    network = model.model if isinstance(model, Compressed) else model
    device = next(itertools.chain(network.parameters(), network.buffers()), data.x).device
    generator = torch.Generator(device).manual_seed(seed)
    if not data.x.is_floating_point():
        raise DoesNotFit(
            f"{data.name}: smoothing adds noise to inputs, but these are whole numbers; smooth embeddings"
        )

    @torch.no_grad()
    def vote(x: Float[Tensor, "*in"], count: int) -> Int64[Tensor, " classes"]:
        x, votes = x.to(device), torch.zeros(classes, dtype=torch.int64, device=device)
        for start in range(0, count, batch):
            shape = (min(batch, count - start), *x.shape)
            noise = torch.randn(shape, generator=generator, device=device, dtype=x.dtype)
            outputs = network(x + sigma * noise)
            known = ~outputs.isnan().any(1)
            votes += torch.bincount(outputs.argmax(1)[known], minlength=classes)
        return votes.cpu()

    was_training = network.training
    network.eval()
    try:
        classes = _classes(network, data.x[:1].to(device))
        yield vote
    finally:
        network.train(was_training)


@torch.no_grad()
def _classes(network: nn.Module, x: Tensor) -> int:
    """How many classes the network tells apart."""
    outputs = network(x)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DoesNotFit(f"smoothing counts votes for classes, so it needs outputs `b classes`, not {shape}")
    return outputs.shape[1]


def _right(found: Smoothed, labels: Tensor | None) -> Tensor:
    """Where the certified class is the label; raises `BadInput` for labels that are none."""
    if labels is None or labels.is_floating_point() or labels.shape != found.selected.shape:
        raise BadInput(
            f"certified accuracy needs the class number of each of the {len(found)} inputs as labels"
        )
    classes = found.votes.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise BadInput(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the network has classes 0 to "
            f"{classes - 1}; give data of these classes"
        )
    return found.classes == labels


def _check(sigma: float, alpha: float, **counts: int) -> None:
    """Raises `BadInput` with the first setting that is out of range."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise BadInput(f"sigma={sigma}: noise needs a finite standard deviation above 0, in input units")
    if not 0 < alpha < 1:
        raise BadInput(
            f"alpha={alpha}: the probability of a wrong certificate lies between 0 and 1; try 0.001"
        )
    for name, count in counts.items():
        if count < 1:
            raise BadInput(f"{name}={count}: at least one noisy copy is needed")
