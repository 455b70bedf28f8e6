"""Interval bound propagation: one interval per value, from input to output (Gowal et al. 2018,
arXiv:1810.12715).

Each operator has a rule: what it does to intervals (`rules`; the arithmetic and what it covers: `relax`). The
last linear layer is multiplied with the objective before it is bounded, as the paper does: rows C W, not
bounds on W h.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from netweight.core.graph import Graph, Node, run
from netweight.verification import relax
from netweight.verification.relax import Interval, interval
from netweight.verification.rules import fixed, rule_of


def propagate(
    graph: Graph, lower: Tensor, upper: Tensor, objective: Float[Tensor, "b k out"] | None, unit: float
) -> Interval:
    """Bounds for lower <= x <= upper on the output, or on the rows of the objective times the flattened
    output.

    unit: the unit roundoff that is covered. Raises `DoesNotFit` naming the first operator that has no rule.
    """
    wide = {n: t.double() if t.is_floating_point() else t for n, t in graph.constants.items()}
    box = Interval(lower.double(), upper.double()) if lower.is_floating_point() else Interval(lower, upper)
    last = next((node for node in graph.nodes if node.name == graph.outputs[0]), None)
    fused = objective is not None and last is not None and last.op == "aten.linear" and len(last.shape) == 2

    def step(node: Node, p: dict[str, Any]) -> Any:
        if fused and node is last:
            return linear_rows(p["input"], fixed(node, p, "weight"), p["bias"], objective.double(), unit)
        return certain(rule_of(node)(node, p, unit))

    found = run(replace(graph, constants=wide), [box], step)[0]
    return rows(found, objective.double(), unit) if objective is not None and not fused else found


def certain(found: Any) -> Any:
    """Intervals with every NaN replaced by an infinity on its side."""
    if isinstance(found, tuple):
        return tuple(certain(item) for item in found)
    if found is None or not found.lower.is_floating_point():
        return found
    return Interval(
        found.lower.nan_to_num(-math.inf, math.inf, -math.inf),
        found.upper.nan_to_num(math.inf, math.inf, -math.inf),
    )


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
