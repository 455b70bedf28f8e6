"""Forward linear bounds: every value between two linear functions of the inputs, carried from input to output
(Xu et al. 2020, arXiv:2002.12920, section 3.2).

    low_a x + low_b <= value <= high_a x + high_b        coefficients `b d *shape` for d numbers of input

One pass gives the bounds of all values, but it costs d times an evaluation, and the two functions drift apart
at every layer; rows that go back (`crown`) are tighter. It pays for few inputs and many outputs, and as the
bounds inside for one backward pass ("forward+backward").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import DoesNotFit
from netweight.core.graph import Node, call
from netweight.verification import crown, ibp
from netweight.verification.backward import MOVED, SUMMED
from netweight.verification.problem import Problem, pose
from netweight.verification.relax import Interval
from netweight.verification.state import State, kind, lines_of, moving, slack_of

LARGEST = 1 << 28  # numbers that the coefficients of one value may take
OWN = 2.0**-40  # of the size of a sum: what the float64 of the proof is taken to lose (an estimate)


@dataclass(frozen=True, eq=False)
class Between:
    """The linear functions below and above a value: coefficients `b d *shape`, constants `b *shape`."""

    low: Tensor
    low_at: Tensor
    high: Tensor
    high_at: Tensor


def bound(
    problem: Problem, objective: Float[Tensor, "b s out"] | None, upper: bool = True, *, back: bool = False
) -> Interval:
    """Bounds on the output `b *out`, or on the rows of the objective times the flattened output.

    back: rows go back once from the output over the forward bounds of the values inside. Raises `DoesNotFit`
    where the inputs are too many.
    """
    problem = _precise(problem)
    state = intermediate(problem)
    if back:
        return crown.finish(problem, state, _wide(objective), upper)
    found = state.values[problem.output.name]
    return found if objective is None else ibp.rows(found, _wide(objective), problem.arithmetic.total)


def _wide(objective: Tensor | None) -> Tensor | None:
    return None if objective is None else objective.double()


def intermediate(problem: Problem) -> State:
    """Bounds of every value: the tighter of intervals and forward linear bounds."""
    sizes = {name: math.prod(node.shape) for name, node in problem.nodes.items()}
    inputs = sum(sizes[name] for name in problem.regions)
    if problem.count * inputs * max(sizes.values()) > LARGEST:
        raise DoesNotFit(
            f"forward bounds of {inputs} inputs and values of {max(sizes.values())} for {problem.count} "
            "examples take too much memory; use method crown, or fewer examples at once"
        )
    state, known = State(ibp.inputs(problem)), _identities(problem, inputs)
    for node in problem.graph.nodes:
        state.values[node.name] = ibp.step(problem, node, state.values)
        found = _carried(problem, state, node, known, inputs)
        if found is not None:
            slack = None if problem.arithmetic.unit == 0 else slack_of(problem, state, node)
            if slack is not None:
                found = Between(found.low, found.low_at - slack, found.high, found.high_at + slack)
            known[node.name] = found
            state.values[node.name] = _tighter(state.values[node.name], _interval(problem, found))
    return state


def _precise(problem: Problem) -> Problem:
    """The same problem with its proof in float64."""
    how = replace(problem.arithmetic, dtype=torch.float64, own=2.0**-53, estimate=0.0)
    regions = [problem.regions[node.name] for node in problem.graph.inputs]
    return pose(problem.graph, regions, how)


def _identities(problem: Problem, inputs: int) -> dict[str, Between]:
    """Each input as itself."""
    known, start = {}, 0
    for name, region in problem.regions.items():
        count = region.lower[0].numel()
        eye = region.lower.new_zeros(inputs, count)
        eye[start : start + count] = torch.eye(count, dtype=eye.dtype, device=eye.device)
        eye = eye.reshape(1, inputs, *region.lower.shape[1:]).expand(
            problem.count, inputs, *region.lower.shape[1:]
        )
        zero = torch.zeros_like(region.lower)
        known[name] = Between(eye, zero, eye, zero)
        start += count
    return known


def _carried(
    problem: Problem, state: State, node: Node, known: dict[str, Between], inputs: int
) -> Between | None:
    """The linear functions of a node from those of what it reads; constants where there is no rule."""
    how, read = kind(problem, node), moving(problem, node)
    if not isinstance(state.values[node.name], Interval) or not node.dtype.is_floating_point:
        return None
    if any(name not in known for name in read):
        return _constant(state.values[node.name], inputs)
    if how == "scalar":
        return _through(known[read[0]], lines_of(problem, state, node))
    if how == "affine":
        found = _affine(problem, state, node, known, read)
        if found is not None:
            return found
    return _constant(state.values[node.name], inputs)


def _constant(x: Interval, inputs: int) -> Between:
    zero = x.lower.new_zeros(len(x.lower), inputs, *x.lower.shape[1:])
    return Between(zero, x.lower, zero, x.upper)


def _through(x: Between, line: Any) -> Between:
    """Elementwise lines: the lower one reads the lower function where it rises, else the upper."""

    def side(
        slope: Tensor, at: Tensor | None, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
    ) -> Any:
        rises, falls = slope.clamp(min=0), slope.clamp(max=0)
        a = rises.unsqueeze(1) * first[0] + falls.unsqueeze(1) * second[0]
        b = rises * first[1] + falls * second[1]
        return a, b if at is None else b + at

    low, high = (x.low, x.low_at), (x.high, x.high_at)
    return Between(
        *side(line.lower_slope, line.lower, low, high), *side(line.upper_slope, line.upper, high, low)
    )


def _affine(
    problem: Problem, state: State, node: Node, known: dict[str, Between], read: list[str]
) -> Between | None:
    """Affine operators: weights split by sign; movements and sums applied to the coefficients themselves."""
    p = problem.params(node, state.values)
    if node.op in ("aten.linear", "aten.convolution"):
        return _weighted(node, p, known[read[0]])
    if node.op == "aten.add" and len(read) == 2 and p["alpha"] == 1:
        x, y = known[read[0]], known[read[1]]
        if x.low.shape == y.low.shape:
            pairs = zip((x.low, x.low_at, x.high, x.high_at), (y.low, y.low_at, y.high, y.high_at))
            return Between(*(a + b for a, b in pairs))
    if (node.op in MOVED or node.op in SUMMED) and len(read) == 1:
        return _applied(node, p, known[read[0]])
    return None


def _weighted(node: Node, p: dict[str, Any], x: Between) -> Between:
    def by(weight: Tensor, value: Tensor) -> Tensor:
        lead = value.shape[: value.ndim - len(p["input"].lower.shape[1:])]
        flat = value.reshape(-1, *value.shape[len(lead) :])
        if node.op == "aten.linear":
            return torch.nn.functional.linear(value, weight)
        found = call(node, {**p, "input": flat.flatten(0, 1), "weight": weight, "bias": None})
        return found.reshape(*lead, *node.shape)

    plus, minus = p["weight"].clamp(min=0), p["weight"].clamp(max=0)
    shift = 0.0 if p["bias"] is None else p["bias"]
    if p["bias"] is not None and node.op == "aten.convolution":
        shift = shift.reshape(-1, *[1] * (len(node.shape) - 2))
    return Between(
        by(plus, x.low) + by(minus, x.high),
        by(plus, x.low_at) + by(minus, x.high_at) + shift,
        by(plus, x.high) + by(minus, x.low),
        by(plus, x.high_at) + by(minus, x.low_at) + shift,
    )


def _applied(node: Node, p: dict[str, Any], x: Between) -> Between:
    """An operator without negative weights, on one example at a time."""
    name = next(key for key, value in p.items() if isinstance(value, Interval))

    def one(value: Tensor) -> Tensor:
        return call(node, {**p, name: value})

    each: Callable[[Tensor], Tensor] = torch.vmap(one)
    return Between(torch.vmap(each)(x.low), each(x.low_at), torch.vmap(each)(x.high), each(x.high_at))


def _interval(problem: Problem, x: Between) -> Interval:
    """The linear functions over the regions."""
    regions = list(problem.regions.values())
    sizes = [region.lower[0].numel() for region in regions]

    def least(a: Tensor, at: Tensor) -> Tensor:
        rows, total = a.flatten(2).transpose(1, 2), at
        for region, part in zip(regions, rows.split(sizes, 2)):
            shaped = part.reshape(*part.shape[:2], *region.lower.shape[1:])
            total = total + region.lowest(shaped, OWN).reshape(at.shape)
        return total - OWN * at.abs()

    return Interval(least(x.low, x.low_at), -least(-x.high, -x.high_at))


def _tighter(x: Interval, y: Interval) -> Interval:
    return Interval(torch.maximum(x.lower, y.lower), torch.minimum(x.upper, y.upper))
