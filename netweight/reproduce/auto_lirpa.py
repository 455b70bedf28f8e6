"""Xu et al. 2020: training on linear bounds certifies more than on intervals, at a cost free of the classes.

The paper: CIFAR-10 at eps 8/255, a CNN of 7 layers, CROWN-IBP with loss fusion, 66.6 % verified error.
Here: scikit-learn's digits at eps 0.1, a CNN of two convolutions, 60 epochs (10 without a set, 30 in which it
grows, 20 at full size). All networks are judged by CROWN bounds, whatever they were trained on. The bounds
themselves are held against the authors' own by `netweight bench verify --peer-python`.

Loss fusion: at two classes the row of the fused loss bounds the same margin as the row of the unfused one; at
100 and 400 classes (random heads on the same body) the time of a step is compared.

Weights that move: an MLP 64-64-64-10, |dW|_2 <= 0.1 for each layer in training, asked at 0.05. Its bars are
of interval bounds, which prove nothing of the natural network; rows prove much of that one too (figures), as
they take the ball of a layer as one and not weight by weight. Sampled is the worst of gradient ascent on the
weights within the set.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.graph import capture
from netweight.core.perturbation import L2, Linf
from netweight.core.result import Bar, Claim
from netweight.core.task import Data
from netweight.data import digits
from netweight.models.trained import seeded
from netweight.training.certified import (
    Certified,
    bounded_loss,
    certified,
    chord,
    differences,
    fused,
    unfused,
)
from netweight.training.loop import Moment, Training
from netweight.verification import crown
from netweight.verification.bounds import bounds, certify, margins
from netweight.verification.problem import Region, pose
from netweight.verification.weights import loosened

WITHIN = Linf(0.1, 0.0, 1.0)
HOW = Training(epochs=60, batch=64, rate=4e-3, milestones=(50, 55), clip=8.0)
QUICK = Training(epochs=10, batch=64, rate=4e-3, clip=8.0)
MLP = Training(epochs=60, batch=64, rate=4e-3, milestones=(48, 56), decay=0.01, clip=8.0)
TRAINED, ASKED = L2(0.1), L2(0.05)  # of the weights of each layer
POINT = Linf(0.0)
BOUNDS = ("ibp", "crown-ibp", "crown")


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """One seed; quick: 10 epochs, fused against natural training alone."""
    how = replace(QUICK if quick else HOW, seed=seed)
    settings = Certified(natural=how.epochs // 6, ramp=how.epochs // 2)
    with seeded(seed):
        model = cnn()
    test = digits.test().take(200) if quick else digits.test()
    natural = errors(naturally(model, how), test)
    found = errors(certified(model, digits.train(), WITHIN, how, settings)[0], test)
    figures: dict[str, Any] = {"errors, natural": natural, "errors, CROWN-IBP fused": found}
    if quick:
        ratio = found["crown"] / natural["crown"]
        return Claim([Bar("verified error: CROWN-IBP / natural", ratio, 1 - 1e-9, "at most")], figures)
    ibp = errors(certified(model, digits.train(), WITHIN, how, replace(settings, method="ibp"))[0], test)
    figures["errors, IBP"] = ibp
    bars = [
        Bar(
            "verified error, points: CROWN-IBP - IBP", 100 * (found["crown"] - ibp["crown"]), -0.5, "at most"
        ),
        Bar("verified error: CROWN-IBP / natural", found["crown"] / natural["crown"], 0.5, "at most"),
    ]
    for part in (fusion(seed), moving_weights(seed)):
        bars += part.bars
        figures |= part.figures
    return Claim(bars, figures)


# (2) Inputs that move ------------------------------------------------------------------------------------


def cnn(classes: int = 10) -> nn.Sequential:
    """Convolutions of 16 and (stride 2) 32 channels, 128 hidden units."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def naturally(model: nn.Module, how: Training) -> nn.Module:
    """The same training without a set."""
    return certified(model, digits.train(), Linf(0.0), how, Certified(natural=how.epochs, ramp=0))[0]


def errors(model: nn.Module, data: Data) -> dict[str, float]:
    """Shares of the examples that are wrong (clean), or not proven right by bounds of each kind."""
    found = {name: certify(model, data, WITHIN, method=name) for name in BOUNDS}
    shares = {name: 1 - float(one.verified.float().mean()) for name, one in found.items()}
    return {"clean": 1 - float(found["ibp"].correct.float().mean()), **shares}


# (3) Loss fusion -----------------------------------------------------------------------------------------


def fusion(seed: int) -> Claim:
    """Equal bounds at two classes, and the time of a step at many."""
    apart = two_classes(seed)
    times = {classes: {how: step_time(classes, how, seed) for how in (True, False)} for classes in (100, 400)}
    ratio = {classes: of[False] / of[True] for classes, of in times.items()}
    bars = [
        Bar("2 classes: margin fused - unfused, largest", apart, 1e-4, "at most"),
        Bar("100 classes: time of a step unfused / fused", ratio[100], 3.0, "at least"),
        Bar("400 classes: time of a step unfused / fused", ratio[400], 8.0, "at least"),
    ]
    figures = {
        f"{k} classes, ms of a step": {"fused": t[True], "unfused": t[False]} for k, t in times.items()
    }
    return Claim(bars, figures)


def two_classes(seed: int) -> float:
    """The margin that follows from the row of the fused loss, beside the unfused one: largest difference.

    The row is k (f_j - f_y) + c, so its bound is a bound of the margin times k.
    """
    with seeded(seed):
        model = cnn(2)
    x, y = digits.test().x[:64], digits.test().y[:64] % 2
    problem = pose(capture(model, x[:1]), [Region.of(x, WITHIN)], "real")
    with torch.no_grad():
        state = crown.intermediate(problem, tighten=False)
        z = differences(problem, state, y)
        k = chord(z.lower, z.upper)[0]
        rows = k - F.one_hot(y, 2) * k.sum(1, keepdim=True)
        lower = crown.lowest(problem, state, crown.objective_rows(problem, -rows.unsqueeze(1))).squeeze(1)
        margin = lower / k.sum(1)
        alone = crown.lowest(problem, state, crown.objective_rows(problem, margins(y, 2))).squeeze(1)
    return float((margin - alone).abs().max())


def step_time(classes: int, fuse: bool, seed: int) -> float:
    """Milliseconds of CPU time of one forward and backward pass on 32 examples, the median of 7."""
    with seeded(seed):
        model = cnn(classes)
        x, y = digits.test().x[:32], torch.randint(classes, (32,))
        settings = Certified(fused=fuse, natural=0, ramp=2, mid=0.0)
        loss = bounded_loss(capture(model, x[:1]), WITHIN, settings)
        half = Moment(10, 0, 10, torch.Generator())
        times = []
        for _ in range(8):
            start = time.process_time()
            loss(model, x, y, half).backward()
            times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[1:])


# (4) Weights that move -----------------------------------------------------------------------------------


def moving_weights(seed: int) -> Claim:
    """The MLP trained naturally and for moving weights, certified at half the radius."""
    how = replace(MLP, seed=seed)
    with seeded(seed):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    grown = Certified(natural=how.epochs // 15, ramp=2 * how.epochs // 3, mid=0.0)
    robust, _ = certified(model, digits.train(), POINT, how, grown, weights=TRAINED)
    natural, test = naturally(model, how), digits.test()
    proven = {name: certified_share(net, test) for name, net in (("natural", natural), ("robust", robust))}
    loss, sampled = loss_bound(robust, test), worst_loss(robust, test)
    finite, above = loss.isfinite().float().mean(), (sampled - loss).max()
    bars = [
        Bar("weights moved: accuracy certified by intervals", proven["robust"]["ibp"], 0.6, "at least"),
        Bar("the same, trained naturally", proven["natural"]["ibp"], 0.0, "at most"),
        Bar("weights moved: share of finite certified losses", float(finite), 1.0, "at least"),
        Bar("weights moved: largest sampled - certified loss", float(above), 0.0, "at most"),
    ]
    means = {"certified": float(loss.mean()), "sampled": float(sampled.mean())}
    return Claim(bars, {"weights moved: accuracy certified": proven, "weights moved: mean loss": means})


def certified_share(model: nn.Module, data: Data) -> dict[str, float]:
    """The share of examples that are proven right for all weights of the set, by bounds of each kind."""
    graph = loosened(capture(model, data.x[:1]), ASKED)
    wanted = margins(data.y, 10)
    return {
        name: float(
            (bounds(graph, data.x, POINT, objective=wanted, method=name).lower > 0).all(1).float().mean()
        )
        for name in ("ibp", "crown-ibp", "crown")
    }


@torch.no_grad()
def loss_bound(model: nn.Module, data: Data) -> Tensor:
    """The certified cross-entropy of each example."""
    graph = loosened(capture(model, data.x[:1]), ASKED)
    problem = pose(graph, [Region.of(data.x, POINT)], "real")
    return torch.minimum(fused(problem, data.y, 1.0), unfused(problem, data.y, 1.0))


def worst_loss(model: nn.Module, data: Data, steps: int = 20) -> Tensor:
    """The cross-entropy of each example at the worst weights met: of all examples together, on the sphere."""
    start = {name: p.detach() for name, p in model.named_parameters() if name.endswith("weight")}
    moved = {name: w.clone() for name, w in start.items()}
    worst = torch.zeros(len(data))
    for _ in range(steps):
        free = {name: w.requires_grad_() for name, w in moved.items()}
        losses = F.cross_entropy(torch.func.functional_call(model, free, (data.x,)), data.y, reduction="none")
        worst = torch.maximum(worst, losses.detach())
        gradients = torch.autograd.grad(losses.mean(), list(free.values()))
        moved = {
            name: start[name] + 0.9999 * ASKED.eps * g / g.norm()
            for name, g in zip(free, gradients, strict=True)
        }
    return worst
