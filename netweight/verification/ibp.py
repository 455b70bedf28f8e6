"""Interval bound propagation: one interval per value, from input to output (Gowal et al. 2018,
arXiv:1810.12715).

Each operator has a rule for one example: what it does to intervals (`rules`; the arithmetic and what it
covers: `relax`). Here a whole batch goes through it: a few operators are written out, the others run under
`torch.vmap`. The last linear layer is multiplied with the objective before it is bounded, as the paper does:
rows C W, not bounds on W h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.exact import rounded
from netweight.core.graph import Node, call
from netweight.verification import difference, relax, weights
from netweight.verification.backward import terms
from netweight.verification.prepare import INTERVALS
from netweight.verification.problem import Problem
from netweight.verification.relax import Interval, interval
from netweight.verification.rules import exact, fixed, rule_of

State = dict[str, Interval]  # the bounds of every value, `B *shape`, by the name of its node


def propagate(problem: Problem, objective: Float[Tensor, "b k out"] | None = None) -> Interval:
    """Bounds on the output `b *out`, or on the rows of the objective times the flattened output.

    Raises `DoesNotFit` naming the first operator that has no rule.
    """
    values, last = inputs(problem), problem.output
    unit = problem.arithmetic.total
    for node in problem.graph.nodes:
        if node is last and objective is not None and node.op == "aten.linear" and len(node.shape) == 2:
            p = problem.params(node, values)
            if not isinstance(p["weight"], Interval):
                x = Interval(p["input"].lower.flatten(1), p["input"].upper.flatten(1))
                return linear_rows(x, p["weight"], p["bias"], objective, unit)
        values[node.name] = step(problem, node, values)
    return values[last.name] if objective is None else rows(values[last.name], objective, unit)


def inputs(problem: Problem) -> State:
    """The intervals of the inputs, to be filled up node by node."""
    return {name: Interval(region.lower, region.upper) for name, region in problem.regions.items()}


def step(problem: Problem, node: Node, values: Mapping[str, Any]) -> Any:
    """The interval of one node, those of its inputs given; a tuple where it has several results."""
    p = problem.params(node, values)
    if node.op == difference.NOISE:
        noise = lost(problem, p["of"], {name: value for name, value in p.items() if name != "of"})
        return Interval(-noise, noise)
    return bounded(problem, node, p)


def bounded(problem: Problem, node: Node, p: Mapping[str, Any]) -> Any:
    """The interval of one node, its params given."""
    unit = problem.arithmetic.total
    rule = BATCHED.get(node.op)
    found = rule(node, p, unit) if rule is not None else None
    return _certain(_one_by_one(node, p, problem) if found is None else found)


def lost(problem: Problem, node: Node, p: Mapping[str, Any]) -> Tensor:
    """What the network's and the proof's arithmetic can lose at an affine node, elementwise `B *shape`."""
    count = terms(node, p)
    return problem.slack(count) * mass(problem, node, p) + count * relax.TINY


def mass(problem: Problem, node: Node, p: Mapping[str, Any]) -> Tensor:
    """The size of what is added up in each element of a node: |W| |x| + |b|, `B *shape`."""
    return bounded(problem, node, _each(p, lambda x: Interval(-x.size, x.size))).size


# A batch at once: the operators that most networks consist of; None where the case is another ------------


def _linear(node: Node, p: Mapping[str, Any], unit: float) -> Interval | None:
    weight, bias = p["weight"], p["bias"]
    if isinstance(weight, Interval) or isinstance(bias, Interval):
        return None

    def by(x: Tensor, absolute: bool) -> Tensor:
        return torch.nn.functional.linear(x, weight.abs() if absolute else weight)

    return relax.affine(p["input"], by, bias, weight.shape[1] + 2, unit)


def _convolution(node: Node, p: Mapping[str, Any], unit: float) -> Interval | None:
    weight, bias = fixed(node, p, "weight"), fixed(node, p, "bias")
    bias = None if bias is None else bias.reshape(-1, *[1] * (weight.ndim - 2))

    def by(x: Tensor, absolute: bool) -> Tensor:
        w = weight.abs() if absolute else weight
        return call(node, {**p, "input": x.flatten(0, 1), "weight": w, "bias": None}).unflatten(
            0, x.shape[:2]
        )

    return relax.affine(p["input"], by, bias, weight.numel() // min(weight.shape[:2]) + 2, unit)


def _relu(node: Node, p: Mapping[str, Any], unit: float) -> Interval:
    return Interval(p["self"].lower.clamp(min=0), p["self"].upper.clamp(min=0))


def _reshape(node: Node, p: Mapping[str, Any], unit: float) -> Interval:
    x = p["self"]
    shape = (len(x.lower), *node.shape)
    return Interval(x.lower.reshape(shape), x.upper.reshape(shape))


def _add(node: Node, p: Mapping[str, Any], unit: float) -> Interval | None:
    both = [p["self"], p["other"]]
    aligned = all(isinstance(x, Interval) and x.lower.ndim == len(node.shape) + 1 for x in both)
    if not aligned or p["alpha"] != 1 or not both[0].lower.is_floating_point():
        return None
    return relax.added(*both, unit)


BATCHED: Mapping[str, Callable[[Node, Mapping[str, Any], float], Interval | None]] = {
    "aten.linear": _linear,
    "aten.convolution": _convolution,
    "aten.relu": _relu,
    "aten.reshape": _reshape,
    "aten.add": _add,
    **weights.INTERVALS,
    **difference.INTERVALS,
}


# One example at a time -----------------------------------------------------------------------------------


def _one_by_one(node: Node, p: Mapping[str, Any], problem: Problem) -> Any:
    """The rule of the operator on each example: under vmap, or in a loop where it looks at whole numbers.

    Rules that compute do so in float64, and the result is rounded outwards.
    """
    rule, dtype, several = INTERVALS.get(node.op) or rule_of(node), problem.arithmetic.dtype, []
    if rule is not exact and dtype != torch.float64:
        wide: dict[int, Interval] = {}
        p = _each(p, lambda x: wide.setdefault(id(x), Interval(_wide(x.lower), _wide(x.upper))), _wide)
    found: dict[int, Interval] = {}  # a value that is read twice stays one value: x x is a square
    _each(p, lambda x: found.setdefault(id(x), x))

    def single(*ends: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(found, (Interval(*pair) for pair in zip(ends[::2], ends[1::2]))))
        result = rule(node, _each(p, lambda x: own[id(x)]), problem.arithmetic.unit)
        parts = result if isinstance(result, tuple) else (result,)
        several[:] = [isinstance(result, tuple), *[part is not None for part in parts]]
        return tuple(end for part in parts if part is not None for end in (part.lower, part.upper))

    ends = [end for x in found.values() for end in (x.lower, x.upper)]
    if all(end.is_floating_point() for end in ends):
        out = torch.vmap(single)(*ends)
    else:
        out = [torch.stack(parts) for parts in zip(*(single(*each) for each in zip(*ends)))]
    pairs = iter(zip(out[::2], out[1::2]))
    results = tuple(_outwards(*next(pairs), dtype) if there else None for there in several[1:])
    return results if several[0] else results[0]


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _outwards(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> Interval:
    """The interval in the dtype of the proof."""
    if not lower.is_floating_point() or lower.dtype == dtype:
        return Interval(lower, upper)
    if lower.requires_grad:  # in training nothing is claimed
        return Interval(lower.to(dtype), upper.to(dtype))
    return Interval(rounded(lower, dtype, up=False), rounded(upper, dtype, up=True))


def _each(value: Any, f: Callable[[Interval], Any], g: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """Params with every Interval replaced by f of it, in a fixed order, and every tensor by g of it."""
    if isinstance(value, Interval):
        return f(value)
    if isinstance(value, Mapping):
        return {key: _each(v, f, g) for key, v in value.items()}
    if isinstance(value, list | tuple):  # a tuple is what an operator with several results gave
        return [_each(v, f, g) for v in value]
    return g(value) if isinstance(value, Tensor) else value


def _certain(found: Any) -> Any:
    """Intervals with every NaN replaced by an infinity on its side."""
    if isinstance(found, tuple):
        return tuple(_certain(item) for item in found)
    if found is None or not found.lower.is_floating_point():
        return found
    return Interval(
        found.lower.nan_to_num(-math.inf, math.inf, -math.inf),
        found.upper.nan_to_num(math.inf, math.inf, -math.inf),
    )


# Rows of the output --------------------------------------------------------------------------------------


def rows(x: Interval, objective: Float[Tensor, "b k out"], unit: float) -> Interval:
    """objective times the flattened x."""
    flat = Interval(x.lower.flatten(1).unsqueeze(-1), x.upper.flatten(1).unsqueeze(-1))
    found = relax.multiplied(interval(objective), flat, unit)
    return Interval(found.lower.squeeze(-1), found.upper.squeeze(-1))


def linear_rows(
    x: Interval, weight: Tensor, bias: Tensor | None, objective: Float[Tensor, "b k out"], unit: float
) -> Interval:
    """objective (x W^T + b), the product C W taken first."""
    g = relax.gamma(sum(weight.shape) + 4, unit)
    product, size = objective @ weight, objective.abs() @ weight.abs()
    centre, radius = x.centre.unsqueeze(-1), x.radius.unsqueeze(-1)
    spread = product.abs() @ radius + g * (size @ (centre.abs() + radius)) + relax.TINY * weight.numel()
    middle = product @ centre
    if bias is not None:
        middle = middle + (objective @ bias).unsqueeze(-1)
        spread = spread + g * (objective.abs() @ bias.abs()).unsqueeze(-1)
    return Interval((middle - spread).squeeze(-1), (middle + spread).squeeze(-1))
