"""Wang et al. 2022: adversarial training fails rare classes, reweighting them costs more there; SRAT helps.

The paper: CIFAR-10 and SVHN, step and long-tailed imbalance of 10 and 100, ResNet-18, PGD of 10 steps, eps
8/255: adversarial training loses far more on rare classes than ordinary training does; weights for these win
them back at a high price for the frequent ones; SRAT is above reweighted cross-entropy, focal and LDAM
losses, clean and attacked. Two Gaussian classes show why: the price grows as they lie closer together.

Here: CIFAR-10 (JPEG) at 16 x 16, 50 images of the classes 0, 2, 4, 6, 8 and 500 of the others, each also
mirrored, a network of three convolutions, one step of 1.25 eps from a random start, eps 6/255; weights from
0.6 of the epochs on, lambda 0.3, tau 0.1 (with lambda 0.2 the scatter bar had no room; ten other settings of
seed 0 gained 0.1 to 0.6 points). Accuracy on 5,000 test images, balanced; under PGD of 10 steps on the first
2,500. SRAT and its counterpart without L_sep are trained twice a seed, from the same first weights and in the
same order; their accuracies are the means. Scatter is that of features of length 1.

The theory: Phi in closed form beside what a logistic regression on a weighted sample does (d = 1, K = 10).
Quick: the theory, and the first bar as "less" on scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from netweight.core.progress import steps
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.data.imbalanced import cut, step_counts
from netweight.inspection.separability import Errors, Gaussians, price, scatter_ratio
from netweight.models import digits_cnn
from netweight.nn.normalize import Normalize
from netweight.training.adversary import adversary
from netweight.training.chance import own_chance
from netweight.training.settings import Training
from netweight.training.srat import SRAT, feature_layer, scores_and_features, srat

RARE = (0, 2, 4, 6, 8)
MOST, RATIO, POOL = 500, 10, 7000  # POOL: training images that the classes are cut from
EPS = "linf=6/255"
HOW = Training(epochs=10, batch=128, rate=2e-3, cosine=True)
ATTACKED, PAIRS = 2500, 2
DRAWN = 1_000_000  # points of the two Gaussians
CLOSE, FAR = 0.5, 2.0  # eta / sigma
PLAIN = {"deferred": 1.0, "separation": 0.0}  # no weights, no L_sep
ARMS: Mapping[str, Mapping[str, Any]] = {
    "natural": {"steps": 0, "random": False, **PLAIN},
    "natural, weights": {"steps": 0, "random": False, **PLAIN, "deferred": 0.0},
    "adversarial": PLAIN,
    "adversarial, weights": {**PLAIN, "deferred": 0.0},
    "adversarial, late weights": {**PLAIN, "deferred": 0.6},
    "SRAT": {"deferred": 0.6, "separation": 0.3},
}
LATE, OURS = "adversarial, late weights", "SRAT"


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Accuracies of each way of training, of one seed, and the price of reweighting two Gaussian classes."""
    bars, figures = theory(seed)
    if quick:
        ratio, accuracies = short(seed)
        return Claim([Bar("rare classes, adversarial / natural", ratio, 1.0, "at most"), *bars],
                     {**figures, **accuracies})  # fmt: skip
    test = halved(cifar10().test())
    data = mirrored(cut(halved(cifar10().train(POOL)), step_counts(10, MOST, RATIO, RARE), seed))
    single = [(name, seed) for name in ARMS if name not in (LATE, OURS)]
    pairs = [(name, PAIRS * seed + i) for i in range(PAIRS) for name in (LATE, OURS)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for name, first in steps([*single, *pairs], "Ways of training"):
        trained = fitted(small_network(first), data, name, HOW, first)
        found[name].append(judged(trained, test, EPS))
    table = {name: means(rows) for name, rows in found.items()}
    return Claim([*marks(table), *bars], {**figures, "accuracies": table, "pairs": found[LATE] + found[OURS]})


def marks(table: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    """The bars on the accuracies."""
    cost = {
        how: table[how]["frequent"] - table[f"{how}, weights"]["frequent"]
        for how in ("natural", "adversarial")
    }
    ours, late = table[OURS], table[LATE]
    return [
        Bar("rare classes, clean: adversarial / natural",
            table["adversarial"]["rare"] / table["natural"]["rare"], 0.7, "at most"),
        Bar("frequent classes, clean: cost of weights, adversarial", cost["adversarial"], 0.08, "at least"),
        Bar("that cost - 4 times the cost in natural training", cost["adversarial"] - 4 * cost["natural"],
            0.0, "at least"),
        Bar("clean: SRAT - late weights", ours["clean"] - late["clean"], 0.007, "at least"),
        Bar("rare classes, attacked: SRAT - late weights", ours["rare, attacked"] - late["rare, attacked"],
            -0.01, "at least"),
        Bar("scatter between / within classes, attacked: SRAT / late weights",
            ours["scatter"] / late["scatter"], 1.0, "at least"),
    ]  # fmt: skip


def fitted(
    network: nn.Module, data: Data, name: str, how: Training, seed: int, within: str = EPS
) -> nn.Module:
    """The network, trained in one of the ways of `ARMS`."""
    settings = SRAT(within=within, **{"steps": 1, "size": 1.25, **ARMS[name]})
    return srat(network, Task(data, data, train=data), replace(how, seed=seed), settings).model


# The data and the network -----------------------------------------------------------------------------------


def halved(data: Data) -> Data:
    """Images of half the side: the means of 2 x 2 pixels."""
    return replace(data, x=F.avg_pool2d(data.x, 2), memo={})


def mirrored(data: Data) -> Data:
    """The images, and behind them the same with left and right swapped."""
    return replace(data, x=torch.cat([data.x, data.x.flip(3)]), y=known(data).repeat(2), memo={})


def small_network(seed: int) -> nn.Sequential:
    """Images `b 3 16 16` to ten classes: three convolutions with batch norm, two Linear layers."""
    with own_chance(seed, torch.device("cpu")):
        layers: list[nn.Module] = [Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])]
        for inputs, channels, stride in ((3, 24, 2), (24, 48, 2), (48, 96, 1)):
            conv = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


# What is measured -------------------------------------------------------------------------------------------


def judged(model: nn.Module, test: Data, within: str) -> dict[str, float]:
    """Accuracy on all, rare and frequent classes, clean and attacked; the scatter of attacked features."""
    first = test.take(ATTACKED)
    attack, generator = adversary(within, 10, 0.25, first), torch.Generator().manual_seed(0)
    points = [attack.points(model, x, y, generator) for x, y in first.batched(250)]  # type: ignore[arg-type]
    attacked = replace(first, x=torch.cat(points), memo={})
    clean, under = by_class(model, test), by_class(model, attacked)
    return {
        **clean,
        "attacked": under["clean"],
        "rare, attacked": under["rare"],
        "frequent, attacked": under["frequent"],
        "scatter": scatter_ratio(F.normalize(features(model, attacked), dim=1), known(attacked)),
    }


def by_class(model: nn.Module, data: Data) -> dict[str, float]:
    """The share of right predictions on all examples, on the rare and on the frequent classes."""
    y = known(data)
    right, rare = (outputs(model, data).argmax(1) == y).double(), torch.isin(y, torch.tensor(RARE))
    return {
        "clean": float(right.mean()),
        "rare": float(right[rare].mean()),
        "frequent": float(right[~rare].mean()),
    }


@torch.no_grad()
def features(model: nn.Module, data: Data) -> Tensor:
    """The inputs of the last layer, `b d`."""
    layer = feature_layer(model, data.x[:1])
    found = [scores_and_features(model, x, layer)[1] for x, _ in data]
    return torch.cat([z for z in found if z is not None])


def known(data: Data) -> Tensor:
    """The class numbers."""
    assert data.y is not None
    return data.y


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each quantity."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


# The theory and the digits ----------------------------------------------------------------------------------


def theory(seed: int) -> tuple[list[Bar], dict[str, Any]]:
    """The price of reweighting, in closed form and on a sample."""
    closed = {a: Gaussians(a, 1.0, RATIO).price() for a in (CLOSE, FAR)}
    seen = {a: sampled_price(Gaussians(a, 1.0, RATIO), seed) for a in (CLOSE, FAR)}
    apart = max(abs(closed[a] - seen[a]) for a in closed)
    bars = [
        Bar("price of reweighting: eta / sigma 0.5 above 2", seen[CLOSE] - seen[FAR], 0.0, "at least"),
        Bar("price of reweighting: sample from closed form", apart, 0.02, "at most"),
    ]
    figures = {f"price at eta / sigma {a:g}": {"closed": closed[a], "sample": seen[a]} for a in closed}
    return bars, figures


def sampled_price(classes: Gaussians, seed: int) -> float:
    """What a logistic regression on a weighted sample takes from the frequent class for what the rare one
    gets."""
    x, y = drawn(classes, 1 / (1 + classes.imbalance), seed)
    held, known = drawn(classes, 0.5, seed + 1)
    found = []
    for rho in (1.0, classes.imbalance):
        weight = torch.where(y > 0, 1.0, rho).numpy()
        line = LogisticRegression(C=1e6, tol=1e-9).fit(x.numpy(), y.numpy(), weight)
        wrong = torch.from_numpy(line.predict(held.numpy())) != known
        found.append(Errors(*(float(wrong[known == c].double().mean()) for c in (-1, 1))))
    return price(*found)


def drawn(classes: Gaussians, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(x `b d` in float64, y of -1 and 1), so many of class -1 as the share says."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(DRAWN) < share * DRAWN, -1, 1)
    noise = torch.randn(DRAWN, classes.dimensions, generator=generator, dtype=torch.float64)
    return y[:, None] * classes.eta + classes.sigma * noise, y


def short(seed: int) -> tuple[float, dict[str, Any]]:
    """Rare clean accuracy of adversarial over natural training on the digits, and all accuracies."""
    data, test = cut(digits.train(), step_counts(10, 100, RATIO, RARE), seed), digits.test()
    how, found = Training(epochs=4, batch=32, rate=3e-3), {}
    for name in ("natural", "adversarial"):
        with own_chance(seed, torch.device("cpu")):
            network = digits_cnn.architecture()
        found[name] = by_class(fitted(network, data, name, how, seed, "linf=0.2"), test)
    return found["adversarial"]["rare"] / found["natural"]["rare"], {"digits": found}
