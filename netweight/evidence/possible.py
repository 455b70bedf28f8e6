"""The third answer: what provably holds at every point of a set around each test input.

With the class c that a network gives the clean input, and bounds on its scores z over the set S(x),

    min_{s in S(x)}  z_c(s) - z_j(s) > 0   for all j != c        =>        the class is c everywhere in S(x).

Where this is proven of both networks for the same c, compression cannot have changed the class anywhere in
S(x). What was found can never be worse than what is possible; `check` holds the two answers against each
other, example by example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit
from netweight.core.intervals import clopper_pearson
from netweight.core.perturbation import Perturbation, with_range
from netweight.core.result import POSSIBLE, Row
from netweight.core.task import Task
from netweight.evidence.found import Attacked
from netweight.verification.bounds import affordable, captured, certify


@dataclass(frozen=True)
class Proven:
    """What is proven on the first `b` examples of the test data.

    held: whether the original's and the compressed network's class is proven to be right (without labels: not
    to change) in the whole set. agreed: whether both are proven to have the same class in the whole set.
    """

    rows: list[Row]
    held: Bool[Tensor, "b 2"]
    agreed: Bool[Tensor, " b"]


def measure(
    original: nn.Module,
    small: nn.Module,
    task: Task,
    within: Perturbation,
    *,
    thorough: bool = False,
    method: str | None = None,
) -> Proven:
    """Prove on the examples that `found.measure` attacks: the first 200, thorough 1000."""
    return prove(original, small, task, within, method=method, limit=1000 if thorough else 200)


def prove(
    original: nn.Module,
    small: nn.Module,
    task: Task,
    within: Perturbation,
    *,
    method: str | None = None,
    limit: int,
) -> Proven:
    """Bounds for both networks on the first `limit` test examples, within the set and the data's valid range.

    method: of `verification.bounds`; by default CROWN, with intervals inside where neurons are very many.
    A network that cannot be bounded is one of which nothing is proven; the rows' method says why.
    """
    data = task.test.take(limit)
    within = with_range(within, data.low, data.high)
    try:
        graphs = [captured(network, data.x) for network in (original, small)]
        method = method or affordable(*graphs)
        f, g = (certify(graph, replace(data, y=None), within, method=method) for graph in graphs)
        how, arithmetic = f"{method} bounds, {within}", max(f.arithmetic, g.arithmetic)
        held = torch.stack([f.verified, g.verified], 1)
        agreed = held.all(1) & (f.labels == g.labels)
        if data.y is not None:
            held &= torch.stack([f.labels, g.labels], 1) == data.y.cpu()[:, None]
    except DoesNotFit as error:
        how, arithmetic = f"nothing is proven: {error}", "none"
        held = torch.zeros(len(data), 2, dtype=torch.bool)
        agreed = held[:, 0]
    return Proven(rows(held, agreed, how, arithmetic, labelled=data.y is not None), held, agreed)


def rows(
    held: Bool[Tensor, "b 2"], agreed: Bool[Tensor, " b"], how: str, arithmetic: str, *, labelled: bool = True
) -> list[Row]:
    """The share proven for each network, and the share on which they provably have the same class."""
    n, counts, same = len(held), held.sum(0).tolist(), int(agreed.sum())
    quantity = "accuracy proven" if labelled else "unchanged, proven"
    method = f"{how}; Clopper-Pearson"
    low, high = clopper_pearson(counts[1], n)
    first = Row(POSSIBLE, quantity, counts[0] / n, counts[1] / n, low, high, n, method, arithmetic, "share")
    low, high = clopper_pearson(same, n)
    method = f"{how}: both networks proven to have the same class; Clopper-Pearson"
    return [
        first,
        Row(POSSIBLE, "agreement proven", math.nan, same / n, low, high, n, method, arithmetic, "share"),
    ]


def check(attacked: Attacked, proven: Proven) -> None:
    """found <= possible: raises `AssertionError` with the example where a proof and an attack contradict."""
    n = min(len(attacked.broken), len(proven.held))
    for column, name in enumerate(("original", "compressed network")):
        refuted = attacked.broken[:n, column] & proven.held[:n, column]
        _refuse(refuted, f"the {name} is proven right in the whole set and wrong at a point of it")
    _refuse(
        attacked.parted[:n] & proven.agreed[:n], "both networks are proven to agree and were found to part"
    )


def _refuse(refuted: Bool[Tensor, " b"], what: str) -> None:
    if refuted.any():
        example = int(refuted.nonzero()[0, 0])
        raise AssertionError(f"test example {example}: {what}; the bounds are unsound, please report this")
