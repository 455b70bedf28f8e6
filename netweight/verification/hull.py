"""Lines above functions with kinks or steps: the upper hull of finitely many points.

Between its kinks a function of this file is convex, between its steps it is constant. So a line lies above it
if it does so at the ends, the kinks and the corners of the steps: clamp, abs, leaky ReLU, round, floor, sign,
comparisons with a constant. Below f lies minus what lies above -f. A side holds the lines that touch, like
those of `smooth`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netweight.core.graph import Node, call
from netweight.verification.relax import Interval
from netweight.verification.smooth import fallen_back

Params = Mapping[str, Any]
Points = tuple[list[Tensor], list[Tensor]]
Sides = tuple["Hull", "Hull"]  # above -f, above f


@dataclass(frozen=True, eq=False)
class Hull:
    """Lines above points (x_i, y_i), `points *shape`, x_0 = l, x_last = u.

    Their slopes lie between that of the first and of the last edge of the upper hull, and within +-steepest;
    the intercept is the least that covers all points.
    """

    x: Tensor
    y: Tensor
    steepest: Tensor | float = math.inf

    @property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """Slopes of the first and of the last edge."""
        first = _slopes(self.x[:1], self.y[:1], self.x[1:], self.y[1:], -math.inf).amax(0)
        last = _slopes(self.x[:-1], self.y[:-1], self.x[-1:], self.y[-1:], math.inf).amin(0)
        return self._capped(first), self._capped(last)

    def _capped(self, slope: Tensor) -> Tensor:
        slope = torch.where(slope.isfinite(), slope, 0.0)
        return torch.clamp(slope, -self.steepest, self.steepest)

    def _intercept(self, slope: Tensor) -> Tensor:
        return torch.stack([y - slope * x for x, y in zip(self.x, self.y)]).amax(0)

    def _best(self) -> Tensor:
        """The slope of the edge over the middle."""
        middle = (self.x[0] + self.x[-1]) / 2
        best, lowest = torch.zeros_like(middle), self._intercept(torch.zeros_like(middle))
        for i in range(len(self.x) - 1):
            for j in range(i + 1, len(self.x)):
                edge = _slopes(self.x[i], self.y[i], self.x[j], self.y[j], math.nan)
                edge = self._capped(edge)
                value = self._intercept(edge) + edge * middle
                better = value < lowest
                best, lowest = torch.where(better, edge, best), torch.where(better, value, lowest)
        return best

    @property
    def start(self) -> Tensor:
        """The alpha of the line over the middle."""
        (first, last), best = self._ends, self._best()
        wide = first - last
        return torch.where(wide > 0, (first - best) / torch.where(wide > 0, wide, 1.0), 0.5).clamp(0, 1)

    def line(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """(slope, intercept)."""
        if alpha is None:
            slope = self._best()
        else:
            first, last = self._ends
            slope = first + alpha * (last - first)
        peak = self.y.amax(0).nan_to_num(math.inf, math.inf, math.inf)
        slope = torch.where(self.x[0].isfinite() & self.x[-1].isfinite(), slope, math.nan)
        return fallen_back(slope, self._intercept(slope), peak)


def _slopes(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor, otherwise: float) -> Tensor:
    """Of the edges from one point to the other; `otherwise` where one is not right of the other."""
    width = x1 - x0
    right = width > 1e-13 * (1 + x1.abs())  # else the slope is rounding alone
    return torch.where(right, (y1 - y0) / torch.where(right, width, 1.0), otherwise)


# Kinks: convex between them ------------------------------------------------------------------------------


def kinked(node: Node, p: Params, lower: Tensor, upper: Tensor, sign: int) -> Hull:
    """Above sign f."""
    inner = _rising([_wide(kink) for kink in KINKED[node.op](p)])
    x = torch.stack([lower, *(torch.clamp(like(k, lower), lower, upper) for k in inner), upper])
    return Hull(x, sign * _values(node, p, x))


def _rising(kinks: list[Any]) -> list[Any]:
    """Kinks in rising order; bounds of a clamp may be given the wrong way round."""
    if len(kinks) < 2:
        return kinks
    first, second = (torch.as_tensor(k, dtype=torch.float64) for k in kinks)
    return [torch.minimum(first, second), torch.maximum(first, second)]


def like(value: Any, x: Tensor) -> Tensor:
    """A constant in the shape of x."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand_as(x)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _values(node: Node, p: Params, x: Tensor) -> Tensor:
    """f(x) by the operator itself."""
    if node.op in ("aten.prelu", "aten._prelu_kernel"):
        weight = p["weight"].double()
        if node.op == "aten.prelu" and len(node.shape) > 1:
            weight = weight.reshape(-1, *[1] * (len(node.shape) - 2))  # of the channels, axis 1
        return torch.where(x >= 0, x, weight * x)
    return call(node, {key: x if isinstance(v, Interval) else _wide(v) for key, v in p.items()})


def _bounds(p: Params) -> list[Any]:
    return [p[name] for name in ("min", "max") if p.get(name) is not None]


def _zero(p: Params) -> list[Any]:
    return [0.0]


KINKED: Mapping[str, Callable[[Params], list[Any]]] = {
    "aten.relu": _zero,
    "aten.leaky_relu": _zero,
    "aten.prelu": _zero,
    "aten._prelu_kernel": _zero,
    "aten.abs": _zero,
    "aten.elu": _zero,
    "aten.relu6": lambda p: [0.0, 6.0],
    "aten.hardtanh": lambda p: [p["min_val"], p["max_val"]],
    "aten.hardsigmoid": lambda p: [-3.0, 3.0],
    "aten.hardswish": lambda p: [-3.0, 3.0],
    "aten.clamp": _bounds,
    "aten.clamp_min": _bounds,
    "aten.clamp_max": _bounds,
}


# Steps ---------------------------------------------------------------------------------------------------


def _stairs(lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, early: float, sign: int) -> Points:
    """Corners of stairs that reach the whole number n at x = n - early; f(l) = first, f(u) = last.

    sign 1: the corners on top, -1: those at the bottom. Between them the stairs lie below their hull.
    """
    after, before = (torch.clamp(n - early, lower, upper) for n in (first + 1, last))
    if sign > 0:
        y = [first, torch.minimum(first + 1, last), last, last]
    else:
        y = [first, first, torch.maximum(last - 1, first), last]
    return [lower, after, before, upper], y


def _steps(lower: Tensor, points: Points, sign: int, scale: float) -> Hull:
    """The hull of corners, no steeper than the line over the middle can be (2 rise / width)."""
    x, y = torch.stack(points[0]) / scale, sign * torch.stack(points[1]) / scale
    width = x[-1] - x[0]
    rise = y.amax(0) - y.amin(0)
    wide = width > 1e-6 * (1 + lower.abs())  # else a jump counts as a constant
    return Hull(x, y, torch.where(wide, 2 * rise / torch.where(wide, width, 1.0), 0.0))


def _rounding(early: float, of: Callable[[Tensor], Tensor]) -> Callable[..., Sides]:
    def found(node: Node, p: Params, lower: Tensor, upper: Tensor) -> Sides:
        scale = 10.0 ** p.get("decimals", 0)
        if scale != 1:  # the operator rounds when it scales
            lower, upper = ((x + s * 2.0**-22 * x.abs()) * scale for x, s in ((lower, -1), (upper, 1)))
        low, high = (_limited(of(x), p) for x in (lower, upper))
        return tuple(_steps(lower, _stairs(lower, upper, low, high, early, s), s, scale) for s in (-1, 1))

    return found


def _limited(n: Tensor, p: Params) -> Tensor:
    """Rounding to a grid that ends, `netweight.quantized` and `netweight.floored`."""
    return n.clamp(p["low"], p["high"]) if "low" in p else n


def _truncating(node: Node, p: Params, lower: Tensor, upper: Tensor) -> Sides:
    """Down above 0, up below: odd, with a cell of (-1, 1)."""

    def above(low: Tensor, high: Tensor) -> Points:
        first, last = low.trunc(), high.trunc()
        down = _stairs(low, high, low.floor(), high.floor(), 0.0, 1)
        up = _stairs(low, high, low.ceil(), high.ceil(), 1.0, 1)
        cell = low.clamp(min=-1)
        after = torch.minimum(torch.clamp(first, low, high), cell)
        x = [low, after, cell, torch.clamp(last, low, high), high]
        y = [torch.where(after <= low, (first + 1).clamp(max=0), first), (first + 1).clamp(max=0),
             torch.zeros_like(low), last, last]  # fmt: skip
        both = []
        for crossing, falling, rising in zip((x, y), down, up):
            falling, rising = [falling[0], *falling], [rising[0], *rising]
            both.append([
                torch.where(low >= 0, f, torch.where(high <= 0, r, c))
                for f, r, c in zip(falling, rising, crossing)
            ])  # fmt: skip
        return both[0], both[1]

    x, y = _mirrored(above(-upper, -lower))  # trunc x = -trunc -x
    return _steps(lower, (x, y), 1, 1.0), _steps(lower, above(lower, upper), 1, 1.0)


def _threshold(node: Node, p: Params, lower: Tensor, upper: Tensor) -> Sides:
    """sign, heaviside and comparisons: `left` below the threshold, `right` above, `at` on it."""
    left, right, at, place = -1.0, 1.0, 0.0, torch.zeros_like(lower)
    early = late = place
    if node.op == "aten.heaviside":
        left, at = 0.0, _wide(p["values"])
    elif node.op != "aten.sign":
        flipped = isinstance(p["other"], Interval)  # c > x is x < c
        given = p["self"] if flipped else p["other"]
        rising = (node.op in ("aten.gt", "aten.ge")) != flipped
        left, right = (0.0, 1.0) if rising else (1.0, 0.0)
        at = 1.0 if node.op in ("aten.ge", "aten.le") else 0.0
        place = like(_wide(given), lower)
        off = 0.0 if isinstance(given, Tensor) else 2.0**-22 * place.abs()  # the network rounds a number
        early, late = place - off, place + off
    at = like(at, lower)

    def over(sign: int) -> Hull:
        before, after, on = sign * left, sign * right, sign * at
        on = torch.where(early < late, max(before, after), on)
        if before < after:
            points = _rise(lower, upper, early, before, after, on)
        else:
            points = _mirrored(_rise(-upper, -lower, -late, after, before, on))
        return _steps(lower, points, 1, 1.0)

    return over(-1), over(1)


def _rise(lower: Tensor, upper: Tensor, place: Tensor, before: float, after: float, on: Tensor) -> Points:
    """Corners above a function that rises at one place, where it is `on`."""
    inside = (lower <= place) & (upper >= place)
    top = torch.where(upper > place, after, before)
    top = torch.where(inside, torch.where(upper > place, on.clamp(min=after), on), top)
    return [lower, torch.clamp(place, lower, upper), upper], [
        torch.where(lower < place, before, top),
        top,
        top,
    ]


def _mirrored(points: Points) -> Points:
    """The corners for -x."""
    return [-x for x in reversed(points[0])], list(reversed(points[1]))


STEPPED: Mapping[str, Callable[..., Sides]] = {
    "aten.round": _rounding(0.5, torch.round),
    "netweight.quantized": _rounding(0.5, torch.round),
    "netweight.floored": _rounding(0.0, torch.floor),
    "aten.floor": _rounding(0.0, torch.floor),
    "aten.ceil": _rounding(1.0, torch.ceil),
    "aten.trunc": _truncating,
    **{f"aten.{name}": _threshold for name in ("sign", "heaviside", "gt", "ge", "lt", "le")},
}
