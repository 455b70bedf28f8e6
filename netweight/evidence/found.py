"""The second answer: the worst that was found within a set around each test input.

Both networks are attacked (PGD), and each is tried on every point that was found against the other too: a
network whose rounded activations hide its gradient does not look robust for that. A third search looks for
points where only the compressed network leaves the class that the original gives the clean input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from netweight.attacks.disagree import disagree
from netweight.attacks.pgd import pgd
from netweight.core import progress
from netweight.core.intervals import clopper_pearson
from netweight.core.perturbation import Perturbation, with_range
from netweight.core.result import FOUND, Row
from netweight.core.task import Task
from netweight.evidence.average import evaluating, run

SHOWN = 8  # disagreements kept as JSON values
BATCH = 25  # examples attacked together: small enough for a bar that moves
NUMBERS = 4096  # an input of more is left out of them


@dataclass(frozen=True)
class Attacked:
    """What was found on the first `b` examples of the test data.

    broken: whether some point of the set is wrong for the original and for the compressed network (without
    labels: differs from the network's own clean prediction). parted: whether some point was found on which
    only the compressed network leaves the original's clean class; points: that point, or the nearest to one.
    disagreements: the first of them, see `described`.
    """

    rows: list[Row]
    broken: Bool[Tensor, "b 2"]
    parted: Bool[Tensor, " b"]
    points: Float[Tensor, "b *in"]
    disagreements: list[dict[str, Any]]


def measure(
    original: nn.Module,
    small: nn.Module,
    task: Task,
    within: Perturbation,
    *,
    thorough: bool = False,
    seed: int = 0,
) -> Attacked:
    """Search 200 examples for 40 steps; thorough: 1000 examples, 100 steps, 5 restarts."""
    if thorough:
        return search(original, small, task, within, steps=100, restarts=5, seed=seed, limit=1000)
    return search(original, small, task, within, seed=seed, limit=200)


def search(
    original: nn.Module,
    small: nn.Module,
    task: Task,
    within: Perturbation,
    *,
    steps: int = 40,
    restarts: int = 1,
    seed: int = 0,
    limit: int,
) -> Attacked:
    """Attack both networks on the first `limit` test examples, within the set and the data's valid range.

    Raises `DoesNotFit` where inputs are whole numbers or outputs are not `b classes` (see `attacks.pgd`).
    """
    data = task.test.take(limit)
    within = with_range(within, data.low, data.high)
    how = {"steps": steps, "restarts": restarts, "seed": seed}
    broken, parted, points, classes = [], [], [], []
    for x, y in progress.steps(data.batched(BATCH), "Attacking", total=-(-len(data) // BATCH)):
        attacks = [pgd(network, x, y, within, **how) for network in (original, small)]
        apart = disagree(original, small, x, within, **how)
        tried = [found.points.cpu() for found in (*attacks, apart)]
        if not all(within.contains(s, x).all() for s in tried):
            raise AssertionError(f"an attack left the set {within}; this is a bug")
        broken.append(torch.stack([wrong_somewhere(net, x, y, tried) for net in (original, small)], 1))
        classes.append(torch.stack([predictions(net, tried[-1]) for net in (original, small)], 1))
        parted.append(apart.hit.cpu())
        points.append(tried[-1])
    flags, apart = torch.cat(broken), torch.cat(parted)
    table = rows(flags, apart, f"{within}, steps {steps}, restarts {restarts}", labelled=data.y is not None)
    shown = described(data.x, torch.cat(points), torch.cat(classes), apart)
    return Attacked(table, flags, apart, torch.cat(points), shown)


def wrong_somewhere(
    model: nn.Module, x: Tensor, y: Int[Tensor, " b"] | None, tried: list[Float[Tensor, "b *in"]]
) -> Bool[Tensor, " b"]:
    """Whether the prediction on one of the points is not y, or without y not the clean one."""
    of = predictions(model, x) if y is None else y.cpu()
    return torch.stack([predictions(model, s) != of for s in tried]).any(0)


def predictions(model: nn.Module, x: Float[Tensor, "b *in"]) -> Int[Tensor, " b"]:
    """The class with the largest score."""
    with evaluating(model):
        return run(model, x).argmax(1)


def rows(
    broken: Bool[Tensor, "b 2"], parted: Bool[Tensor, " b"], how: str, *, labelled: bool = True
) -> list[Row]:
    """The share that no attack broke, for both networks, and the share on which they were driven apart."""
    n, held, left = len(broken), (~broken).sum(0).tolist(), int(parted.sum())
    quantity = "accuracy under attack" if labelled else "unchanged under attack"
    method = f"PGD on both networks, each tried on the points of both; {how}; Clopper-Pearson"
    low, high = clopper_pearson(held[1], n)
    first = Row(FOUND, quantity, held[0] / n, held[1] / n, low, high, n, method, "float32", "share")
    low, high = clopper_pearson(left, n)
    method = f"points where only the compressed network changes class; {how}; Clopper-Pearson"
    return [first, Row(FOUND, "disagreement found", 0.0, left / n, low, high, n, method, "float32", "share")]


def described(
    x: Float[Tensor, "b *in"],
    points: Float[Tensor, "b *in"],
    classes: Int[Tensor, "b 2"],
    parted: Bool[Tensor, " b"],
) -> list[dict[str, Any]]:
    """The first disagreements as JSON values.

    example: its index in the test data. original, compressed: the class each gives the found point. moved:
    the largest change of a number of the input. input, point: clean and found, unless too long.
    """
    shown = []
    for row in parted.nonzero()[:SHOWN, 0].tolist():
        item: dict[str, Any] = {
            "example": row,
            "original": int(classes[row, 0]),
            "compressed": int(classes[row, 1]),
            "moved": float((points[row] - x[row].cpu()).abs().max()),
        }
        if x[row].numel() <= NUMBERS:
            item |= {"input": x[row].tolist(), "point": points[row].tolist()}
        shown.append(item)
    return shown
