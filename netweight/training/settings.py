"""How a network is trained: epochs, batch, optimizer, and the learning rate of every moment.

The rate of epoch e of E (a fraction within it) is

    rate * min(1, e / warmup) * drop^(number of milestones <= e) * ((1 + cos(pi e / E)) / 2 if cosine).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from netweight.core.errors import BadInput, unknown

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    batch: examples a step, the last one of an epoch may have fewer. rate: the highest learning rate.
    optimizer: adam, adamw, or sgd with momentum 0.9. milestones: epochs (from 0) from which on the rate is
    `drop` times as high. warmup: epochs of a linear rise. decay: weight decay as the optimizer takes it.
    clip: the largest Euclidean norm of the gradient, None for no limit. precision: of the passes, while the
    weights stay in float32: float32, bfloat16, or float16 with a loss that is scaled to keep small gradients
    (the loss itself is to be float32; torch's cross-entropy is).
    """

    epochs: int
    batch: int = 64
    rate: float = 1e-3
    optimizer: str = "adam"
    milestones: tuple[int, ...] = ()
    drop: float = 0.1
    warmup: float = 0.0
    cosine: bool = False
    decay: float = 0.0
    clip: float | None = None
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise BadInput(f"epochs={self.epochs}, batch={self.batch}: training needs at least one of each")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise BadInput(f"rate={self.rate}: the learning rate is a number above 0; give for example 1e-3")
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"clip={self.clip}: the norm of a gradient is clipped above 0; give for example 8")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)


OPTIMIZERS: Mapping[str, Callable[[Iterable[dict[str, Any]], Training], Optimizer]] = {
    "adam": lambda p, how: torch.optim.Adam(p, how.rate, weight_decay=how.decay),
    "adamw": lambda p, how: torch.optim.AdamW(p, how.rate, weight_decay=how.decay),
    "sgd": lambda p, how: torch.optim.SGD(p, how.rate, momentum=0.9, weight_decay=how.decay),
}


def rate_at(epoch: float, how: Training) -> float:
    """The learning rate after `epoch` epochs, a fraction within one."""
    rate = how.rate * how.drop ** sum(epoch >= milestone for milestone in how.milestones)
    if how.warmup:
        rate *= min(1.0, (epoch + 1e-3) / how.warmup)
    return rate * (1 + math.cos(math.pi * epoch / how.epochs)) / 2 if how.cosine else rate
