"""Products, quotients and choices of several perturbed values, as planes.

A rule takes rows `b s *shape` of a node's value and its params (an `Interval`, `b 1 *in`, for what is
perturbed) and gives rows for each perturbed param and a bias, so that for all values in the intervals

    <a, op(args)> >= sum_k <rows_k, arg_k> + bias.

A product lies between the planes of McCormick (1976). With centres x0, y0, radii rx, ry and any sigma in
[-1, 1] they are, written so that everything is a product of the same kind,

    x y >= (x0 + sigma rx) y + (y0 + sigma ry) x - x0 y0 - rx ry - sigma (rx y0 + ry x0)
    x y <= (x0 + sigma rx) y + (y0 - sigma ry) x - x0 y0 + rx ry - sigma (rx y0 - ry x0),

hence products of matrices need two (with alpha four) products of matrices for each argument and no tensor of
all triples. sigma = 2 alpha - 1; without alpha it is 0: the first-order expansion around the centres, which
among the planes has the smallest slopes and the same distance in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from netweight.core.graph import Node
from netweight.verification.backward import summed_to
from netweight.verification.lines import Lines, lines
from netweight.verification.relax import Interval
from netweight.verification.rows import inner, total

Params = Mapping[str, Any]
Alpha = tuple[Tensor, Tensor] | None
Found = tuple[dict[str, Any], Tensor | float]
Rule = Callable[[Node, Tensor, Params, Alpha], Found]
LEAD = 2  # axes of examples and rows in front of a value


def against(a: Tensor, values: Tensor) -> Tensor:
    """<a, values> for each row, where 0 times infinity is 0."""
    flat = a.reshape(*a.shape[:LEAD], -1)
    values = values.expand(*values.shape[:LEAD], *a.shape[LEAD:]).reshape(*values.shape[:LEAD], -1)
    found = inner(flat, values) if values.shape[1] == 1 else total(flat * values)
    if bool(found.isfinite().all()):
        return found
    return total(torch.where(flat == 0, 0.0, flat * values))


def _barrier(unbounded: Tensor, like: Tensor) -> Tensor:
    """Infinity where nothing is known."""
    return torch.zeros_like(unbounded, dtype=like.dtype).masked_fill(unbounded, torch.inf)


def spread(alpha: Alpha, shape: Sequence[int], like: Sequence[int]) -> Alpha:
    """Choices for a value of `shape`, in the shape `like` that its rows are brought to."""
    if alpha is None:
        return None
    wide = [choice.expand(torch.broadcast_shapes(choice.shape, (1, 1, *shape))) for choice in alpha]
    return wide[0].reshape(*wide[0].shape[:LEAD], *like), wide[1].reshape(*wide[1].shape[:LEAD], *like)


def through(a: Tensor, found: Lines) -> tuple[Tensor, Tensor | float]:
    """Rows through lines: those below where a is positive, those above where it is negative."""
    negative = a.clamp(max=0)
    bias: Tensor | float = 0.0
    if found.lower is not None:
        bias = against(a - negative, found.lower)
    if found.upper is not None:
        bias = bias + against(negative, found.upper)
    return torch.addcmul(a * found.lower_slope, negative, found.upper_slope - found.lower_slope), bias


@dataclass(frozen=True, eq=False)
class Factor:
    """A factor of a product: centre and radius `b 1 *shape`, 0 where it is unbounded (`unbounded` is 1)."""

    name: str | None
    shape: torch.Size
    centre: Tensor
    radius: Tensor
    unbounded: Tensor

    @classmethod
    def of(cls, name: str, value: Any, like: Tensor, reshape: Callable[[Tensor], Tensor]) -> Factor:
        """From a param; a constant has no name to send rows to."""
        if not isinstance(value, Interval):
            point = torch.as_tensor(value, dtype=like.dtype, device=like.device)
            point = point.reshape(1, 1, *point.shape)
            value, name = Interval(point, point), None
        lower, upper = reshape(value.lower.to(like.dtype)), reshape(value.upper.to(like.dtype))
        fine = lower.isfinite() & upper.isfinite()
        centre, radius = (upper / 2 + lower / 2), (upper / 2 - lower / 2)
        return cls(
            name, value.lower.shape[LEAD:], torch.where(fine, centre, 0.0), torch.where(fine, radius, 0.0),
            (~fine).to(like.dtype),
        )  # fmt: skip

    def own(self, rows: Tensor) -> Tensor:
        """Rows in the shape of the param."""
        return summed_to(rows, self.centre.shape[LEAD:]).reshape(*rows.shape[:LEAD], *self.shape)


@dataclass(frozen=True)
class Bilinear:
    """x y, and its transposes: rows of the product to rows of x given y, and of y given x."""

    forward: Callable[[Tensor, Tensor], Tensor]
    to_first: Callable[[Tensor, Tensor], Tensor]
    to_second: Callable[[Tensor, Tensor], Tensor]


ELEMENTWISE = Bilinear(torch.mul, torch.mul, torch.mul)
MATRICES = Bilinear(
    torch.matmul,
    lambda a, y: torch.matmul(a, y.transpose(-1, -2)),
    lambda a, x: torch.matmul(x.transpose(-1, -2), a),
)


def planes(a: Tensor, x: Factor, y: Factor, kind: Bilinear, alpha: Alpha) -> tuple[Tensor, Tensor, Tensor]:
    """(rows for x, rows for y, bias), still of the shapes that x and y were broadcast to."""
    rows_x, rows_y = kind.to_first(a, y.centre), kind.to_second(a, x.centre)
    bias = -against(a, kind.forward(x.centre, y.centre)) - against(a.abs(), kind.forward(x.radius, y.radius))
    if alpha is not None:
        positive = a.clamp(min=0)
        below, above = positive * (2 * alpha[0] - 1), (a - positive) * (2 * alpha[1] - 1)
        turned_x, turned_y = below - above, below + above
        rows_x = rows_x + kind.to_first(turned_x, y.radius)
        rows_y = rows_y + kind.to_second(turned_y, x.radius)
        bias = bias - against(turned_x, kind.forward(x.centre, y.radius))
        bias = bias - against(turned_y, kind.forward(x.radius, y.centre))
    if bool(x.unbounded.any()) or bool(y.unbounded.any()):
        open_ = kind.forward(x.unbounded, torch.ones_like(y.unbounded))
        open_ = open_ + kind.forward(torch.ones_like(x.unbounded), y.unbounded)
        bias = bias - against(a.abs(), _barrier(open_ > 0, a))
    return rows_x, rows_y, bias


def collected(a: Tensor, x: Factor, y: Factor, kind: Bilinear, alpha: Alpha) -> Found:
    """`planes` as rows of the shapes of the params."""
    rows_x, rows_y, bias = planes(a, x, y, kind, alpha)
    found = {}
    for factor, rows in ((x, rows_x), (y, rows_y)):
        if factor.name is None:
            bias = bias + against(rows, factor.centre)
        else:
            found[factor.name] = factor.own(rows)
    return found, bias


def aligned(ndim: int) -> Callable[[Tensor], Tensor]:
    """Puts axes of size 1 in front of a value, behind the leading ones, until it has ndim of its own."""

    def reshape(t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:LEAD], *[1] * (ndim + LEAD - t.ndim), *t.shape[LEAD:])

    return reshape


# Rules ---------------------------------------------------------------------------------------------------


def mul(node: Node, a: Tensor, p: Params, alpha: Alpha) -> Found:
    """x y; the same value twice is a square."""
    if node.params["self"] == node.params["other"]:
        square = replace(node, op="aten.square")
        rows, bias = through(a, lines(square, {"self": p["self"]}, p["self"], alpha))
        return {"self": rows}, bias
    x, y = (Factor.of(name, p[name], a, aligned(len(node.shape))) for name in ("self", "other"))
    return collected(a, x, y, ELEMENTWISE, alpha)


def div(node: Node, a: Tensor, p: Params, alpha: Alpha) -> Found:
    """x / y as x z with z = 1 / y between its lines; nothing is known where y can be 0."""
    y = p["other"]
    inverse = replace(node, op="aten.reciprocal", params={})
    between = lines(inverse, {"self": y}, y)
    zero = (y.lower <= 0) & (y.upper >= 0)
    z = Interval(torch.where(zero, -torch.inf, 1 / y.upper), torch.where(zero, torch.inf, 1 / y.lower))
    factors = (Factor.of(n, v, a, aligned(len(node.shape))) for n, v in (("self", p["self"]), ("other", z)))
    found, bias = collected(a, *factors, ELEMENTWISE, alpha)
    found["other"], more = through(found["other"], between)
    return found, bias + more


def matmul(node: Node, a: Tensor, p: Params, alpha: Alpha) -> Found:
    """A product of two matrices, vectors or stacks of them."""
    names = ("self", "mat2" if "mat2" in p else "other")
    return _matrices(node.shape, a, p, names, alpha)


def _matrices(shape: tuple[int, ...], a: Tensor, p: Params, names: tuple[str, str], alpha: Alpha) -> Found:
    """x y of two params; `shape` is the product's, vectors count as a row and as a column."""

    def ndim(value: Any) -> int:
        return value.lower.ndim - LEAD if isinstance(value, Interval) else value.ndim

    single = [ndim(p[name]) == 1 for name in names]
    full = list(shape)
    if single[1]:
        full.append(1)
    if single[0]:
        full.insert(len(full) - 1, 1)

    def reshape(column: bool, alone: bool) -> Callable[[Tensor], Tensor]:
        fill = aligned(len(full))
        return lambda t: fill(t if not alone else t.unsqueeze(-1 if column else -2))

    x, y = (Factor.of(n, p[n], a, reshape(i == 1, single[i])) for i, n in enumerate(names))
    return collected(a.reshape(*a.shape[:LEAD], *full), x, y, MATRICES, spread(alpha, shape, full))


def sum_with(first: str, second: str) -> Rule:
    """beta self + alpha (first second)."""

    def rule(node: Node, a: Tensor, p: Params, alpha: Alpha) -> Found:
        found, bias = _matrices(node.shape, a * p["alpha"], p, (first, second), alpha)
        rows, summand = a * p["beta"], p["self"]
        if isinstance(summand, Interval):
            found["self"] = summed_to(rows, summand.lower.shape[LEAD:])
        else:
            bias = bias + against(rows, summand)
        return found, bias

    return rule


def where(node: Node, a: Tensor, p: Params, alpha: Alpha) -> Found:
    """x where the condition holds, else y; where that is open, at least min(x, y) and at most max(x, y).

    min(x, y) >= (1 - s) x + s y + s dl with d = x - y in [dl, du], s = du / (du - dl): the chord of ReLU(d).
    Between two constants the condition itself is what the value is linear in.
    """
    shape = aligned(len(node.shape))
    condition = Interval(shape(p["condition"].lower), shape(p["condition"].upper))
    x, y = (Factor.of(name, p[name], a, shape) for name in ("self", "other"))
    if x.name is None and y.name is None:
        rows = a * (x.centre - y.centre)
        return {"condition": summed_to(rows, p["condition"].lower.shape[LEAD:])}, against(a, y.centre)
    sure = condition.lower.to(a.dtype)
    open_ = condition.upper & ~condition.lower
    positive = a.clamp(min=0)
    rows_x, rows_y, bias = torch.zeros_like(a), torch.zeros_like(a), 0.0
    for part, up in ((positive, False), (a - positive, True)):
        share, shift = _meeting(x, y, up)  # the weight of y, and a constant
        share, shift = torch.where(open_, share, 1 - sure), torch.where(open_, shift, 0.0)
        rows_x, rows_y = rows_x + part * (1 - share), rows_y + part * share
        bias = bias + against(part, shift)
    found: dict[str, Any] = {}
    for factor, rows in ((x, rows_x), (y, rows_y)):
        if factor.name is None:
            bias = bias + against(rows, factor.centre)
        else:
            found[factor.name] = factor.own(rows)
    unbounded = open_ & (x.unbounded + y.unbounded > 0)
    return found, bias - against(a.abs(), _barrier(unbounded, a))


def _meeting(x: Factor, y: Factor, up: bool) -> tuple[Tensor, Tensor]:
    """(s, c): (1 - s) x + s y + c lies below min(x, y), or above max(x, y)."""
    centre, radius = x.centre - y.centre, x.radius + y.radius
    low, high = centre - radius, centre + radius
    width = torch.where(radius > 0, 2 * radius, 1.0)
    share = torch.where(radius > 0, high / width, (centre > 0).to(centre.dtype)).clamp(0, 1)
    if up:  # max(x, y) = x + y - min(x, y)
        return 1 - share, -share * torch.minimum(low, torch.zeros_like(low))
    return share, share * torch.minimum(low, torch.zeros_like(low))


RULES: Mapping[str, Rule] = {
    "aten.mul": mul,
    "aten.div": div,
    "aten.matmul": matmul,
    "aten.mm": matmul,
    "aten.bmm": matmul,
    "aten.addmm": sum_with("mat1", "mat2"),
    "aten.baddbmm": sum_with("batch1", "batch2"),
    "aten.where": where,
}
