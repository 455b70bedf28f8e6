"""The second answer: the worst that was found within a set around each test input.

Both networks are attacked (PGD; thorough: the ensemble of `attacks.ensemble`), and each is tried on every
point that was found against the other too: a network whose rounded activations hide its gradient does not
look robust for that, and what carries over from one to the other stands in a row of its own. A third search
looks for points where only the compressed network leaves the class that the original gives the clean input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from netweight.attacks.disagree import disagree
from netweight.attacks.ensemble import ensemble
from netweight.attacks.pgd import pgd
from netweight.core import progress
from netweight.core.intervals import clopper_pearson, paired_difference
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
    """PGD on 200 examples for 40 steps; thorough: the ensemble on 1000 examples with 100 steps."""
    if thorough:
        return search(original, small, task, within, by="ensemble", steps=100, seed=seed, limit=1000)
    return search(original, small, task, within, seed=seed, limit=200)


def search(
    original: nn.Module,
    small: nn.Module,
    task: Task,
    within: Perturbation,
    *,
    by: Literal["pgd", "ensemble"] = "pgd",
    steps: int = 40,
    seed: int = 0,
    limit: int,
) -> Attacked:
    """Attack both networks on the first `limit` test examples, within the set and the data's valid range.

    Raises `DoesNotFit` where inputs are whole numbers or outputs are not `b classes` (see `attacks.pgd`).
    """
    data = task.test.take(limit)
    within = with_range(within, data.low, data.high)
    attack = ensemble if by == "ensemble" else pgd
    wrong, parted, points, classes = [], [], [], []
    for x, y in progress.steps(data.batched(BATCH), "Attacking", total=-(-len(data) // BATCH)):
        attacks = [attack(network, x, y, within, steps=steps, seed=seed) for network in (original, small)]
        apart = disagree(original, small, x, within, steps=steps, seed=seed)
        tried = [found.points.cpu() for found in (*attacks, apart)]
        if not all(within.contains(s, x).all() for s in tried):
            raise AssertionError(f"an attack left the set {within}; this is a bug")
        wrong.append(torch.stack([wrong_each(net, x, y, tried) for net in (original, small)], 1))
        classes.append(torch.stack([predictions(net, tried[-1]) for net in (original, small)], 1))
        parted.append(apart.hit.cpu())
        points.append(tried[-1])
    flags, apart = torch.cat(wrong), torch.cat(parted)
    how = f"{by}; {within}, steps {steps}"
    table = rows(flags, how, labelled=data.y is not None) + [disagreement_row(apart, how)]
    shown = described(data.x, torch.cat(points), torch.cat(classes), apart)
    return Attacked(table, flags.any(2), apart, torch.cat(points), shown)


def wrong_each(
    model: nn.Module, x: Tensor, y: Int[Tensor, " b"] | None, tried: list[Float[Tensor, "b *in"]]
) -> Bool[Tensor, "b points"]:
    """Whether the prediction on each of the points is not y, or without y not the clean one."""
    of = predictions(model, x) if y is None else y.cpu()
    return torch.stack([predictions(model, s) != of for s in tried], 1)


def predictions(model: nn.Module, x: Float[Tensor, "b *in"]) -> Int[Tensor, " b"]:
    """The class with the largest score."""
    with evaluating(model):
        return run(model, x).argmax(1)


def rows(wrong: Bool[Tensor, "b 2 points"], how: str, *, labelled: bool = True) -> list[Row]:
    """The share that no attack broke, what compressing did to it, and what carries over between the two.

    wrong: of both networks, on the points found against the original, against the compressed network, and by
    the search for disagreements.
    """
    n, broken = len(wrong), wrong.any(2)
    quantity = "accuracy under attack" if labelled else "unchanged under attack"
    method = f"{how}, on both networks, each tried on the points of both; Clopper-Pearson"
    held = _share(quantity, ~broken, method)
    gained, lost = (broken[:, 0] & ~broken[:, 1]).sum(), (~broken[:, 0] & broken[:, 1]).sum()
    low, high = paired_difference(int(gained), int(lost), n)
    change = Row(
        FOUND, "change under attack", 0.0, held.compressed - held.original, low, high, n,
        "shares gained and lost on the same examples, Clopper-Pearson each", "float32", "share",
    )  # fmt: skip
    carried = [
        _share(f"on points of {whose}", ~wrong[:, :, at], f"{how}, on the {whose} network alone")
        for at, whose in enumerate(("original", "compressed"))
    ]
    return [held, change, *carried]


def _share(quantity: str, held: Bool[Tensor, "b 2"], method: str) -> Row:
    """The share that holds, with the interval of the compressed network's."""
    n, (before, after) = len(held), held.sum(0).tolist()
    low, high = clopper_pearson(after, n)
    return Row(FOUND, quantity, before / n, after / n, low, high, n, method, "float32", "share")


def disagreement_row(parted: Bool[Tensor, " b"], how: str) -> Row:
    """The share on which the two networks were driven apart."""
    n, left = len(parted), int(parted.sum())
    low, high = clopper_pearson(left, n)
    method = f"points where only the compressed network changes class; {how}; Clopper-Pearson"
    return Row(FOUND, "disagreement found", 0.0, left / n, low, high, n, method, "float32", "share")


def verdict(change: Row) -> str:
    """Whether compressing gained or lost robustness, as far as these examples can tell."""
    points = (
        f"{100 * change.compressed:+.1f} points under attack, "
        f"between {100 * change.low:+.1f} and {100 * change.high:+.1f} (95%)"
    )
    if change.low > 0:
        return f"Compressing gained robustness: {points}."
    if change.high < 0:
        return f"Compressing lost robustness: {points}."
    return f"{change.n} examples do not tell whether compressing gained or lost robustness: {points}."


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
