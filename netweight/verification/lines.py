"""Elementwise functions between two lines on an interval.

    found = lines(node, p, x, alpha)      # lower_slope x + lower <= f(x) <= upper_slope x + upper on [l, u]

Of the sound lines that touch the function, alpha in [0, 1] picks one for each side; without it, the one with
the least area between line and function (`start` is its alpha). ReLU is written out (Zhang et al. 2018,
arXiv:1811.00866); what has kinks or steps is in `hull`, smooth functions are in `smooth`: those lines are
found in float64 and hold after they are rounded to the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netweight.core.graph import Node
from netweight.verification.hull import KINKED, STEPPED, kinked, like
from netweight.verification.relax import Interval
from netweight.verification.smooth import CURVES, Wave, curve_sides

Params = Mapping[str, Any]
Alpha = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Lines:
    """Slopes and intercepts, each of the shape of x (and alpha); an intercept of None is 0 everywhere."""

    lower_slope: Tensor
    lower: Tensor | None
    upper_slope: Tensor
    upper: Tensor | None


Side = Any  # what has start and line(alpha): hull.Hull, smooth.Tangents, smooth.Wave


def lines(
    node: Node, p: Params, x: Interval, alpha: Alpha = None, both: tuple[Side, Side] | None = None
) -> Lines:
    """The lines of one elementwise operator of `SCALAR`.

    p: the node's params with x (`*lead *shape`) for what is perturbed. alpha: for the lower and the upper
    line, tensors that broadcast to `*lead *shape`. both: `sides` of these, where known. Infinite ends
    give constants, or infinities.
    """
    if node.op == "aten.relu":
        return relu(x, alpha)
    below, above = both or sides(node, p, x)
    low, high = alpha if alpha is not None else (None, None)
    negated, upper = below.line(low), above.line(high)
    lower_slope, minus = settled(-negated[0], negated[1], x)
    upper_slope, plus = settled(*upper, x)
    return Lines(lower_slope, -minus, upper_slope, plus)


def start(node: Node, p: Params, x: Interval) -> tuple[Tensor, Tensor]:
    """The alpha with which `lines` gives what it gives without one."""
    if node.op == "aten.relu":
        keep = (x.upper > -x.lower).to(x.lower.dtype)
        return keep, torch.zeros_like(keep)
    below, above = sides(node, p, x)
    return below.start.to(x.lower.dtype), above.start.to(x.lower.dtype)


def relu(x: Interval, alpha: Alpha = None) -> Lines:
    """max(x, 0): alpha x or x below, the chord above; the upper line has no choice.

    Off the open interval l < 0 < u both lines are the function itself.
    """
    low, high = x.lower.clamp(max=0), x.upper.clamp(min=0)
    slope = high / (high - low).clamp(min=torch.finfo(high.dtype).tiny)
    slope = slope.nan_to_num(1.0)  # up to infinity: parallel to x
    upper = (-slope * low).nan_to_num(math.inf)  # from minus infinity: no line
    if alpha is None:
        return Lines((high > -low).to(slope.dtype), None, slope, upper)
    opened = (low < 0) & (high > 0)
    return Lines(torch.where(opened, alpha[0], slope), None, slope, upper)


def settled(slope: Tensor, intercept: Tensor, x: Interval) -> tuple[Tensor, Tensor]:
    """A line above in the dtype of x, lifted by what rounding its slope and it itself may cost."""
    dtype, unit = x.lower.dtype, torch.finfo(x.lower.dtype).eps
    given = slope.to(dtype)
    lost = torch.where(given.isfinite(), 0.0, math.inf)
    given = given.nan_to_num(0.0, 0.0, 0.0)
    size = x.size.double()
    size = torch.where(size.isfinite(), size, 0.0)
    lost = lost + (slope - given).abs() * size + 2.0**-48 * (slope.abs() * size + intercept.abs())
    lifted = intercept + lost
    least = torch.finfo(dtype).min  # what overflows must not fall
    return given, (lifted + unit * lifted.abs()).clamp(min=least).to(dtype)


def sides(node: Node, p: Params, x: Interval) -> tuple[Side, Side]:
    """(what lies above -f, what lies above f), in float64."""
    lower, upper = x.lower.double(), x.upper.double()
    if node.op in STEPPED:
        return STEPPED[node.op](node, p, lower, upper)
    if node.op in ("aten.sin", "aten.cos"):
        shift = math.pi / 2 if node.op == "aten.cos" else 0.0
        return tuple(
            Wave(lower + by, upper + by, by) for by in (shift + math.pi, shift)
        )  # -sin x = sin(x + pi)
    if node.op not in CURVES:
        return kinked(node, p, lower, upper, -1), kinked(node, p, lower, upper, 1)
    curve = CURVES[node.op](p)
    below, above = curve_sides(curve, lower, upper)
    if node.op in KINKED:
        above = kinked(node, p, lower, upper, 1)
    if curve.gap:
        near = 1e-6 * abs(curve.jump)  # the network rounds where it compares
        linear = lower > curve.jump + near
        below = Dropping(below, torch.where(upper > curve.jump - near, curve.gap, 0.0), linear, -1.0)
        above = Dropping(above, torch.zeros_like(lower), linear, 1.0)
    return below, above


@dataclass(frozen=True, eq=False)
class Dropping:
    """A side of softplus, which falls by a gap to x: lifted by that gap, and `slope` x where it is linear."""

    side: Side
    gap: Tensor
    linear: Tensor
    slope: float

    @property
    def start(self) -> Tensor:
        """That of the side."""
        return self.side.start

    def line(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """(slope, intercept)."""
        slope, intercept = self.side.line(alpha)
        return torch.where(self.linear, self.slope, slope), torch.where(
            self.linear, 0.0, intercept + self.gap
        )


SCALAR = frozenset([*KINKED, *STEPPED, *CURVES, "aten.sin", "aten.cos"])


# What tighter bounds of x could change -------------------------------------------------------------------


def undecided(node: Node, p: Params, x: Interval) -> Tensor:
    """Where tighter bounds of x could tighten the lines: bool of the shape of x.

    With kinks alone, where one lies strictly inside; with steps, where l and u lie in different cells; else
    where u - l is more than rounding.
    """
    lower, upper = x.lower, x.upper
    if node.op == "aten.relu":
        return (lower < 0) & (upper > 0)
    if node.op in STEPPED:
        below, above = (side.line(None) for side in sides(node, p, x))
        return (above[0] != 0) | (below[0] != 0) | (above[1] + below[1] > 0)
    if node.op in CURVES or node.op not in KINKED:
        return upper - lower > 2.0**-20 * (1 + x.size)
    kinks = [(lower < like(kink, lower)) & (upper > like(kink, lower)) for kink in KINKED[node.op](p)]
    return torch.stack(kinks).any(0)
