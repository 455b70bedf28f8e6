"""Lines above smooth functions: the chord where the function is convex, tangents where it is concave.

A side is what lies above a function g on [l, u]; below f lies minus what lies above -f. Every line that
touches the least concave function above g is sound, and the one that touches it over the middle of [l, u]
has the least area between line and function, since the mean of a line is its value in the middle. So a side
holds the lines that touch, `line(alpha)` gives one of them for alpha in [0, 1], and `line(None)` the one over
the middle (`start` is its alpha).

On an interval of which one piece [a, b] is concave and the rest convex, these are the tangents at d in
[low, high]: `low` is the first d whose tangent is not below g at l, `high` the last with the same at u; where
there is none, the chord. This covers convex and concave functions, S-shapes (Zhang et al. 2018,
arXiv:1811.00866, section 3), and by a choice between two pieces gelu, silu and mish. For sin and cos the
largest distance from a line of any slope is known in closed form.

Everything is float64. What is rounded off is made up for in `lines.settled`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STEPS = 30  # halvings: the place of a tangent moves the area in second order only
TURNS = 44  # halvings for the slope of a line above a wave, which moves it in first order
NARROW = 1e-8  # of a width, relative: where the chord's slope drowns in rounding and the derivative serves
ALL, NONE = (-math.inf, math.inf), (math.inf, -math.inf)
Function = Callable[[Tensor], Tensor]
Piece = tuple[Any, Any]  # from, to


@dataclass(frozen=True)
class Curve:
    """A function, its derivative, and where it bends which way.

    concave: the piece that matters above it; of two, the first where f falls from l to u (f must fall on all
    of that piece), else the second. convex: the piece below. domain: where it exists; what is left of it is
    taken to be its end. pole: where it has no bounds. bottom: where its least value lies, if not at an end.
    gap: by how much f may lie below `value` right of `jump`.
    """

    value: Function
    slope: Function
    concave: Sequence[Piece] = ((0.0, math.inf),)
    convex: Piece = (-math.inf, 0.0)
    domain: float = -math.inf
    pole: float = math.nan
    bottom: float = math.nan
    jump: float = math.inf
    gap: float = 0.0


@dataclass(frozen=True, eq=False)
class Tangents:
    """Lines above `value` on [l, u]: tangents at d in [low, high] where `valid`, else of slope `chord`.

    peak: the constant that serves where no line does.
    """

    value: Function
    slope: Function
    l: Tensor  # noqa: E741
    u: Tensor
    low: Tensor
    high: Tensor
    valid: Tensor
    chord: Tensor
    peak: Tensor

    @property
    def start(self) -> Tensor:
        """The alpha of the tangent over the middle."""
        wide = self.high - self.low
        return torch.where(wide > 0, (self._middle() - self.low) / torch.where(wide > 0, wide, 1.0), 0.5)

    def _middle(self) -> Tensor:
        return torch.minimum(torch.maximum((self.l + self.u) / 2, self.low), self.high)

    def line(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """(slope, intercept)."""
        d = self._middle() if alpha is None else self.low + alpha * (self.high - self.low)
        slope = torch.where(self.valid, self.slope(d), self.chord)
        touching = torch.where(self.valid, self.value(d) - slope * d, -math.inf)
        ends = torch.maximum(self.value(self.l) - slope * self.l, self.value(self.u) - slope * self.u)
        return fallen_back(slope, torch.maximum(touching, ends), self.peak)


@dataclass(frozen=True, eq=False)
class Wave:
    """Lines above sin on [l, u].

    sin x - t x has its tops at acos t + 2 pi k, where it is sqrt(1 - t^2) - t x: of these only the first and
    the last inside of [l, u] count, beside l and u. So the intercept of any slope t is exact.
    """

    l: Tensor  # noqa: E741
    u: Tensor
    shift: float  # sin(x + shift) is bounded

    def highest(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The largest sin x - t x on [l, u], and where it is."""
        top, angle = (1 - t * t).sqrt(), torch.acos(t)
        first = ((self.l - angle) / math.tau - 1e-12).ceil() * math.tau + angle
        last = ((self.u - angle) / math.tau + 1e-12).floor() * math.tau + angle
        places = torch.stack(torch.broadcast_tensors(self.l, self.u, first, last))
        heights = torch.stack([self.l.sin().expand_as(top), self.u.sin().expand_as(top), top, top])
        over = heights - t * places
        over = torch.cat([over[:2], torch.where(first <= last, over[2:], -math.inf)])
        found, index = over.max(0)
        return found, places.gather(0, index.unsqueeze(0)).squeeze(0)

    def best(self) -> Tensor:
        """The slope of the line that is lowest in the middle m: t m + c(t) is convex, its slope m - x(t)."""
        middle = (self.l + self.u) / 2
        low, high = torch.full_like(middle, -1.0), torch.ones_like(middle)
        with torch.no_grad():
            for _ in range(TURNS):
                t = (low + high) / 2
                steeper = self.highest(t)[1] > middle
                low, high = torch.where(steeper, t, low), torch.where(steeper, high, t)
        narrow = self.u - self.l <= NARROW * middle.abs() + 1e-10
        return torch.where(narrow, middle.cos(), (low + high) / 2)

    @property
    def start(self) -> Tensor:
        """The line over the middle."""
        return torch.full_like(self.l, 0.5)

    def line(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """(slope, intercept); alpha moves the slope around the best one, less on wide intervals."""
        t = self.best()
        if alpha is not None:
            t = t + (2 * alpha - 1) / (1 + (self.u - self.l))
        t = t.clamp(-1 + 1e-12, 1 - 1e-12)  # any slope is sound, and the root has a derivative inside
        far = self.l.abs().maximum(self.u.abs()) > 1e8  # where the argument itself is hardly known
        slope, found = torch.where(far, 0.0, t), torch.where(far, 1.0, self.highest(t)[0])
        return fallen_back(slope, found + slope * self.shift, torch.ones_like(found))


def fallen_back(slope: Tensor, intercept: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """The line, or the constant `peak` where it is not finite."""
    fine = slope.isfinite() & intercept.isfinite()
    return torch.where(fine, slope, 0.0), torch.where(fine, intercept, peak)


def curve_sides(curve: Curve, lower: Tensor, upper: Tensor) -> tuple[Any, Any]:
    """(what lies above -f, what lies above f) on [lower, upper]."""
    lower, upper = lower.clamp(min=curve.domain), upper.clamp(min=curve.domain)

    def minus(x: Tensor) -> Tensor:
        return -curve.value(x)

    def slope_of_minus(x: Tensor) -> Tensor:
        return -curve.slope(x)

    below = tangents(curve, minus, slope_of_minus, [curve.convex], lower, upper)
    return below, tangents(curve, curve.value, curve.slope, curve.concave, lower, upper)


def tangents(
    curve: Curve, value: Function, slope: Function, pieces: Sequence[Piece], lower: Tensor, upper: Tensor
) -> Tangents:
    """The lines above `value` on [lower, upper] that touch it, of which one of `pieces` is concave."""
    places = [lower, upper]
    if not math.isnan(curve.bottom):
        places.append(torch.full_like(lower, curve.bottom).clamp(lower, upper))
    peak = torch.stack([value(place) for place in places]).amax(0).nan_to_num(math.inf, math.inf, math.inf)
    crossing = (lower <= curve.pole) & (upper >= curve.pole)
    peak = torch.where(crossing, math.inf, peak)

    finite = lower.isfinite() & upper.isfinite() & ~crossing
    safe = 1.0 if curve.domain > -math.inf or not math.isnan(curve.pole) else 0.0
    l, u = torch.where(finite, lower, safe), torch.where(finite, upper, safe)  # noqa: E741
    chord = chord_slope(value, slope, l, u)
    start, end = pieces[-1]
    if len(pieces) == 2:
        falls = chord < 0
        start, end = (torch.where(falls, one, two) for one, two in zip(*pieces))
    with torch.no_grad():
        low, high, valid = touching(value, slope, start, end, l, u)
    peak = torch.where(finite, torch.where(crossing, math.inf, peak), peak)
    chord = torch.where(finite, chord, math.nan)
    return Tangents(value, slope, l, u, low, high, valid & finite, chord, peak)


def chord_slope(value: Function, slope: Function, l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """(g(u) - g(l)) / (u - l); the derivative in the middle where that is rounding alone."""
    middle, width = (l + u) / 2, u - l
    narrow = width <= NARROW * middle.abs() + 1e-10
    return torch.where(narrow, slope(middle), (value(u) - value(l)) / torch.where(narrow, 1.0, width))


def touching(
    value: Function,
    slope: Function,
    start: Any,
    end: Any,
    l: Tensor,  # noqa: E741
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(low, high, valid): where tangents to the concave piece [start, end] lie above g at l and at u."""
    first = torch.maximum(l, torch.as_tensor(start, dtype=l.dtype, device=l.device))
    last = torch.minimum(u, torch.as_tensor(end, dtype=l.dtype, device=l.device))
    edge = ~slope(first).isfinite()  # a vertical tangent at the end of the domain
    first = torch.where(edge, first + 1e-3 * (u - first), first)
    valid = first < last
    last = torch.maximum(first, last)

    low, high = first.clone(), last.clone()
    for x, near, far, found, beyond in ((l, first, last, low, l < start), (u, last, first, high, u > end)):
        needed = beyond & valid
        if bool(needed.any()):
            place, exists = nearest(value, slope, x[needed], near[needed], far[needed])
            found[needed], valid[needed] = place, exists
    valid = valid & (low <= high)
    return torch.where(valid, low, l), torch.where(valid, high, u), valid


def nearest(value: Function, slope: Function, x: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """The d nearest to `near` whose tangent is not below g at x, and whether `far`'s is not either."""
    at = value(x)

    def over(d: Tensor) -> Tensor:
        return value(d) + slope(d) * (x - d) >= at

    good, bad, exists = far, near, over(far)
    for _ in range(STEPS):
        middle = (good + bad) / 2
        enough = over(middle)
        good, bad = torch.where(enough, middle, good), torch.where(enough, bad, middle)
    return good, exists


# The curves ----------------------------------------------------------------------------------------------


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _gelu(p: Mapping[str, Any]) -> Curve:
    """x Phi(x): convex between -sqrt 2 and sqrt 2. Its form with tanh bends at +-1.41850..."""
    if p["approximate"] == "none":
        root, half = math.sqrt(2), math.sqrt(2 * math.pi)
        return _bowl(
            lambda x: 0.5 * x * torch.erfc(-x / root),
            lambda x: 0.5 * torch.erfc(-x / root) + x * torch.exp(-x * x / 2) / half,
            (-math.sqrt(2), math.sqrt(2)),
            -0.751791524693564457,
        )
    scale, cubic = math.sqrt(2 / math.pi), 0.044715

    def value(x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * scale * (x + cubic * x**3))

    def slope(x: Tensor) -> Tensor:
        z = 2 * scale * (x + cubic * x**3)
        inner = x * (2 * scale * (1 + 3 * cubic * x * x))
        return torch.sigmoid(z) + _sigmoid_slope(z) * inner

    return _bowl(value, slope, (-1.4185040087908283555, 1.4185040087908283555), -0.75246142207101625849)


def _bowl(value: Function, slope: Function, bends: tuple[float, float], bottom: float) -> Curve:
    """gelu, silu, mish: convex between the bends; left of the first they fall towards it from 0."""
    return Curve(value, slope, ((-math.inf, bends[0]), (bends[1], math.inf)), bends, bottom=bottom)


def _silu(p: Mapping[str, Any]) -> Curve:
    def slope(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))

    return _bowl(lambda x: x * torch.sigmoid(x), slope, (-2.3993572805154676, 2.3993572805154676),
                 -1.2784645427610737)  # fmt: skip


def _mish(p: Mapping[str, Any]) -> Curve:
    def slope(x: Tensor) -> Tensor:
        t = torch.tanh(torch.nn.functional.softplus(x))
        return t + x * (1 - t * t) * torch.sigmoid(x)

    return _bowl(torch.nn.functional.mish, slope, (-2.2563763963607931, 1.4905711794854284),
                 -1.1924312145154952)  # fmt: skip


def _power(exponent: float) -> Curve:
    """x to a fixed power; one that is not whole exists from 0 on only."""
    whole, below = exponent == int(exponent), exponent < 0

    def value(x: Tensor) -> Tensor:
        return x**exponent

    def slope(x: Tensor) -> Tensor:
        return exponent * x ** (exponent - 1)

    if not whole:
        bent = 0 < exponent < 1
        return Curve(value, slope, (ALL if bent else NONE,), NONE if bent else ALL, domain=0.0)
    if exponent in (0, 1):
        return Curve(value, slope, (NONE,), NONE)
    pole = 0.0 if below else math.nan
    if exponent % 2 == 0:
        return Curve(value, slope, (NONE,), ALL, pole=pole, bottom=math.nan if below else 0.0)
    return Curve(value, slope, ((-math.inf, 0.0),), (0.0, math.inf), pole=pole)


def _logarithm(value: Function, slope: Function, domain: float = 0.0) -> Curve:
    return Curve(value, slope, (ALL,), NONE, domain=domain)


def _elu(p: Mapping[str, Any]) -> Curve:
    """Below, convex where the slope only grows; above it has a kink at 0, which `hull` treats."""
    inner, outer = p["alpha"] * p["scale"], p["scale"]
    rate = p["input_scale"]

    def value(x: Tensor) -> Tensor:
        return torch.where(x > 0, outer * x, inner * torch.expm1(rate * x.clamp(max=0)))

    def slope(x: Tensor) -> Tensor:
        return torch.where(x > 0, outer, inner * rate * torch.exp(rate * x.clamp(max=0)))

    return Curve(value, slope, (NONE,), ALL if inner * rate <= outer else (-math.inf, 0.0))


def _softplus(p: Mapping[str, Any]) -> Curve:
    """log(1 + e^(beta x)) / beta, and x itself right of threshold / beta."""
    beta, threshold = float(p["beta"]), float(p["threshold"])

    def value(x: Tensor) -> Tensor:
        return torch.logaddexp(torch.zeros_like(x), beta * x) / beta

    gap = math.log1p(math.exp(-threshold)) / beta
    return Curve(value, lambda x: torch.sigmoid(beta * x), (NONE,), ALL, jump=threshold / beta, gap=gap)


def _hardswish(p: Mapping[str, Any]) -> Curve:
    """Below; above it is convex between its kinks, which `hull` treats."""
    return Curve(
        lambda x: x * (x + 3).clamp(0, 6) / 6,
        lambda x: torch.where(x.abs() > 3, (x > 0).to(x), (2 * x + 3) / 6),
        (NONE,), (-3.0, 3.0), bottom=-1.5,
    )  # fmt: skip


CURVES: Mapping[str, Callable[[Mapping[str, Any]], Curve]] = {
    "aten.sigmoid": lambda p: Curve(torch.sigmoid, _sigmoid_slope),
    "aten.tanh": lambda p: Curve(torch.tanh, lambda x: 1 / torch.cosh(x) ** 2),
    "aten.erf": lambda p: Curve(torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x)),
    "aten.atan": lambda p: Curve(torch.atan, lambda x: 1 / (1 + x * x)),
    "aten.asinh": lambda p: Curve(torch.asinh, lambda x: (1 + x * x).rsqrt()),
    "aten.sinh": lambda p: Curve(torch.sinh, torch.cosh, ((-math.inf, 0.0),), (0.0, math.inf)),
    "aten.exp": lambda p: Curve(torch.exp, torch.exp, (NONE,), ALL),
    "aten.expm1": lambda p: Curve(torch.expm1, torch.exp, (NONE,), ALL),
    "aten.log": lambda p: _logarithm(torch.log, torch.reciprocal),
    "aten.log2": lambda p: _logarithm(torch.log2, lambda x: 1 / (x * math.log(2))),
    "aten.log10": lambda p: _logarithm(torch.log10, lambda x: 1 / (x * math.log(10))),
    "aten.log1p": lambda p: _logarithm(torch.log1p, lambda x: 1 / (1 + x), -1.0),
    "aten.sqrt": lambda p: _power(0.5),
    "aten.rsqrt": lambda p: _power(-0.5),
    "aten.reciprocal": lambda p: _power(-1.0),
    "aten.square": lambda p: _power(2.0),
    "aten.pow": lambda p: _power(float(p["exponent"])),
    "aten.gelu": _gelu,
    "aten.silu": _silu,
    "aten.mish": _mish,
    "aten.softplus": _softplus,
    "aten.elu": _elu,
    "aten.hardswish": _hardswish,
}
