"""The attack that a network meets while it is trained: projected steps up the loss, from anywhere in a set.

Papers: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
arXiv:1706.06083; with one step, Wong, Rice and Kolter, "Fast is better than free", ICLR 2020,
arXiv:2001.03994.

    s_0 random in S(x), or x,        s_{t+1} = project_S(x)( s_t + size * d_t ),

    d_t = argmax over |d| <= eps of <d, grad l(s_t)>.

The network is in evaluation mode meanwhile: norms keep their statistics, dropout is off, and what is found is
of the network that will be judged. Points are inside the set to the last bit (`core.perturbation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from netweight.core.ascent import around_inputs, projection, slope
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import L1, L2, Box, Linf, parse, with_range
from netweight.core.task import Data
from netweight.core.victim import class_scores, evaluated

Value = Callable[[Tensor, Tensor], Tensor]  # (class scores, class numbers) -> one number per example


def cross_entropy(scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """-log p_y of each example."""
    return F.cross_entropy(scores.float(), y, reduction="none")


@dataclass(frozen=True)
class Adversary:
    """Who attacks: the set, the number of steps, each as a share of its radius, and where they begin."""

    within: Linf | L2 | L1 | Box
    steps: int
    size: float
    random: bool = True

    def points(
        self,
        model: nn.Module,
        x: Float[Tensor, "b *in"],
        y: Int[Tensor, " b"],
        generator: torch.Generator,
        value: Value = cross_entropy,
    ) -> Float[Tensor, "b *in"]:
        """A point of the set around each x at which `value` is high; no gradient reaches the network.

        The network's modes and the gradients of its parameters are left as they were.
        """
        project = projection(self.within, x)
        s = self.within.sample(x, generator) if self.random else project(x)
        with evaluated(model), torch.enable_grad():
            for _ in range(self.steps):
                s = s.detach().requires_grad_()
                rise = slope(value(class_scores(model(s)), y), s)
                s = project(s.detach() + self.size * self.within.steepest(rise, x))
        return s.detach()


def adversary(within: str, steps: int, size: float, data: Data, *, random: bool = True) -> Adversary:
    """The attack of these settings on these data, its set cut to their valid range.

    within: as `core.perturbation.parse` reads it. Raises `BadInput` for numbers that are none of an attack,
    `DoesNotFit` for sets that do not lie around inputs and for inputs that are whole numbers.
    """
    check(within, steps, size)
    if not data.x.is_floating_point():
        raise DoesNotFit(
            f"{data.name}: an attack moves inputs by small amounts, but these are whole numbers; "
            "train on embeddings"
        )
    around = with_range(around_inputs(parse(within)), data.low, data.high)
    return Adversary(around, steps, size, random)  # type: ignore[arg-type]


def check(within: str, steps: int, size: float) -> None:
    """Raises `BadInput` or `DoesNotFit` where these are no settings of an attack."""
    around_inputs(parse(within))
    if steps < 0:
        raise BadInput(f"steps={steps}: an attack makes 0 steps or more; give for example 10")
    if not (math.isfinite(size) and size > 0):
        raise BadInput(f"size={size}: a step is a share of the radius above 0; give for example 0.25")
