"""Borup and Andersen 2021: labels in the targets dampen what self-distillation forgets, by a weight had free.

The paper: kernel regression in closed form; ResNets on CIFAR-10, five steps, a grid of weights, where without
labels accuracy falls in the end and with them it does not. Here: (a) the 11 points of the official notebook,
its error to 5 decimals at weights 0 and 0.35 (its README heads the latter 0.25), a trial's at 0.25; (b) the
diabetes data, Gaussian kernel, 50 random splits into 200 to train, 120 to choose the penalty and the weights
on, and 122 to test; (c) the digits network on 300 images of which one in five bears a wrong label, 100 held
out (with clean labels) for the weights.

"gains nothing" at the penalty that is best for one step is read as: at most 1 % of the error. In (c) the
weights of a grid of 11 share the teacher, the random weights to begin with and the order of the examples with
the weight estimated, and the best is the one with the highest TEST accuracy, so that chance is on its side;
the bar is on the mean of steps 2 and 3, which have a grid. The rate falls to 0, since at a constant one the
accuracies of a grid differ by 5 points from weight to weight and say nothing. Without labels networks gain
for some steps before they lose, hence ten steps. What labels add to that is less than chance here (figures).
Quick: (a), and (b) with 5 splits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, correct, outputs
from netweight.data import digits
from netweight.models.digits_cnn import architecture
from netweight.training.guided_self_distillation import GuidedSelfDistillation, Step, again, distilled
from netweight.training.kernel_self_distillation import (
    Spectrum,
    gaussian,
    guided,
    limit,
    mixed,
    predicted,
    shrinkages,
    spectrum,
)
from netweight.training.settings import Training

TOY = (
    0.38476636465198066, 1.2333967683416893, 1.33232242218057, 0.6920159488889518, -0.29756145531871736,
    -0.24189291901377769, -0.7964485769175675, -0.9616480167034174, -0.49672509509916934,
    -0.3469066003991437, 0.5589512650600734,
)  # fmt: skip
TABLE = {  # weight: the error of steps 1 to 6 and of the limit
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
    0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
}
GRID = tuple(i / 10 for i in range(11))
GAMMA, RIDGES = 0.05, tuple(10 ** (e / 4) for e in range(-16, 9))
TRAIN, VALID = 200, 120  # patients
IMAGES, HELD, WRONG, CHAIN, GRIDDED = 300, 100, 0.2, 10, 3  # steps of the chain, and those with a grid
HOW = Training(epochs=40, batch=50, rate=2e-3, cosine=True)


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The table, the share of splits that gain, and accuracies of one seed's networks."""
    table = toy()
    apart = max(abs(a - b) for w, row in TABLE.items() for a, b in zip(table[w], row))
    found = diabetes(5 if quick else 50, seed)
    bars = [
        Bar("toy: largest difference to the table", apart, 5e-6, "at most"),
        Bar("diabetes, 0.1 of the best penalty: share of splits that gain", found["share"], 0.8, "at least"),
        Bar("diabetes, the best penalty: error gained by step 2", found["gained at best"], 0.01, "at most"),
        Bar("diabetes: largest distance of the weight from the grid's", found["off grid"], 0.1, "at most"),
    ]
    figures: dict[str, Any] = {"toy": {str(w): row for w, row in table.items()}, "diabetes": found}
    if not quick:
        figures["digits"] = networks(seed)
        bars += [
            Bar("digits: accuracy at the estimated weight - best of the grid", figures["digits"]["margin"],
                -0.01, "at least"),
            Bar("digits, weight 0: accuracy lost by step 10", figures["digits"]["lost"], 0.0, "at least"),
        ]  # fmt: skip
    return Claim(bars, figures)


# (a) ------------------------------------------------------------------------------------------------------


def toy() -> dict[float, list[float]]:
    """Mean squared distance from sin 2 pi x on 0, 0.01 ... 1 for six steps and the limit, per weight."""
    x, z = torch.arange(11).double()[:, None] / 10, torch.arange(101).double()[:, None] / 100
    fit = spectrum(gaussian(x, x, 80.0), torch.tensor(TOY, dtype=torch.float64), 0.2)
    cross, truth = gaussian(z, x, 80.0), torch.sin(2 * math.pi * z[:, 0])
    found = {}
    for weight in TABLE:
        b = [*shrinkages(fit.shrinkage, [weight] * 6)[:6], limit(fit.shrinkage, weight)]
        found[weight] = [error(predicted(fit, cross, mixed(q, weight)), truth) for q in b]
    return found


# (b) ------------------------------------------------------------------------------------------------------


def diabetes(splits: int, seed: int) -> dict[str, Any]:
    """Test errors of steps 1 to 5 at the best penalty for one step and at a tenth of it: means of splits."""
    x, y = table()
    rows = [one_split(x, y, 1000 * seed + split) for split in steps(range(splits), "diabetes")]
    low, best = ([row[name] for row in rows] for name in ("low", "best"))
    first, second = (mean([errors[step] for errors in best]) for step in (0, 1))
    return {
        "share": mean([errors[1] < errors[0] for errors in low]),
        "gained at best": (first - second) / first,
        "off grid": max(row["off grid"] for row in rows),
        "errors, 0.1 of the best penalty": [mean([e[step] for e in low]) for step in range(5)],
        "errors, best penalty": [mean([e[step] for e in best]) for step in range(5)],
        "mean weight of step 2, 0.1 of the best penalty": mean([row["low weight"] for row in rows]),
        "mean weight of step 2, best penalty": mean([row["best weight"] for row in rows]),
    }


def table() -> tuple[Tensor, Tensor]:
    """442 patients, 10 features and the target, each of mean 0 and variance 1."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(part) for part in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0, correction=0), (y - y.mean()) / y.std(correction=0)


def one_split(x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """The penalty chosen on validation patients, five guided steps at it and at a tenth."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, valid, test = order.split([TRAIN, VALID, len(x) - TRAIN - VALID])
    kernel, near, far = (gaussian(x[part], x[train], GAMMA) for part in (train, valid, test))
    whole = spectrum(kernel, y[train], 1.0)
    fits = [replace(whole, ridge=ridge) for ridge in RIDGES]
    best = min(fits, key=lambda fit: error(predicted(fit, near, torch.ones(TRAIN).double()), y[valid]))
    found: dict[str, Any] = {"off grid": 0.0}
    for name, fit in (("best", best), ("low", replace(best, ridge=0.1 * best.ridge))):
        chain = guided(fit, near, y[valid], 5)
        targets = [mixed(b, weight) for b, weight in zip(chain.shrinkages, chain.weights)]
        found[name] = [error(predicted(fit, far, t), y[test]) for t in targets]
        found[f"{name} weight"] = chain.weights[1]
        apart = abs(chain.weights[1] - on_grid(fit, near, y[valid], chain.shrinkages[1]))
        found["off grid"] = max(found["off grid"], apart)
    return found


def on_grid(fit: Spectrum, near: Tensor, truth: Tensor, b: Tensor) -> float:
    """The weight of the grid with the least error in the step after b."""
    return min(GRID, key=lambda weight: error(predicted(fit, near, mixed(b, weight)), truth))


# (c) ------------------------------------------------------------------------------------------------------


def networks(seed: int) -> dict[str, Any]:
    """All steps at the estimated weight and at 0; at steps 2 and 3 each weight of the grid, too."""
    train, held, test = noisy(seed)
    model, how = architecture(), replace(HOW, seed=seed * 100)
    settings = GuidedSelfDistillation(steps=CHAIN)
    found = distilled(model, train, held, how, settings)
    zero = distilled(model, train, None, how, replace(settings, weight=0.0))
    chain, alone = ([accuracy(step.model, test) for step in kind] for kind in (found, zero))
    grids = [gridded(model, train, test, how, found, step, settings.penalty) for step in range(1, GRIDDED)]
    margins = [chain[step + 1] - max(row) for step, row in enumerate(grids)]
    return {
        "margin": mean(margins),
        "margins": margins,
        "lost": lost(alone, chain),
        "estimated": chain,
        "weights": [step.raw for step in found],
        "weight 0": alone,
        "grid": grids,
        "trainings": sum(step.trainings for step in found),
        "trainings of a grid": 1 + len(GRID) * (CHAIN - 1),
    }


def gridded(
    model: nn.Module, train: Data, test: Data, how: Training, found: list[Step], step: int, penalty: float
) -> list[float]:
    """Test accuracy at each weight of the grid, all else as in that step (from 0) of the chain."""
    now = replace(how, seed=how.seed + step)
    nets = [again(model, train, found[step - 1].model, weight, now, penalty)[0] for weight in GRID]
    return [accuracy(net, test) for net in nets]


def lost(alone: list[float], chain: list[float]) -> float:
    """By how much the last step is below the best of the steps before; if it is not, below the other's."""
    own = max(alone[:-1]) - alone[-1]
    return own if own > 0 else chain[-1] - alone[-1]


def noisy(seed: int) -> tuple[Data, Data, Data]:
    """Images to train on, a fifth of them with another class than theirs; held-out ones; the test images."""
    data, generator = digits.train(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    train, held = data.rows(order[:IMAGES]), data.rows(order[IMAGES : IMAGES + HELD])
    wrong = torch.randperm(IMAGES, generator=generator)[: round(WRONG * IMAGES)]
    assert train.y is not None
    y = train.y.clone()
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return replace(train, y=y), held, digits.test()


def accuracy(model: nn.Module, data: Data) -> float:
    """The share of images that are recognised."""
    return float(correct(outputs(model, data), data.y).mean())


def error(found: Tensor, truth: Tensor) -> float:
    """Mean squared error."""
    return float((found - truth).square().mean())


def mean(values: list[Any]) -> float:
    """The mean of numbers or of yes and no."""
    return sum(map(float, values)) / len(values)
