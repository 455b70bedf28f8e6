"""Arithmetic on intervals that accounts for rounding.

An `Interval` holds every value that a tensor can take: in real arithmetic, and when the network is evaluated
in floating point of unit roundoff u, round to nearest. By induction over the graph: if the computed inputs of
a node lie in their intervals, so does its computed output. For a sum of n products, in any order (Higham
2002, section 3.1),

    |fl(sum w x + b) - (sum w x + b)| <= gamma_n (sum |w| |x| + |b|),       gamma_n = n u / (1 - n u),

an elementary function is taken to be right to 16 u of its size, and whatever float64 loses while the
intervals are computed is added in the same way. Fused multiply-adds stay below these bounds;
reduced-precision products (TF32, bfloat16) and Winograd convolutions do not. A NaN (0 times infinity) becomes
an infinite interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netweight.core.errors import DoesNotFit

UNIT64 = 2.0**-53
TINY = 2.0**-126  # where float32 underflows
ELEMENTARY = 16  # units in which exp, tanh and the like are right


@dataclass(frozen=True, eq=False)
class Interval:
    """lower <= value <= upper, float64 (bool: certainly true, possibly true), of the shape of the value."""

    lower: Tensor
    upper: Tensor

    @property
    def centre(self) -> Tensor:
        """The middle."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half the width."""
        return (self.upper - self.lower) / 2

    @property
    def size(self) -> Tensor:
        """The largest |value|."""
        return torch.maximum(self.lower.abs(), self.upper.abs())


def gamma(terms: int, unit: float) -> float:
    """The relative error of a sum of `terms` products in unit roundoff `unit`, and of ours in float64."""
    lost = terms * unit
    if lost >= 0.5:
        raise DoesNotFit(
            f"a sum of {terms} products cannot be bounded in this precision; use model.float() or .double()"
        )
    return 1.01 * (lost / (1 - lost) + (4 * terms + 32) * UNIT64)


def widened(lower: Tensor, upper: Tensor, size: Tensor, terms: int, unit: float) -> Interval:
    """The interval with the rounding error of `terms` operations on numbers that add up to `size`."""
    slack = gamma(terms, unit) * size + terms * TINY
    return Interval(lower - slack, upper + slack)


# Products of matrices ------------------------------------------------------------------------------------


def affine(
    x: Interval, by: Callable[[Tensor, bool], Tensor], bias: Tensor | float | None, terms: int, unit: float
) -> Interval:
    """`by(x, False)` is the linear part, `by(x, True)` the one with absolute weights."""
    g = gamma(terms, unit)
    centre, radius = x.centre, x.radius
    spread = by(radius + g * (centre.abs() + radius), True) + terms * TINY
    middle = by(centre, False)
    if bias is not None:
        middle, spread = middle + bias, spread + g * abs(bias)
    return Interval(middle - spread, middle + spread)


def multiplied(a: Interval, b: Interval, unit: float) -> Interval:
    """The product of two matrices (the last two axes), by centre and radius."""
    terms = a.lower.shape[-1] + 2
    g = gamma(terms, unit)
    middle = torch.matmul(a.centre, b.centre)
    spread = torch.matmul(a.centre.abs() + a.radius, b.radius) + torch.matmul(a.radius, b.centre.abs())
    spread = (1 + g) * spread + g * torch.matmul(a.size, b.size) + terms * TINY
    return Interval(middle - spread, middle + spread)


# Arithmetic of two arguments -----------------------------------------------------------------------------


def interval(value: Any) -> Interval:
    """A tensor or number as an interval of one point."""
    if isinstance(value, Interval):
        return value
    point = torch.as_tensor(value, dtype=torch.float64) if not isinstance(value, Tensor) else value
    return Interval(point, point)


def added(a: Any, b: Any, unit: float) -> Interval:
    """a + b."""
    a, b = interval(a), interval(b)
    return widened(a.lower + b.lower, a.upper + b.upper, a.size + b.size, 2, unit)


def negated(x: Any) -> Interval:
    """-x."""
    x = interval(x)
    return Interval(-x.upper, -x.lower)


def times(a: Any, b: Any, unit: float) -> Interval:
    """a b; a square where both are the same value."""
    if a is b:
        return powered(a, 2, unit)
    a, b = interval(a), interval(b)
    ends = [a.lower * b.lower, a.lower * b.upper, a.upper * b.lower, a.upper * b.upper]
    return widened(least(ends), most(ends), a.size * b.size, 4, unit)


def divided(a: Any, b: Any, unit: float) -> Interval:
    """a / b; everything where b can be 0."""
    a, b = interval(a), interval(b)
    ends = [a.lower / b.lower, a.lower / b.upper, a.upper / b.lower, a.upper / b.upper]
    zero = (b.lower <= 0) & (b.upper >= 0)
    lower = torch.where(zero, -torch.inf, least(ends))
    upper = torch.where(zero, torch.inf, most(ends))
    return widened(lower, upper, Interval(lower, upper).size, 4, unit)


def least(tensors: Sequence[Tensor]) -> Tensor:
    """The elementwise minimum."""
    return torch.stack(torch.broadcast_tensors(*tensors)).amin(0)


def most(tensors: Sequence[Tensor]) -> Tensor:
    """The elementwise maximum."""
    return torch.stack(torch.broadcast_tensors(*tensors)).amax(0)


def absolute(x: Interval) -> Interval:
    """|x|."""
    return Interval(torch.maximum(x.lower, -x.upper).clamp(min=0), x.size)


def powered(x: Interval, exponent: float, unit: float) -> Interval:
    """x to a fixed power; a power that is not whole exists from 0 on only, so x is taken to be at least 0."""
    if exponent < 0:
        return divided(1.0, powered(x, -exponent, unit), unit)
    if exponent != int(exponent):
        x = Interval(x.lower.clamp(min=0), x.upper.clamp(min=0))
    elif exponent % 2 == 0:
        x = absolute(x)
    lower, upper = x.lower**exponent, x.upper**exponent
    # an exponent that is not whole is rounded, which moves the power by up to 128 exponent u of its size
    terms = ELEMENTARY + int(exponent if exponent == int(exponent) else 128 * (exponent + 1))
    return widened(lower, upper, Interval(lower, upper).size, terms, unit)


def wave(x: Interval, peak: float, f: Callable[[Tensor], Tensor], unit: float) -> Interval:
    """sin or cos: 1 where a peak (at `peak` plus full turns) can lie inside, -1 where a trough can."""
    reach = 1e-12 * (1 + x.size)

    def holds(place: float) -> Tensor:
        turns = [(x.lower - reach - place) / math.tau, (x.upper + reach - place) / math.tau]
        return turns[1].floor() >= turns[0].ceil()

    ends = [f(x.lower), f(x.upper)]
    lower = torch.where(holds(peak + math.pi), -1.0, least(ends))
    upper = torch.where(holds(peak), 1.0, most(ends))
    return widened(lower, upper, torch.ones_like(lower), ELEMENTARY, unit)


# Truth ---------------------------------------------------------------------------------------------------


def threshold(value: Any, unit: float) -> Interval:
    """What is compared; a plain number is rounded to the precision of the network first."""
    slack = 0.0 if isinstance(value, Interval | Tensor) else 2 * unit * abs(value)
    value = interval(value)
    return Interval(value.lower - slack, value.upper + slack) if slack else value


def above(a: Any, b: Any, strict: bool, unit: float) -> Interval:
    """a > b or a >= b."""
    a, b = threshold(a, unit), threshold(b, unit)
    compare = torch.gt if strict else torch.ge
    return Interval(compare(a.lower, b.upper), compare(a.upper, b.lower))


def equal(a: Any, b: Any, unit: float) -> Interval:
    """a == b."""
    a, b = threshold(a, unit), threshold(b, unit)
    certain = (a.lower == a.upper) & (b.lower == b.upper) & (a.lower == b.lower)
    return Interval(certain, (a.lower <= b.upper) & (b.lower <= a.upper))


def no(x: Interval) -> Interval:
    """not x."""
    return Interval(~x.upper, ~x.lower)


def chosen(condition: Any, a: Any, b: Any) -> Interval:
    """a where the condition holds, else b; either where that is open."""
    condition, a, b = interval(condition), interval(a), interval(b)
    yes, maybe = condition.lower, condition.upper
    lower = torch.where(yes, a.lower, torch.where(maybe, torch.minimum(a.lower, b.lower), b.lower))
    return Interval(
        lower, torch.where(yes, a.upper, torch.where(maybe, torch.maximum(a.upper, b.upper), b.upper))
    )


# Softmax and normalisation -------------------------------------------------------------------------------


def softmax(x: Interval, dim: int, unit: float) -> Interval:
    """e^{x_i} / (e^{x_i} + sum of the others): rises in x_i, falls in the others."""
    top = x.upper.amax(dim, keepdim=True)
    high, low = (x.upper - top).exp(), (x.lower - top).exp()
    others_high, others_low = without_own(high, dim), without_own(low, dim)
    lower = low / (low + others_high.upper)
    upper = high / (high + others_low.lower)
    upper = torch.where(upper.isnan(), 1.0, upper)
    size = upper * (1 + 2 * reach(x, dim))  # an exponent that is off by its rounding
    found = widened(lower, upper, size, x.lower.shape[dim] + ELEMENTARY, unit)
    return Interval(found.lower.clamp(min=0), found.upper)


def log_softmax(x: Interval, dim: int, unit: float) -> Interval:
    """-log(1 + sum over the others of e^{x_j - x_i})."""
    top = x.upper.amax(dim, keepdim=True)
    others_high = without_own((x.upper - top).exp(), dim).upper.log() + top
    bottom = x.lower.amax(dim, keepdim=True)
    others_low = without_own((x.lower - bottom).exp(), dim).lower.log() + bottom
    lower = x.lower - torch.logaddexp(x.lower, others_high)
    upper = x.upper - torch.logaddexp(x.upper, others_low)
    size = 2 * reach(x, dim) + 1
    return widened(lower, upper, size, x.lower.shape[dim] + ELEMENTARY, unit)


def reach(x: Interval, dim: int) -> Tensor:
    """The largest finite |value| along an axis: a score of -inf masks its place and is exact."""
    return x.size.masked_fill(x.size.isinf(), 0.0).amax(dim, keepdim=True)


def without_own(values: Tensor, dim: int | tuple[int, ...]) -> Interval:
    """The sum of all values >= 0 but one's own, with the error of the subtraction."""
    total = values.sum(dim, keepdim=True)
    lost = (values.numel() // total.numel() + 4) * 2 * UNIT64 * total
    return Interval((total - values - lost).clamp(min=0), total - values + lost)


def normalised(x: Interval, dims: tuple[int, ...], eps: float, centred: bool, unit: float) -> Interval:
    """c / sqrt(mean c^2 + eps), c = x - mean x (or x): rises in its c_i, the other c_j^2 bounded apart."""
    n = math.prod(x.lower.shape[d] for d in dims)
    size = x.size.amax(dims, keepdim=True)
    slack = 2 * gamma(n + ELEMENTARY, unit) * size
    c = x
    if centred:
        keep = (n - 1) / n
        c = Interval(
            x.lower * keep - (x.upper.sum(dims, keepdim=True) - x.upper) / n,
            x.upper * keep - (x.lower.sum(dims, keepdim=True) - x.lower) / n,
        )
    c = Interval(c.lower - slack, c.upper + slack)
    square = powered(c, 2, unit)
    drift = (
        4 * gamma(n + ELEMENTARY, unit) * x.size.square().sum(dims, keepdim=True)
    )  # of the computed variance
    low = (without_own(square.lower.clamp(min=0), dims).lower - drift).clamp(min=0)
    high = without_own(square.upper, dims).upper + drift
    ends = []
    for end, far in ((c.lower, c.lower < 0), (c.upper, c.upper > 0)):
        ends.append(end / ((end**2 + torch.where(far, low, high)) / n + eps).sqrt())
    return widened(ends[0], ends[1], Interval(*ends).size, ELEMENTARY, unit)


def scaled(x: Interval, weight: Tensor | None, bias: Tensor | None, unit: float) -> Interval:
    """x w + b."""
    x = x if weight is None else times(x, weight, unit)
    return x if bias is None else added(x, bias, unit)


def deviation(x: Interval, dims: tuple[int, ...], centred: bool, unit: float) -> Interval:
    """sum of c^2 with c = x - mean x (or x), dims kept."""
    n = math.prod(x.lower.shape[d] for d in dims)
    slack = 2 * gamma(n + ELEMENTARY, unit) * x.size.amax(dims, keepdim=True)
    mean_low, mean_high = x.lower.mean(dims, keepdim=True), x.upper.mean(dims, keepdim=True)
    c = Interval(x.lower - mean_high - slack, x.upper - mean_low + slack) if centred else x
    square = powered(c, 2, unit)
    lower, upper = square.lower.sum(dims, keepdim=True), square.upper.sum(dims, keepdim=True)
    found = widened(lower, upper, 4 * x.size.square().sum(dims, keepdim=True), n + ELEMENTARY, unit)
    return Interval(found.lower.clamp(min=0), found.upper)
