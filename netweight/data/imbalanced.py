"""Data sets whose classes are of different sizes, cut from one where they are of equal size.

    rare = cut(cifar10().train(6000), step_counts(10, most=500, ratio=10, rare=(0, 2, 4, 6, 8)), seed=0)

Two profiles with n_max examples in the largest class and n_max / ratio in the smallest (Cui et al.,
"Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv:1901.05555; Cao et al., "Learning
Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, arXiv:1906.07413):

    step         n_c = n_max, but n_max / ratio for the rare classes,
    long tail    n_c = n_max * ratio^(-c / (C - 1)),     c = 0 .. C - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data


def step_counts(classes: int, most: int, ratio: float, rare: Sequence[int] = ()) -> tuple[int, ...]:
    """Examples of each class: `most`, and most / ratio (rounded, one at least) for the rare classes.

    rare: class numbers; () for the second half. Raises `BadInput` where these are no counts.
    """
    _check(classes, most, ratio)
    chosen = set(rare) or set(range(classes // 2, classes))
    if not chosen <= set(range(classes)):
        raise BadInput(
            f"rare={tuple(rare)}: classes are numbered from 0 to {classes - 1}; give some of these"
        )
    return tuple(max(1, round(most / ratio)) if c in chosen else most for c in range(classes))


def long_tail_counts(classes: int, most: int, ratio: float) -> tuple[int, ...]:
    """Examples of each class, from `most` of class 0 to most / ratio of the last one, always one at least."""
    _check(classes, most, ratio)
    return tuple(max(1, round(most * ratio ** (-c / max(classes - 1, 1)))) for c in range(classes))


def counts_of(data: Data, classes: int | None = None) -> Int64[Tensor, " classes"]:
    """How many examples each class has; classes: how many there are, None for those that data name or hold.

    Raises `DoesNotFit` for data without class numbers, or with numbers that are none of so many classes.
    """
    if data.y is None or data.y.ndim != 1 or data.y.is_floating_point():
        raise DoesNotFit(f"{data.name}: examples are counted by class; give data with one class number each")
    least, most = int(data.y.min()), int(data.y.max())
    classes = classes or max(len(data.classes), most + 1)
    if least < 0 or most >= classes:
        raise DoesNotFit(
            f"{data.name}: class numbers from {least} to {most}, but there are {classes} classes"
        )
    return torch.bincount(data.y.cpu(), minlength=classes)


def cut(data: Data, counts: Sequence[int], seed: int = 0) -> Data:
    """So many examples of each class, chosen at random, in the order in which they stood.

    Raises `BadInput` where a class has fewer than are asked for.
    """
    held = counts_of(data, max(len(counts), len(data.classes)))
    assert data.y is not None
    generator, rows = torch.Generator().manual_seed(seed), []
    for c, count in enumerate(counts):
        if not 0 <= count <= held[c]:
            raise BadInput(f"{data.name}: {count} examples of class {c} are asked for, it has {held[c]}")
        own = (data.y == c).nonzero()[:, 0].cpu()
        rows.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return replace(data.rows(torch.cat(rows).sort().values), name=f"{data.name}, imbalanced")


def _check(classes: int, most: int, ratio: float) -> None:
    if classes < 1 or most < 1 or not 1 <= ratio < float("inf"):
        raise BadInput(
            f"classes={classes}, most={most}, ratio={ratio}: give one class and one example at least, and "
            "how many times as many the largest class has as the smallest"
        )
