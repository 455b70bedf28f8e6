"""Yvinec et al. 2024: tables and places learnt together, by a proximal search, are the best codebooks.

The paper (JLCM): a Llama of 7 billion weights in 2 GB, and the best accuracy among codebook methods on
ConvNets and transformers. It shows by a figure that the plain gradient of the places favours extreme entries.
Here: an MLP 64-96-96-10 on scikit-learn's digits for the search itself (4 and 16 entries), ResNet-20
fine-tuned to the JPEG images of CIFAR-10 (8 entries, one table a layer, first and last layer in float) for
accuracy, and the MLP with rows times exp N(0, 1), which leaves its function as it is, for groups of neurons
(8 entries). Logit errors are E|f' - f|^2 / E|f|^2 on test data. Quick: the search alone.

"naive" keeps its last iterate, and so does "proximal" beside it: with the best one kept the naive search
mostly gives back its start. Whatever is called joint here keeps the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from netweight.compression.quantize.adaround import AdaRound, adaround
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.compression.share.jlcm import JLCM, jlcm
from netweight.core.compressed import Change, assemble, weighted
from netweight.core.grid import PER_TENSOR
from netweight.core.plan import Plan
from netweight.core.plant import imbalance
from netweight.core.result import Bar, Claim
from netweight.core.rewrite import rewritten
from netweight.core.sites import sites
from netweight.core.task import Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models.resnet_tuned import tuned_resnet20
from netweight.models.trained import seeded

EPOCHS, BATCH, RATE = 40, 64, 1e-3  # of the MLP


@dataclass(frozen=True)
class Subject:
    """A network, its task, and the layers that are compressed."""

    model: nn.Module
    task: Task
    layers: Sequence[str]

    def change(self, **settings: object) -> Change:
        """What JLCM does, with one group unless said otherwise."""
        return jlcm(self.model, self.task.blind(), self.layers, JLCM(**{"groups": 1, **settings}))  # type: ignore[arg-type]

    def error(self, change: Change) -> float:
        """E|f' - f|^2 / E|f|^2 on the test data."""
        before = outputs(self.model, self.task.test).double()
        after = outputs(assemble(self.model, change, Plan({})).model, self.task.test).double()
        return float((after - before).square().sum() / before.square().sum())

    def accuracy(self, change: Change | None = None) -> float:
        """Share of the test examples that are right."""
        net = self.model if change is None else assemble(self.model, change, Plan({})).model
        return float(self.task.judge.of(outputs(net, self.task.test), self.task.test.y).mean())


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The four bars of one seed; shares and ratios."""
    mlp = digits_subject(seed)
    parts = [joint(mlp), search(mlp)]
    if not quick:
        parts += [images(cifar_subject(seed)), grouping(mlp, seed)]
    figures = {name: figure for part in parts for name, figure in part.figures.items()}
    return Claim([bar for part in parts for bar in part.bars], figures)


def digits_subject(seed: int) -> Subject:
    """The MLP, trained here in a few seconds."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
        )
        data, optimizer = digits.train(), torch.optim.Adam(model.parameters(), RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(data)).split(BATCH):
                loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return Subject(model.eval(), Task(digits.calibration(), digits.test()), weighted(model))


def cifar_subject(seed: int) -> Subject:
    """ResNet-20 on JPEG images: 256 to calibrate, 5,000 to test; all layers but the first and the last."""
    data, model = cifar10(), tuned_resnet20(seed)
    return Subject(model, Task(data.calibration(256), data.test()), weighted(model)[1:-1])


def joint(mlp: Subject) -> Claim:
    """Bar 1: four entries; the places learnt too, against the entries alone, against k-means."""
    found = {
        "RTN": mlp.error(rtn(mlp.model, mlp.task, mlp.layers, RTN(2, group=PER_TENSOR))),
        "k-means": mlp.error(mlp.change(bits=2, steps=0)),
        "entries alone": mlp.error(mlp.change(bits=2, mapping_rate=0.0)),
        "joint": mlp.error(mlp.change(bits=2)),
    }
    bars = [
        Bar("MLP, K=4: logit error, joint / k-means", found["joint"] / found["k-means"], 0.3, "at most"),
        Bar(
            "MLP, K=4: logit error, joint / entries alone",
            found["joint"] / found["entries alone"],
            0.5,
            "at most",
        ),
    ]
    return Claim(bars, {"MLP, K=4: logit error": found})


def search(mlp: Subject) -> Claim:
    """Bar 2: sixteen entries; how far places move, and what it is worth."""
    start = mlp.change(bits=4, steps=0)
    proximal, naive = (mlp.change(bits=4, search=name, best=False) for name in ("proximal", "naive"))
    errors = {
        name: mlp.error(c) for name, c in (("k-means", start), ("proximal", proximal), ("naive", naive))
    }
    far = {name: jumps(start, change) for name, change in (("proximal", proximal), ("naive", naive))}
    moved = "MLP, K=16: share of changed places that move more than one entry"
    bars = [
        Bar(f"{moved}, naive", far["naive"], 0.8, "at least"),
        Bar(f"{moved}, proximal", far["proximal"], 0.1, "at most"),
        Bar(
            "MLP, K=16: logit error, proximal / naive",
            errors["proximal"] / errors["naive"],
            0.3,
            "at most",
        ),
    ]
    return Claim(bars, {"MLP, K=16: logit error": errors})


def jumps(before: Change, after: Change) -> float:
    """Share of the changed places that moved by more than one; NaN where none changed."""
    moves = torch.cat(
        [
            (form.places() - before.packed[layer].places()).abs().reshape(-1)
            for layer, form in after.packed.items()
        ]
    )
    changed = moves[moves > 0]
    return float((changed > 1).float().mean())


def images(resnet: Subject) -> Claim:
    """Bar 3: ResNet-20 with eight entries, against k-means and against AdaRound on a uniform grid."""
    grid = AdaRound(3, symmetric=True, group=PER_TENSOR, steps=150, examples=256)
    changes = {
        "k-means": resnet.change(bits=3, steps=0),
        "joint": resnet.change(bits=3, steps=150),
        "AdaRound": adaround(resnet.model, resnet.task, resnet.layers, grid),
    }
    accuracies = {"float": resnet.accuracy()} | {n: resnet.accuracy(c) for n, c in changes.items()}
    errors = {name: resnet.error(change) for name, change in changes.items()}
    gained = {name: accuracies["joint"] - accuracies[name] for name in ("k-means", "AdaRound")}
    bars = [
        Bar("ResNet-20, K=8: accuracy, joint - k-means", gained["k-means"], 0.04, "at least"),
        Bar(
            "ResNet-20, K=8: logit error, joint / k-means",
            errors["joint"] / errors["k-means"],
            0.4,
            "at most",
        ),
        Bar("ResNet-20, K=8: accuracy, joint - AdaRound at 3 bits", gained["AdaRound"], 0.03, "at least"),
    ]
    return Claim(bars, {"ResNet-20, K=8: accuracy": accuracies, "ResNet-20, K=8: logit error": errors})


def grouping(mlp: Subject, seed: int) -> Claim:
    """Bar 4: k-means with a scale for each group of neurons, on rows of unequal size."""
    plants = imbalance(mlp.model, sites(mlp.model, mlp.task.calibration), spread=1.0, seed=seed)
    hard = Subject(rewritten(mlp.model, plants), mlp.task, mlp.layers)
    found = {
        f"{name}, G={groups}": subject.error(subject.change(bits=3, steps=0, groups=groups))
        for name, subject in (("plain", mlp), ("planted", hard))
        for groups in (1, 4, 8)
    }
    ratio = found["planted, G=4"] / found["planted, G=1"]
    bar = Bar("MLP, planted rows, K=8: logit error, 4 groups / 1", ratio, 0.6, "at most")
    return Claim([bar], {"MLP, k-means, K=8: logit error": found})
