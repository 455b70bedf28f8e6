"""Weights that move: bounds that hold for every network whose weights lie in a set around the given ones.

Paper: Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", 2020,
arXiv:2002.12920 (section 3 and 4.3, where parameters are perturbed like inputs).

    graph = loosened(captured(model, x), L2(0.05))      # |dW|_2 <= 0.05 for the weight of every layer
    bounds(graph, x, Linf(0.0))                         # for all of them at once, and for every s of the set

A layer is linear in its weight, op(x; W + dW) = op(x; W) + op(x; dW). The graph gets the second summand as a
node of its own, and for rows a of it

    <a, op(x; dW)> = <G(a, x), dW>,            G(a, x)_k = <a, d op(x; W) / d W_k>, linear in a and in x.

A ball, |dW|_2 <= eps (the Euclidean length of the change of the layer's whole weight), x in c +- r:

    <G(a, x), dW> >= -eps |M|_2,               M = |G(a, c)| + G(|a|, r) >= |G(a, x)|,

exact where x is one point; for a Linear layer |M|_2 = |a|_2 | |c| + r |_2. A box, |dW| <= E:

    <a, op(x; dW)> >= -<|a|, op(|x|; E)>,      |x| <= s x + t, the chord of |x| on [l, u],

which stays linear in x and costs one product; at a point x it is -<E, |G(a, x)|>, which is exact.

Differs from the paper: there, a weight that meets a perturbed input is relaxed element by element as a
bilinear product; the bounds above are tighter, need no planes per weight, and treat convolutions too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from netweight.core.errors import DoesNotFit, unknown
from netweight.core.graph import Graph, Node, Ref, call
from netweight.core.perturbation import L2, Box, Perturbation, Rounding, WeightLinf
from netweight.verification.backward import back
from netweight.verification.relax import Interval
from netweight.verification.rows import total

LAYERS = ("aten.linear", "aten.convolution")
MOVED = "netweight.moved"
TINY = 1e-30  # under a root: its slope at 0 stays finite


# The graph with weights that move ------------------------------------------------------------------------


def loosened(graph: Graph, weights: Perturbation | Mapping[str, Perturbation]) -> Graph:
    """The graph in which the weights of Linear and Conv layers lie anywhere in a set around their values.

    weights: one set for every layer, or sets by layer name; the other weights, and all biases, stay. L2: a
    ball around the whole weight of each layer; WeightLinf, Box, Rounding: a box. A layer that is used twice
    moves twice. Raises `BadInput` for a layer that is not there, `DoesNotFit` for another kind of set.
    """
    layers = {node.layer: node for node in graph.nodes if _holds_weight(node, graph)}
    sets = weights if isinstance(weights, Mapping) else dict.fromkeys(layers, weights)
    for name in sets:
        if name not in layers:
            raise unknown("layer with a weight", name, layers)
    nodes: list[Node] = []
    constants = dict(graph.constants)
    for node in graph.nodes:
        if _holds_weight(node, graph) and node.layer in sets:
            nodes += _loose(node, sets[node.layer], constants)
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes), constants=constants)


def _holds_weight(node: Node, graph: Graph) -> bool:
    weight = node.params.get("weight")
    return node.op in LAYERS and isinstance(weight, Ref) and weight.name in graph.constants


def _loose(node: Node, within: Perturbation, constants: dict[str, Tensor]) -> tuple[Node, Node, Node]:
    """The layer at the middle of the set, what the change of its weight adds, and their sum."""
    weight = constants[node.params["weight"].name]
    # an evaluation at W + dW rounds like one at W, but for this share of |x| |dW|
    share = 1 + 4 * (weight.numel() // min(weight.shape[:2]) + 16) * 2.0**-24
    middle, params = node.params["weight"], {**node.params, "bias": None, "layer": node}
    if isinstance(within, L2):
        params |= {"eps": within.eps * share}
    elif isinstance(within, WeightLinf | Box | Rounding):
        lower, upper = (end.double() for end in within.corners(weight.detach()))
        centre = weight.detach() if isinstance(within, WeightLinf) else ((lower + upper) / 2).to(weight.dtype)
        reach = torch.maximum(upper - centre.double(), centre.double() - lower) * share
        constants[f"{node.name}_reach"] = reach.to(weight.dtype)
        params |= {"eps": None, "weight": Ref(f"{node.name}_reach")}
        if not isinstance(within, WeightLinf):
            middle = Ref(f"{node.name}_middle")
            constants[middle.name] = centre
    else:
        raise DoesNotFit(f"{node.layer}: weights do not move in {within}; give l2, weightlinf or rounding")
    x = node.params["input"].name
    fixed = replace(
        node,
        name=f"{node.name}_fixed",
        params={**node.params, "weight": middle},
        inputs=tuple(middle.name if name == node.params["weight"].name else name for name in node.inputs),
    )
    moved = replace(node, name=f"{node.name}_moved", op=MOVED, overload="", params=params, inputs=(x,))
    moved = replace(moved, inputs=(x, params["weight"].name))
    both = {"self": Ref(fixed.name), "other": Ref(moved.name), "alpha": 1}
    total = replace(node, op="aten.add", overload="Tensor", params=both, inputs=(fixed.name, moved.name))
    return fixed, moved, total


# Its two rules -------------------------------------------------------------------------------------------


def interval(node: Node, p: Mapping[str, Any], unit: float) -> Interval:
    """op(x; dW) for a batch of intervals x: +- op(|x|; E), or +- eps times the length of what is read."""
    size = p["input"].size
    if p["eps"] is None:
        reach = _applied(p, size, p["weight"])
    else:
        reach = p["eps"] * (_applied(p, size**2, torch.ones_like(p["weight"])) + TINY).sqrt()
    return Interval(-reach, reach)


def rows(
    node: Node, a: Tensor, p: Mapping[str, Any], alpha: Any = None
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Rows a `b s *out` of op(x; dW), x an interval `b 1 *in`: coefficients on x, and the bias."""
    x = Interval(p["input"].lower[:, 0], p["input"].upper[:, 0])
    point = not bool((x.upper > x.lower).any())
    if p["eps"] is not None:
        return {}, -p["eps"] * _length(p, a, x)
    if point:
        reach = _gradient(p, a, x.lower).abs()
        return {}, -total(reach * p["weight"])
    width = x.upper - x.lower
    wide = width > 0
    slope = torch.where(wide, x.upper.abs() - x.lower.abs(), 0.0) / torch.where(wide, width, 1.0)
    rest = x.lower.abs() - slope * x.lower
    found = back(p["layer"], a.abs(), {**p, "input": x})[0]["input"]
    bias = total(found * rest.unsqueeze(1))
    return {"input": -found * slope.unsqueeze(1)}, -bias


def _length(p: Mapping[str, Any], a: Tensor, x: Interval) -> Tensor:
    """|M|_2 for each row."""
    if p["layer"].op == "aten.linear" and a.flatten(2).shape[2] == p["weight"].shape[0]:
        own = (a.flatten(2).square().sum(2) + TINY).sqrt()
        return own * (x.size.flatten(1).square().sum(1, keepdim=True) + TINY).sqrt()
    reach = _gradient(p, a, x.centre).abs() + _gradient(p, a.abs(), x.radius)
    return (reach.flatten(2).square().sum(2) + TINY).sqrt()


def _gradient(p: Mapping[str, Any], a: Tensor, x: Tensor) -> Tensor:
    """G(a, x): rows `b s *out`, inputs `b *in` -> `b s *weight`."""

    def one(row: Tensor, example: Tensor) -> Tensor:
        def layer(weight: Tensor) -> Tensor:
            return call(p["layer"], _params(p, example, weight))

        return torch.func.vjp(layer, p["weight"])[1](row)[0]

    return torch.vmap(torch.vmap(one, (0, None)), (0, 0))(a, x)


def _applied(p: Mapping[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    """op(x; weight) without a bias, for a batch `b *in`."""
    if p["layer"].op == "aten.linear":
        return call(p["layer"], _params(p, x, weight))
    return call(p["layer"], _params(p, x.flatten(0, 1), weight)).unflatten(0, x.shape[:2])


def _params(p: Mapping[str, Any], x: Tensor, weight: Tensor) -> dict[str, Any]:
    """The arguments of the layer itself."""
    own = {name: value for name, value in p.items() if name not in ("layer", "eps")}
    return {**own, "input": x, "weight": weight, "bias": None}


INTERVALS = {MOVED: interval}
RULES = {MOVED: rows}
