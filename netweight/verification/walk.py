"""Rows on their way from a value back to the inputs: one visit per node.

    lower = lowest(problem, state, rows)          # min over the region of <a_r, value>, for each row r

An affine operator is transposed (`backward`); an elementwise function is replaced by a line below where the
coefficient is positive and a line above where it is negative (`lines`); a product or a maximum by planes
(`products`, `order`). What has no relaxation is cut: its interval counts as constant, which is always sound.

Rounding: <a, v> of a computed value v = op(x) + e with |e| <= slack costs <|a|, slack>; the same vector pays
for what the proof itself loses at that node (Higham 2002, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netweight.core.graph import Node, Ref
from netweight.verification import lines, products
from netweight.verification.backward import back, summed_to
from netweight.verification.lines import Lines
from netweight.verification.problem import Problem
from netweight.verification.products import through
from netweight.verification.relax import Interval
from netweight.verification.rows import Rows, Unit, Window, added, dense, dot, patches, planar, take, windowed
from netweight.verification.state import RULES, State, kind, lines_of, moving, slack_of, summing
from netweight.verification.windows import back_unit, back_window

BUDGET = 8 * 2**20  # bytes of the rows at one value: larger ones leave the cache
LARGE = 0.75  # of a plane: where a window is no longer cheaper than all coefficients
Alphas = Mapping[str, tuple[Tensor, Tensor]]  # by the name of a relaxed node: choices in [0, 1], `b s *shape`


def lowest(
    problem: Problem,
    state: State,
    start: Mapping[str, Rows],
    examples: Int[Tensor, " e"] | None = None,
    *,
    alphas: Alphas | None = None,
    betas: Mapping[str, Tensor] | None = None,
    drop: bool = False,
    early: bool = False,
) -> Float[Tensor, "e s"]:
    """A lower bound of the sum over `start` of <a_r, value>, for each row r of each example.

    examples: which of the problem's examples the rows belong to, all by default. alphas: which lines are
    used. betas: added to the coefficients of a value (`B s *shape`). drop: a row is settled, and goes no
    farther, as soon as its bound is at least 0. early: also take the bound before the first relaxation,
    which is that of intervals.
    """
    walk = Walk(problem, state, dict(start), examples, alphas or {}, betas or {})
    names = list(problem.nodes)
    _go(walk, names[: 1 + max(names.index(name) for name in start)][::-1], drop, early)
    return walk.best.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _go(walk: Walk, names: Sequence[str], drop: bool, early: bool) -> None:
    """Through the nodes of `names`, the last first; rows that have grown too large go on in parts."""
    for i, name in enumerate(names):
        if name not in walk.rows:
            continue
        node = walk.problem.nodes[name]
        if drop and name in walk.state.tight and not walk.settle():
            return
        if early and kind(walk.problem, node) not in ("affine", "input"):
            walk.note(walk.here())
            early = False
        pieces = walk.pieces()
        if pieces > 1:
            for part in walk.parts(pieces):
                _go(part, names[i:], drop, False)
            return
        walk.visit(node)
    walk.arrived()


class Walk:
    """`rows` by the name of the value that they stand at; what they have collected is in `bias`."""

    def __init__(
        self,
        problem: Problem,
        state: State,
        start: dict[str, Rows],
        examples: Tensor | None,
        alphas: Alphas,
        betas: Mapping[str, Tensor],
    ) -> None:
        self.problem, self.state, self.rows = problem, state, start
        self.examples, self.alphas, self.betas = examples, alphas, betas
        self.dtype = problem.arithmetic.dtype
        self.bias: Any = torch.zeros(
            _lead(next(iter(start.values()))), dtype=self.dtype, device=problem.device
        )
        self.order: Tensor | None = None  # which of the original rows the present ones are; None: all
        self.best: Tensor | None = None

    def visit(self, node: Node) -> None:
        """Take the rows from a node to its inputs."""
        rows = self.rows.pop(node.name)
        if node.name in self.betas:
            rows = dense(rows, node.shape, self.dtype) + self._own(self.betas[node.name])
        how = kind(self.problem, node)
        if how == "input":
            region = self.problem.regions[node.name]
            region = region if self.examples is None else region.take(self.examples)
            slack = self.problem.slack(region.lower[0].numel())
            if isinstance(rows, Window) and region.boxed:
                centre, spread = region.centre_and_spread(slack)
                found = dot(rows, centre) - dot(rows.filled(rows.a.abs(), rows.clean), spread)
            else:
                found = region.lowest(dense(rows, node.shape, self.dtype), slack)
            self.bias = self.bias + found
        elif how == "cut":
            self.bias = self.bias + self._constant(node.name, rows)
        else:
            self._pay(node, rows)
            self._through[how](self, node, rows)

    def _affine(self, node: Node, rows: Any) -> None:
        if node.op == "getitem":
            part = dense(rows, node.shape, self.dtype)
            self.rows.setdefault(node.inputs[0], {})[node.params["index"]] = part
            return
        p = self.problem.params(node, self.state.values)
        found = None
        if isinstance(rows, Unit):
            found = back_unit(node, rows, p)
            if found is None and planar(node.shape):
                rows = windowed(rows, node.shape, self.dtype)
        if isinstance(rows, Window):
            found = back_window(node, rows, p)
        if found is None:
            found = back(node, rows if isinstance(rows, dict) else dense(rows, node.shape, self.dtype), p)
        self._arrive(node, *found)

    def _scalar(self, node: Node, rows: Rows) -> None:
        name = moving(self.problem, node)[0]
        chosen = self._lines(node, name)
        if isinstance(rows, Unit) and planar(node.shape):
            rows = windowed(rows, node.shape, self.dtype)
        if isinstance(rows, Window) and node.name not in self.alphas:
            under = _each(chosen, lambda t: patches(t[:, 0], rows))
            a, bias = through(rows.a, under)
            self._arrive(node, {_param(node, name): rows.filled(a, True)}, bias)
        else:
            a, bias = through(dense(rows, node.shape, self.dtype), chosen)
            if node.name in self.alphas and node.op != "aten.relu" and not self.problem.arithmetic.estimate:
                bias = bias - self._more(chosen, name, dense(rows, node.shape, self.dtype))
            a = summed_to(a, self.problem.nodes[name].shape)
            self._arrive(node, {_param(node, name): a}, bias)

    def _more(self, chosen: Lines, name: str, rows: Tensor) -> Tensor:
        """What rounding can cost in lines that are not those which the slack of the node knows."""
        x = self._own(self.state.values[name]).size.unsqueeze(1)
        size = torch.maximum(chosen.lower_slope.abs(), chosen.upper_slope.abs()) * x
        size = size + torch.maximum(chosen.lower.abs(), chosen.upper.abs())
        return summing(self.problem, rows[0, 0].numel()) * products.against(rows.abs(), size)

    def _lines(self, node: Node, name: str) -> Lines:
        """The lines of the node for these rows, one axis for rows in them."""
        if node.name not in self.alphas:
            return _each(lines_of(self.problem, self.state, node), lambda t: self._own(t).unsqueeze(1))
        p = self._params(node)
        x = p[_param(node, name)]
        if node.op == "aten.relu":
            return lines.relu(x, self.alphas[node.name])
        if node.name not in self.state.sides:  # their tangents do not depend on the choice
            self.state.sides[node.name] = lines.sides(node, p, x)
        return lines.lines(node, p, x, self.alphas[node.name], self.state.sides[node.name])

    def _planes(self, node: Node, rows: Any) -> None:
        a = rows if isinstance(rows, dict) else dense(rows, node.shape, self.dtype)
        self._arrive(node, *RULES[node.op](node, a, self._params(node), self.alphas.get(node.name)))

    _through = {"affine": _affine, "scalar": _scalar, "planes": _planes}

    def _own(self, value: Any) -> Any:
        """What belongs to the examples of these rows."""
        if self.examples is None or value is None:
            return value
        if isinstance(value, Interval):
            return Interval(value.lower[self.examples], value.upper[self.examples])
        return value[self.examples]

    def _params(self, node: Node) -> dict[str, Any]:
        """Params with the intervals of these rows' examples, one axis for rows in them."""
        values = {}
        for name in moving(self.problem, node):
            x = self._own(self.state.values[name])
            values[name] = Interval(x.lower.unsqueeze(1), x.upper.unsqueeze(1))
        return self.problem.params(node, values)

    def _arrive(self, node: Node, coefficients: Mapping[str, Any], bias: Any) -> None:
        """Rows at the inputs of the node."""
        self.bias = self.bias + bias
        for param, rows in coefficients.items():
            refs = node.params[param]
            for ref, each in zip(refs, rows) if isinstance(refs, list | tuple) else [(refs, rows)]:
                if isinstance(ref, Ref) and each is not None:
                    shape = self.problem.nodes[ref.name].shape
                    if isinstance(each, Window) and each.a.shape[3:].numel() >= LARGE * shape[-2] * shape[-1]:
                        each = dense(each, shape, self.dtype)
                    self.rows[ref.name] = added(self.rows.get(ref.name), each, shape, self.dtype)

    def _pay(self, node: Node, rows: Any) -> None:
        """What rounding at this node can cost."""
        if self.problem.arithmetic.estimate or isinstance(rows, dict):
            return
        slack = self._own(slack_of(self.problem, self.state, node))
        if slack is None:
            return
        if isinstance(rows, Unit):
            self.bias = self.bias - slack.flatten(1).gather(1, rows.index)
        else:
            size = rows.filled(rows.a.abs(), rows.clean) if isinstance(rows, Window) else rows.abs()
            self.bias = self.bias - dot(size, slack)

    def here(self) -> Tensor:
        """The bound that follows from the intervals at which the rows stand."""
        found = self.bias
        for name, rows in self.rows.items():
            found = found + self._constant(name, rows)
        return found

    def _constant(self, name: str, rows: Any) -> Tensor:
        """The least that the rows can be over the interval of a value."""
        count = math.prod(self.problem.nodes[name].shape)
        lost = 0.0 if self.problem.arithmetic.estimate else summing(self.problem, count)
        return _constant(self._own(self.state.values[name]), rows, lost)

    def pieces(self) -> int:
        """In how many parts the rows should go on: windows grow on their way."""
        if torch.is_grad_enabled() or not all(
            isinstance(rows, Window | Tensor) for rows in self.rows.values()
        ):
            return 1
        tensors = [rows.a if isinstance(rows, Window) else rows for rows in self.rows.values()]
        size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        return min(self.bias.shape[1], -(-size // BUDGET)) if size > 2 * BUDGET else 1

    def parts(self, pieces: int) -> Iterator[Walk]:
        """The rows in several walks that keep their bounds in the same place."""
        self._number()
        if self.best is None:
            self.best = torch.full_like(self.bias, -torch.inf)
        rows, order, bias = self.rows, self.order, self.bias
        for piece in torch.arange(bias.shape[1], device=bias.device).tensor_split(pieces):
            kept = piece.expand(len(bias), len(piece))
            part = copy(self)
            part.rows = {name: take(each, kept) for name, each in rows.items()}
            part.bias, part.order = bias[:, piece], order[:, piece]
            yield part

    def settle(self) -> bool:
        """Take down the bound that holds here and drop settled rows; whether any is left."""
        if any(isinstance(rows, Unit | dict) for rows in self.rows.values()):
            return True
        best = self.note(self.here())
        self._number()
        settled = (best >= 0).gather(1, self.order)
        left = int((~settled).sum(1).max())
        if 0 < left <= 0.8 * settled.shape[1]:
            kept = settled.to(torch.uint8).argsort(dim=1, stable=True)[:, :left]
            self.rows = {name: take(rows, kept) for name, rows in self.rows.items()}
            self.bias, self.order = self.bias.gather(1, kept), self.order.gather(1, kept)
        return left > 0

    def note(self, found: Tensor) -> Tensor:
        """Keep a bound of the present rows where it is better; the best of all rows."""
        if self.best is None:
            self.best = found.clone()
        elif self.order is None:
            self.best = torch.maximum(self.best, found)
        else:
            self.best.scatter_reduce_(1, self.order, found, "amax")
        return self.best

    def arrived(self) -> None:
        """Keep what the rows have collected on the whole way."""
        self.note(self.bias - self.problem.arithmetic.estimate * self.bias.abs())

    def _number(self) -> None:
        if self.order is None:
            b, s = self.bias.shape
            self.order = torch.arange(s, device=self.bias.device).expand(b, s)


def _lead(rows: Rows) -> torch.Size:
    return (
        rows.index.shape
        if isinstance(rows, Unit)
        else (rows.a if isinstance(rows, Window) else rows).shape[:2]
    )


def _param(node: Node, name: str) -> str:
    """The param in which the node reads a value."""
    return next(key for key, ref in node.params.items() if isinstance(ref, Ref) and ref.name == name)


def _each(found: Lines, f: Any) -> Lines:
    parts = (found.lower_slope, found.lower, found.upper_slope, found.upper)
    return Lines(*(None if part is None else f(part) for part in parts))


def _constant(x: Any, rows: Any, lost: float) -> Tensor:
    """min <a, value> over the interval (of truth values: 0 or 1), which is `lost` of its size wider."""
    if isinstance(rows, dict):
        return sum(_constant(x[i], part, lost) for i, part in rows.items())
    if not x.lower.is_floating_point():
        x = Interval(x.lower.float(), x.upper.float())
    if lost:
        x = Interval(x.lower - lost * x.lower.abs(), x.upper + lost * x.upper.abs())
    if isinstance(rows, Unit):
        lower, upper = (end.flatten(1).gather(1, rows.index) for end in (x.lower, x.upper))
        return torch.where(rows.sign > 0, lower, -upper)
    lower, upper = x.lower.unsqueeze(1), x.upper.unsqueeze(1)
    if isinstance(rows, Window):
        rows, lower, upper = rows.a, patches(x.lower, rows), patches(x.upper, rows)
    positive = rows.clamp(min=0)
    return products.against(positive, lower) + products.against(rows - positive, upper)
