"""The second answer: the worst that was found within a set around each test input, by attacks.

Both networks are attacked with PGD, and each is also tried on the points found against the other, so that a network
whose gradients say little does not look robust. Then points are searched on which only the compressed network
leaves the class that the original has for the clean input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from netweight.attacks.disagree import disagree
from netweight.attacks.pgd import pgd
from netweight.core.intervals import clopper_pearson
from netweight.core.perturbation import Perturbation, with_range
from netweight.core.result import FOUND, Row
from netweight.core.task import Task

SHOWN = 8  # disagreements that are kept for the report


@dataclass(frozen=True)
class Search:
    """How hard is searched. limit: test examples looked at."""

    steps: int = 40
    restarts: int = 1
    seed: int = 0
    limit: int | None = 200


THOROUGH = Search(steps=100, restarts=5, limit=1000)


@dataclass(frozen=True)
class Attacked:
    """What was found on the first examples of the test data.

    broken: `b 2`, whether a wrong point was found for the original and for the compressed network (without labels: a
    point with another prediction than the clean one). parted: whether one was found on which only the
    compressed network leaves the original's clean class. points: `b *in`, the point of each search for that.
    disagreements: the first of them as JSON values.
    """

    rows: list[Row]
    broken: Bool[Tensor, "b 2"]
    parted: Bool[Tensor, " b"]
    points: Tensor
    disagreements: list[dict[str, Any]]


def rows(
    original: nn.Module, small: nn.Module, task: Task, within: Perturbation, search: Search = Search()
) -> tuple[list[Row], Attacked]:
    """The rows of `attack`, and what lies behind them."""
    attacked = attack(original, small, task, within, search)
    return attacked.rows, attacked
