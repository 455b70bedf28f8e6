"""Xu et al. 2023: layers pruned by how they move the output keep more than layers pruned by their weights.

The paper: ResNet-32, CIFAR-10, rounds of 20 % and retraining to 95.5 % zeros: 90.83 % accuracy, up to 1 point
over LAMP, ERK, global and uniform magnitudes. Here: (a) a CNN on the digits (convolutions of 16, 32 and 64,
64 hidden units), 14 rounds to 95.6 % zeros, 80 steps of retraining in each, the same for all rules, curves of
the worst example as published (the mean example leaves RD - global at 0.0099 after retraining, 3 seeds); (b)
ResNet-20 fine-tuned to the JPEG images, pruned at once to 60 %, and whether distortions of the mean example
add up, on 12 random plans.
Quick: (a) alone, to 93.1 % in 8 larger rounds.

"before" is the accuracy right after a round's pruning, "after" that after its retraining.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.compression.prune.rd_pruning import RDPruning, allocation, curves, kept, rd_pruning
from netweight.core import pruning
from netweight.core.compressed import Change, assemble, weight_of, weighted
from netweight.core.plan import Plan
from netweight.core.pruning import largest, surviving
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models.digits_cnn import MEAN, STD
from netweight.models.resnet_tuned import tuned_resnet20
from netweight.nn.normalize import Normalize
from netweight.nn.packed import Sparse
from netweight.training.checkpoint import Running
from netweight.training.loop import Hooks, Moment, Training, train

ROUND, EARLY, ROUNDS = 0.2, 12, 14  # share of what is left that goes; rounds to the first and the second bar
QUICK_ROUNDS = 8  # to the first bar
DENSE = Training(epochs=20, rate=3e-3, optimizer="adamw", decay=1e-2, cosine=True)
RETRAIN = Training(epochs=4, rate=1e-3, optimizer="adamw")  # 4 epochs of 20 steps
RULES: dict[str, Callable[[Mapping[str, Tensor], float], dict[str, int]]] = {
    "LAMP": pruning.lamp,
    "ERK": pruning.erk,
    "global": pruning.global_magnitude,
    "uniform": pruning.uniform,
}
IMAGES, POINTS = 96, 20  # of (b): calibration images, steps of the grid
PLANS, MOST = 12, 0.6  # random plans, the largest share that goes in a layer


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """Accuracies over the rounds of one seed, and the sums of distortions of one network."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    share = (1 - ROUND) ** (EARLY / QUICK_ROUNDS if quick else 1)  # of the weights, what a round leaves
    targets = [1 - share**number for number in range(1, rounds + 1)]
    first = (QUICK_ROUNDS if quick else EARLY) - 1
    found = iterated(seed, targets)
    lead = found["RD"]["before"][first] - max(found[name]["before"][first] for name in RULES)
    name = f"digits, {targets[first]:.1%} zeros: accuracy before retraining, RD - best other rule"
    bars, figures = [Bar(name, lead, 0.05 if quick else 0.15, "at least")], {"digits": found}
    if quick:
        return Claim(bars, figures)
    for rule in RULES:
        lead = found["RD"]["after"][-1] - found[rule]["after"][-1]
        name = f"digits, {targets[-1]:.1%} zeros: accuracy after retraining, RD - {rule}"
        bars.append(Bar(name, lead, 0.002 if rule == "LAMP" else 0.01, "at least"))
    once = at_once(seed)
    return Claim([*bars, *once.bars], {**figures, **once.figures})


# (a) The digits, round by round --------------------------------------------------------------------------


def iterated(seed: int, targets: list[float]) -> dict[str, dict[str, list[float]]]:
    """Accuracy before and after retraining at each target, for each rule; "dense" for the network itself."""
    model = network(seed)
    train(model, digits.train(), loss, with_seed(DENSE, seed))
    task = Task(digits.calibration(), digits.test(), train=digits.train())
    found = {"dense": {"before": [], "after": [accuracy(model, task.test)]}}

    def jointly(net: nn.Module, target: float) -> Change:
        return rd_pruning(net, task.blind(), weighted(net), RDPruning(target, worst=True))

    for name in ("RD", *RULES):
        prune = jointly if name == "RD" else by_rule(name)
        net, row = model, {"before": [], "after": [], "zeros": []}
        for number, target in enumerate(targets):
            net = assemble(net, prune(net, target), Plan()).plain()
            row["before"].append(accuracy(net, task.test))
            row["zeros"].append(zeros(net))
            retrain(net, digits.train(), seed * 1000 + number)
            row["after"].append(accuracy(net, task.test))
        found[name] = row
    return found


def network(seed: int) -> nn.Sequential:
    """Three convolutions and two linear layers, random; `b 1 8 8` to ten logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            Normalize([MEAN], [STD]),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def by_rule(name: str) -> Callable[[nn.Module, float], Change]:
    """The counts of a rule, as a Change."""

    def prune(net: nn.Module, target: float) -> Change:
        weights = {layer: weight_of(net, layer) for layer in weighted(net)}
        counts = RULES[name](weights, target)
        return Change({layer: Sparse.of(w, largest(w, counts[layer])) for layer, w in weights.items()})

    return prune


def retrain(net: nn.Module, data: Data, seed: int) -> None:
    """In place; what is zero stays zero."""
    masks = {layer: weight_of(net, layer) != 0 for layer in weighted(net)}

    def masked(run: Running, at: Moment) -> None:
        for layer, mask in masks.items():
            run.model.get_submodule(layer).weight.grad *= mask

    train(net, data, loss, with_seed(RETRAIN, seed), hooks=Hooks(before=masked))


def with_seed(how: Training, seed: int) -> Training:
    """The same training from another seed."""
    return Training(**{**vars(how), "seed": seed})


def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(x), y)


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the images that it gets right."""
    return float((outputs(model, data).argmax(1) == data.y).float().mean())


def zeros(model: nn.Module) -> float:
    """The share of zeros in all weights."""
    weights = [weight_of(model, layer) for layer in weighted(model)]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


# (b) ResNet-20 at once -----------------------------------------------------------------------------------


def at_once(seed: int) -> Claim:
    """The sum of curves against the network, and the best sum against the paper's programme."""
    model, sparsity = tuned_resnet20(seed), 0.6
    data = cifar10().calibration(IMAGES).batched(IMAGES)
    weights = {layer: weight_of(model, layer) for layer in weighted(model)}
    found = curves(model, data, weights, POINTS)
    best = allocation(weights, found, sparsity)
    grids = {layer: kept(weight, POINTS) for layer, weight in weights.items()}
    budget = surviving(sum(w.numel() for w in weights.values()), sparsity)
    programme = dynamic_programme(found, grids, budget)
    chosen = predicted(found, grids, best)
    others = {name: predicted(found, grids, RULES[name](weights, sparsity)) for name in RULES}

    least = chosen / min(others.values())
    sums, moved = additivity(model, data, weights, found, seed)
    fit = float(np.corrcoef(sums, moved)[0, 1])
    ratio = float(np.sum(moved) / np.sum(sums))
    bars = [
        Bar("ResNet-20: correlation of summed and measured distortion", fit, 0.9, "at least"),
        Bar("ResNet-20: measured / summed distortion, not below", ratio, 0.7, "at least"),
        Bar("ResNet-20: measured / summed distortion, not above", ratio, 1.4, "at most"),
        Bar("ResNet-20, 60% zeros: |programme / knapsack - 1|", abs(programme / chosen - 1), 1e-6, "at most"),
        Bar("ResNet-20, 60% zeros: summed distortion, RD / best other rule", least, 1.0, "at most"),
    ]
    test = cifar10().test(2000)
    reached = {"RD": accuracy(pruned(model, weights, best), test)}
    for name, rule in RULES.items():
        reached[name] = accuracy(pruned(model, weights, rule(weights, sparsity)), test)
    figures = {
        "accuracy": {"dense": accuracy(model, test), **reached},
        "summed distortion": {"RD": chosen, **others},
        "additivity": {"summed": list(sums), "measured": list(moved)},
    }
    return Claim(bars, {"ResNet-20, 60% zeros at once": figures})


def dynamic_programme(found: Mapping[str, list[float]], grids: Mapping[str, list[int]], budget: int) -> float:
    """The least sum by the paper's recursion over all surviving counts j,

    g_l(j) = min_k delta_l(k) + g_{l-1}(j - kept_l(k)),   j = 0 ... budget.
    """
    least = np.zeros(budget + 1)
    for layer in sorted(found, key=lambda name: grids[name][0]):
        before, least = least, np.full(budget + 1, np.inf)
        for value, count in zip(found[layer], grids[layer]):
            if count <= budget:
                np.minimum(least[count:], before[: budget + 1 - count] + value, out=least[count:])
    return float(least[-1])


def predicted(
    found: Mapping[str, list[float]], grids: Mapping[str, list[int]], counts: Mapping[str, int]
) -> float:
    """The sum of the curves at these counts, straight lines between the steps of the grid."""
    return sum(float(np.interp(counts[layer], grids[layer][::-1], found[layer][::-1])) for layer in found)


def additivity(
    model: nn.Module, data: Data, weights: Mapping[str, Tensor], found: Mapping[str, list[float]], seed: int
) -> tuple[list[float], list[float]]:
    """Summed and measured distortions of random plans, each layer pruned by 0 to `MOST`."""
    generator = torch.Generator().manual_seed(seed)
    whole = outputs(model, data).double()
    sums, moved = [], []
    for _ in range(PLANS):
        steps = torch.randint(0, int(MOST * POINTS) + 1, (len(weights),), generator=generator).tolist()
        sums.append(sum(found[layer][step] for layer, step in zip(weights, steps)))
        counts = {layer: kept(weights[layer], POINTS)[step] for layer, step in zip(weights, steps)}
        moved.append(float((outputs(pruned(model, weights, counts), data).double() - whole).square().mean()))
    return sums, moved


def pruned(model: nn.Module, weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> nn.Module:
    """The network with so many weights kept in each layer."""
    packed = {layer: Sparse.of(w, largest(w, counts[layer])) for layer, w in weights.items()}
    return assemble(model, Change(packed), Plan()).plain()
