"""Whether what the planner adds up tells the truth: predicted beside measured distortion of random plans.

A plan's prediction is the sum of its options' distortions (`evidence.sensitivity`); the truth is the mean KL
divergence of the whole network, carried out. Only the order matters for choosing, hence Spearman's rank
correlation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.stats
from torch import nn

from netweight.compression.quantize.rtn import RTN, encode, rtn
from netweight.core.compressed import Change, assemble, weight_of, weighted
from netweight.core.plan import Option, Plan
from netweight.core.progress import steps
from netweight.core.task import Task
from netweight.evidence.sensitivity import DISTORTIONS, Candidate, Distortion, Judge, options

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Agreement:
    """predicted, measured: a number per random plan. correlation: of their ranks, -1 to 1."""

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation; NaN where either side is constant."""
        if len({*self.predicted}) < 2 or len({*self.measured}) < 2:
            return math.nan
        return float(scipy.stats.spearmanr(self.predicted, self.measured).statistic)


def agreement(
    model: nn.Module,
    task: Task,
    *,
    plans: int = 24,
    seed: int = 0,
    examples: int = 128,
    distortions: Sequence[Distortion] = DISTORTIONS,
) -> dict[str, Agreement]:
    """One Agreement per measure of distortion, all on the same random plans: each layer rounded to nearest,
    per row, at 2 to 8 bits drawn with `seed`."""
    layers = weighted(model)
    tries = [Candidate("rtn", rtn, RTN(bits)) for bits in BITS]
    priced = {
        name: options(model, task, layers, tries, distortion=name, examples=examples)
        for name in steps(distortions, "Pricing by each measure")
    }
    rng = random.Random(seed)
    drawn = [{layer: rng.choice(BITS) for layer in layers} for _ in range(plans)]
    judge = Judge(model, task.calibration.take(examples))
    measured = []
    for plan in steps(drawn, "Measuring random plans"):
        packed = {layer: encode(weight_of(model, layer), RTN(bits)) for layer, bits in plan.items()}
        measured.append(judge.whole(assemble(model, Change(packed), Plan()).model))
    return {
        name: Agreement(tuple(total(found, plan) for plan in drawn), tuple(measured))
        for name, found in priced.items()
    }


def total(found: Sequence[Option], plan: dict[str, int]) -> float:
    """The sum of distortions of the options that a random plan draws."""
    value = {(option.layer, option.settings.get("bits")): option.distortion for option in found}
    return sum(value[layer, bits] for layer, bits in plan.items())
