"""Cakaj et al. 2023: weights made by an arctan generalize better, at no cost once trained.

The paper: ResNets and others on CIFAR and ImageNet gain half a point to a point on top of what regularizes
them already. Here, with weight decay 5e-4 everywhere: (1) an MLP 64-256-256-10 on 600 digits of which 30 %
have a random label; strength, and whether a and b are learnt, are chosen on 300 other examples with labels as
bad, never on test data. Beside it the plain network with ten times the decay. (2) three convolutions on 1,000
images of CIFAR-10 without augmentation. (3) the weights of the MLP at strength 1. (4) what folding leaves.
Labels of the test data are clean. Quick: (3) and (4) with a third of the epochs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from netweight.core.compressed import weight_of, weighted
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models.trained import seeded
from netweight.training.loop import Training, train
from netweight.training.weight_compander import WeightCompander, companded, folded, loss, weight_compander

EXAMPLES, CHOSEN_ON, WRONG = 600, 300, 0.3
ARMS = (
    WeightCompander(2.0), WeightCompander(1.0), WeightCompander(0.7), WeightCompander(0.5),
    WeightCompander(1.0, learnt=True), WeightCompander(0.7, learnt=True),
)  # fmt: skip
IMAGES, TESTED = 1000, 2000


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed; accuracies are shares of the test data."""
    data, chosen_on = noisy(seed)
    epochs = 20 if quick else 60
    plain, bounded = trained(mlp(seed), data, seed, epochs), trained(mlp(seed), data, seed, epochs, ARMS[1])
    parts = [shapes(plain, bounded), cost(plain, bounded, seed)]
    if not quick:
        parts += [labels(plain, bounded, data, chosen_on, seed), images(seed)]
    return Claim(
        [bar for part in parts for bar in part.bars],
        {name: figure for part in parts for name, figure in part.figures.items()},
    )


def noisy(seed: int) -> tuple[Data, Data]:
    """Training and validation examples of the digits, some with a label drawn at random."""
    data, generator = digits.train(), torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data), generator=generator)[: EXAMPLES + CHOSEN_ON]
    assert data.y is not None
    wrong = torch.rand(len(rows), generator=generator) < WRONG
    y = torch.where(wrong, torch.randint(10, (len(rows),), generator=generator), data.y[rows])
    x = data.x[rows]
    return Data(x[:EXAMPLES], y[:EXAMPLES]), Data(x[EXAMPLES:], y[EXAMPLES:])


def mlp(seed: int) -> nn.Module:
    """64-256-256-10 with random weights."""
    with seeded(seed):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )


def trained(
    model: nn.Module,
    data: Data,
    seed: int,
    epochs: int,
    settings: WeightCompander | None = None,
    decay: float = 5e-4,
) -> nn.Module:
    """A copy trained by SGD with momentum, plainly or through companders."""
    how = Training(epochs, 32, 0.05, optimizer="sgd", cosine=True, decay=decay, seed=seed)
    if settings is None:
        model = folded(model).requires_grad_(True)
        train(model, data, loss, how)
        return model
    return weight_compander(model, Task(data, data, train=data).blind(), how, settings).model


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the examples that are right."""
    return float((outputs(model, data).argmax(1) == data.y).float().mean())


def labels(plain: nn.Module, bounded: nn.Module, data: Data, chosen_on: Data, seed: int) -> Claim:
    """Bar 1: clean test accuracy after training on labels of which many are wrong."""
    test = digits.test()
    models = {a: bounded if a == ARMS[1] else trained(mlp(seed), data, seed, 60, a) for a in ARMS}
    best = max(ARMS, key=lambda arm: accuracy(models[arm], chosen_on))
    decayed = trained(mlp(seed), data, seed, 60, decay=5e-3)
    names = {arm: f"strength {arm.strength:g}{', learnt' if arm.learnt else ''}" for arm in ARMS}
    figures = {"plain": accuracy(plain, test), "ten times the decay": accuracy(decayed, test)}
    figures |= {names[arm]: accuracy(models[arm], test) for arm in ARMS}
    gained = figures[names[best]] - figures["plain"]
    bar = Bar("digits, 30 % wrong labels: accuracy, companded - plain", gained, 0.03, "at least")
    return Claim([bar], {"digits, 30 % wrong labels: accuracy": figures, "digits: chosen": names[best]})


def images(seed: int) -> Claim:
    """Bar 2: the gap between training and test accuracy on few images, at strength 2."""
    source = cifar10()
    data, test = source.train(IMAGES), source.test(TESTED)
    with seeded(seed):
        model = nn.Sequential(
            *halved(3, 32), *halved(32, 64), *halved(64, 64), nn.Flatten(), nn.Linear(1024, 10)
        )
    models = {"plain": trained(model, data, seed, 40), "companded": trained(model, data, seed, 40, ARMS[0])}
    seen, unseen = ({n: accuracy(m, part) for n, m in models.items()} for part in (data, test))
    gaps = {name: seen[name] - unseen[name] for name in models}
    bars = [
        Bar("CIFAR-10: gap, companded / plain", gaps["companded"] / gaps["plain"], 0.92, "at most"),
        Bar(
            "CIFAR-10: accuracy, companded - plain", unseen["companded"] - unseen["plain"], -0.01, "at least"
        ),
    ]
    return Claim(bars, {"CIFAR-10: training accuracy": seen, "CIFAR-10: test accuracy": unseen})


def halved(before: int, width: int) -> Sequence[nn.Module]:
    """3 x 3 at every second pixel, then ReLU."""
    return nn.Conv2d(before, width, 3, stride=2, padding=1), nn.ReLU()


def shapes(plain: nn.Module, bounded: nn.Module) -> Claim:
    """Bar 3: how the weights of each layer lie, in the mean over the layers."""
    found = {"plain": lies(plain), "companded": lies(bounded)}
    far, near, tails = zip(found["plain"], found["companded"])
    bars = [
        Bar("digits: largest weight in standard deviations, ratio", far[1] / far[0], 0.75, "at most"),
        Bar("digits: share of weights below a tenth of one, ratio", near[1] / near[0], 1.0, "at most"),
        Bar("digits: excess kurtosis, companded - plain", tails[1] - tails[0], 0.0, "at most"),
    ]
    return Claim(bars, {f"digits: largest, share near 0, kurtosis, {n}": list(f) for n, f in found.items()})


def lies(model: nn.Module) -> tuple[float, float, float]:
    """max |w| / std, share of |w| < std / 10, excess kurtosis: means over the layers."""
    rows = []
    for name in weighted(model):
        w = weight_of(model, name).double().flatten()
        u = w / w.std(correction=0)
        rows.append(
            (u.abs().max().item(), (u.abs() < 0.1).double().mean().item(), (u - u.mean()).pow(4).mean() - 3)
        )
    return tuple(float(statistics.fmean(map(float, column))) for column in zip(*rows))  # type: ignore[return-value]


def cost(plain: nn.Module, bounded: nn.Module, seed: int) -> Claim:
    """Bar 4: what folding changes, and what the folded network costs beside the plain one."""
    network, x = companded(mlp(seed), ARMS[1]).eval(), digits.test().x
    with torch.no_grad():
        apart = float((folded(network)(x) - network(x)).abs().max())
    took: dict[str, list[float]] = {"plain": [], "companded": []}
    for _ in range(200):
        for name, model in (("plain", plain), ("companded", bounded)):
            with torch.no_grad():
                start = time.process_time()
                model(x)
                took[name].append(time.process_time() - start)
    bars = [
        Bar("digits: outputs, folded - companded, largest", apart, 1e-6, "at most"),
        Bar("digits: seconds, folded / plain", min(took["companded"]) / min(took["plain"]), 1.1, "at most"),
    ]
    return Claim(bars)
