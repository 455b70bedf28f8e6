"""Operators that no plane relaxes well, as chains of operators that lines and planes do relax.

    softmax_i       1 / sum_j exp(x_j - x_i)         log_softmax_i   -log sum_j exp(x_j - x_i)
    layer_norm      c rsqrt(mean c^2 + eps) w + b,   c = x - mean x;  rms, group, instance norm likewise
    var, 2-norm     sum of squares, scaled; its root

In real arithmetic the chain is the operator. In floating point the network runs the operator and not the
chain, so the last node, `netweight.rounded`, is the chain's value plus at most `rounding`: what the operator
may be off by from its real value (the formulas of `relax`). Its `interval` is also within what `rules` finds
for the operator itself. A masked score, -inf at places that are known, leaves the sums by a factor of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from netweight.core.graph import Node, Ref
from netweight.verification import relax
from netweight.verification.relax import ELEMENTARY, TINY, Interval, gamma
from netweight.verification.rules import rule_of

WIDEST = 256  # entries of a softmax; differences of all pairs are formed
Params = Mapping[str, Any]


@dataclass
class Chain:
    """Nodes that stand for one node: their names start with its own, the last one bears it."""

    node: Node
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    folded: list[Node] = field(default_factory=list)

    def add(self, op: str, shape: Sequence[int], overload: str = "default", /, **params: Any) -> Ref:
        """One more operator; gives the reference to its value."""
        name = f"{self.node.name}.{len(self.nodes)}.{op}"
        self.nodes.append(
            Node(
                name,
                f"aten.{op}",
                overload,
                named(params),
                params,
                tuple(shape),
                self.node.dtype,
                self.node.layer,
            )
        )
        return Ref(name)

    def constant(self, name: str, value: Tensor) -> Ref:
        """A new constant."""
        name = f"{self.node.name}.{name}"
        self.constants[name] = value
        return Ref(name)

    def reshaped(self, given: Ref, value: Tensor, shape: Sequence[int]) -> Ref:
        """A constant in another shape, which follows it when it is trained."""
        found = self.constant(f"{given.name}.reshaped", value.reshape(shape))
        params = {"self": given, "shape": list(shape)}
        self.folded.append(
            Node(found.name, "aten.reshape", "default", (given.name,), params, tuple(shape), value.dtype, "")
        )
        return found

    def ended(self) -> Chain:
        """With the node's own name on the last operator."""
        self.nodes[-1] = replace(self.nodes[-1], name=self.node.name)
        return self

    def rounded(self, **more: Any) -> Chain:
        """With `netweight.rounded` at the end: the node's params, its input under "input"."""
        last = Ref(self.nodes[-1].name)
        given = {("input" if key == "self" else key): value for key, value in self.node.params.items()}
        params = {**given, "self": last, "like": self.node.op, **more}
        self.nodes.append(
            replace(self.node, op="netweight.rounded", overload="", inputs=named(params), params=params)
        )
        return self


def named(params: Params) -> tuple[str, ...]:
    """The names that params refer to, in order."""
    return tuple(value.name for value in params.values() if isinstance(value, Ref))


@dataclass(frozen=True)
class Scores:
    """What a softmax is taken of: unmasked scores, and where they count (None: everywhere)."""

    x: Ref
    kept: Tensor | None = None


Look = Callable[[Ref], Node | Tensor]  # the node or constant that a reference names


# Softmax -------------------------------------------------------------------------------------------------


def softmax(node: Node, look: Look) -> Chain | None:
    """softmax and log_softmax over one axis of at most `WIDEST` entries."""
    shape, dim = node.shape, node.params["dim"] % len(node.shape)
    if shape[dim] > WIDEST or node.params.get("dtype") not in (None, node.dtype):
        return None
    chain, scores = Chain(node), masked(node.params["self"], look, shape)
    if scores.kept is not None and node.op == "aten.log_softmax":
        return None  # -inf at the masked places
    pairs = (*shape[:dim], shape[dim], *shape[dim:])
    others = chain.add("unsqueeze", (*shape[:dim], 1, *shape[dim:]), self=scores.x, dim=dim)
    own = chain.add("unsqueeze", (*shape[: dim + 1], 1, *shape[dim + 1 :]), self=scores.x, dim=dim + 1)
    apart = chain.add("sub", pairs, "Tensor", self=others, other=own, alpha=1)
    term = chain.add("exp", pairs, self=apart)
    if scores.kept is not None:
        kept = chain.constant("others", scores.kept.unsqueeze(dim).to(node.dtype))
        term = chain.add("mul", pairs, "Tensor", self=term, other=kept)
    total = chain.add("sum", shape, "dim_IntList", self=term, dim=[dim + 1], keepdim=False, dtype=None)
    if node.op == "aten.log_softmax":
        chain.add("neg", shape, self=chain.add("log", shape, self=total))
    else:
        share = chain.add("reciprocal", shape, self=total)
        if scores.kept is not None:
            kept = chain.constant("own", scores.kept.to(node.dtype))
            chain.add("mul", shape, "Tensor", self=share, other=kept)
    return chain.rounded()


def masked(x: Ref, look: Look, shape: Sequence[int]) -> Scores:
    """The scores behind a mask that does not depend on the input."""
    node = look(x)
    if not isinstance(node, Node) or node.shape != tuple(shape):
        return Scores(x)
    p = node.params
    if node.op == "aten.where" and isinstance(look(p["condition"]), Tensor):
        condition = look(p["condition"])
        for masked_side, other, kept in (("self", "other", ~condition), ("other", "self", condition)):
            hidden = look(p[masked_side])
            behind = p[other]
            if not isinstance(hidden, Tensor) or not bool((hidden == -math.inf).all()):
                continue
            if isinstance(look(behind), Node) and look(behind).shape == tuple(shape):
                return Scores(behind, kept.expand(shape))
    return Scores(x)


# Norms ---------------------------------------------------------------------------------------------------


def layer_norm(node: Node, look: Look) -> Chain:
    """layer_norm, rms_norm: over the last axes."""
    p, shape = node.params, node.shape
    dims = list(range(len(shape) - len(p["normalized_shape"]), len(shape)))
    chain = Chain(node)
    eps = torch.finfo(node.dtype).eps if p["eps"] is None else p["eps"]
    found, rate = _normal(chain, p["input"], shape, dims, eps, node.op == "aten.layer_norm")
    _scale(chain, found, shape, p["weight"], p.get("bias"))
    return chain.rounded(rate=rate)


def group_norm(node: Node, look: Look) -> Chain | None:
    """group_norm over groups of channels, instance_norm over each channel."""
    p, shape = node.params, node.shape
    if not p.get("use_input_stats", True):
        return None
    chain = Chain(node)
    flat = (shape[0], p.get("num_groups", shape[1]), math.prod(shape[1:]) // p.get("num_groups", shape[1]))
    x = chain.add("reshape", flat, self=p["input"], shape=list(flat))
    found, rate = _normal(chain, x, flat, [2], p["eps"], True)
    found = chain.add("reshape", shape, self=found, shape=list(shape))
    per_channel = [shape[1], *[1] * (len(shape) - 2)]
    sides = []
    for name in ("weight", "bias"):
        value = None if p[name] is None else look(p[name])
        if isinstance(value, Node):
            return None
        sides.append(None if value is None else chain.reshaped(p[name], value, per_channel))
    _scale(chain, found, shape, *sides)
    return chain.rounded(rate=rate)


def _normal(
    chain: Chain, x: Ref, shape: Sequence[int], dims: list[int], eps: float, centred: bool
) -> tuple[Ref, Ref]:
    """c / sqrt(mean c^2 + eps), and the factor."""
    short = tuple(1 if d in dims else n for d, n in enumerate(shape))
    if centred:
        mean = chain.add("mean", short, "dim", self=x, dim=dims, keepdim=True, dtype=None)
        x = chain.add("sub", shape, "Tensor", self=x, other=mean, alpha=1)
    square = chain.add("square", shape, self=x)
    spread = chain.add("mean", short, "dim", self=square, dim=dims, keepdim=True, dtype=None)
    spread = chain.add("add", short, "Tensor", self=spread, other=eps, alpha=1)
    rate = chain.add("rsqrt", short, self=spread)
    return chain.add("mul", shape, "Tensor", self=x, other=rate), rate


def _scale(chain: Chain, x: Ref, shape: Sequence[int], weight: Any, bias: Any) -> None:
    if weight is not None:
        x = chain.add("mul", shape, "Tensor", self=x, other=weight)
    if bias is not None:
        chain.add("add", shape, "Tensor", self=x, other=bias, alpha=1)


def variance(node: Node, look: Look) -> Chain:
    """Mean squared distance from the mean."""
    p, shape = node.params, _shape(look(node.params["self"]))
    dims = _dims(p["dim"], len(shape))
    short = tuple(1 if d in dims else n for d, n in enumerate(shape))
    chain = Chain(node)
    mean = chain.add("mean", short, "dim", self=p["self"], dim=dims, keepdim=True, dtype=None)
    apart = chain.add("sub", shape, "Tensor", self=p["self"], other=mean, alpha=1)
    square = chain.add("square", shape, self=apart)
    total = chain.add(
        "sum", node.shape, "dim_IntList", self=square, dim=dims, keepdim=p["keepdim"], dtype=None
    )
    chain.add("div", node.shape, "Tensor", self=total, other=_count(p, shape))
    return chain.rounded(shape=list(shape))


def _count(p: Params, shape: Sequence[int]) -> float:
    correction = 1.0 if p["correction"] is None else float(p["correction"])
    return math.prod(shape[d] for d in _dims(p["dim"], len(shape))) - correction


def norm(node: Node, look: Look) -> Chain | None:
    """1-, 2- and infinity-norms of vectors."""
    p, shape = node.params, _shape(look(node.params["self"]))
    order, dims = float(p["ord"]), _dims(p["dim"], len(shape))
    if order not in (1.0, 2.0, math.inf) or p.get("dtype") not in (None, node.dtype):
        return None
    chain = Chain(node)
    each = chain.add("square" if order == 2 else "abs", shape, self=p["self"])
    if order == math.inf:
        chain.add("amax", node.shape, self=each, dim=dims, keepdim=p["keepdim"])
        return chain.ended()
    total = chain.add("sum", node.shape, "dim_IntList", self=each, dim=dims, keepdim=p["keepdim"], dtype=None)
    if order == 2:
        chain.add("sqrt", node.shape, self=total)
    return chain.rounded()


def _shape(value: Node | Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _dims(dim: Any, ndim: int) -> list[int]:
    dims = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return sorted(d % ndim for d in dims)


# What the operator may be off by -------------------------------------------------------------------------


def rounding(node: Node, p: Params, unit: float) -> Tensor:
    """By how much the computed value of `netweight.rounded` may differ from the real one, elementwise.

    p: its params with Intervals of any leading axes; unit: the unit roundoff of the network.
    """
    x, like = p["input"], node.params["like"]
    match like:
        case "aten.softmax" | "aten.log_softmax":
            dim = node.params["dim"] % len(node.shape) - len(node.shape)
            terms = node.shape[dim] + ELEMENTARY
            size = 2 * relax.reach(x, dim) + 1
            if like == "aten.softmax":
                size = size * p["self"].upper.clamp(0, 1)
            return (gamma(terms, unit) * size + terms * TINY).expand(p["self"].lower.shape)
        case "logsumexp":
            dims = _behind(p["dim"], x, node)
            terms = math.prod(x.lower.shape[d] for d in dims) + ELEMENTARY
            size = 2 * _over(x.size.masked_fill(x.size.isinf(), 0.0), dims, "amax") + 1
            return (gamma(terms, unit) * size).reshape(p["self"].lower.shape)
        case "aten.var":
            dims = _behind(p["dim"], x, node)
            terms = math.prod(x.lower.shape[d] for d in dims) + ELEMENTARY
            size = 4 * _over(x.size.square(), dims, "sum") / _count(p, x.lower.shape[-_rank(x, node) :])
            return (gamma(terms, unit) * size + terms * TINY).reshape(p["self"].lower.shape)
        case "aten.linalg_vector_norm":
            terms = max(1, x.lower.numel() // max(1, p["self"].lower.numel())) + ELEMENTARY
            return 2 * gamma(terms, unit) * p["self"].size + (terms * TINY) ** 0.5
    return _norm_rounding(node, p, unit)


def _rank(x: Interval, node: Node) -> int:
    """The axes of an example of x, of which `node` may have fewer."""
    return len(node.params["shape"])


def _behind(dim: Any, x: Interval, node: Node) -> tuple[int, ...]:
    """Axes counted from the end, behind any leading ones."""
    rank = _rank(x, node)
    return tuple(d - rank for d in _dims(dim, rank))


def _over(values: Tensor, dims: tuple[int, ...], how: str) -> Tensor:
    return getattr(values, how)(dims, keepdim=True)


def _norm_rounding(node: Node, p: Params, unit: float) -> Tensor:
    """Of c r w + b: c is off by 2 gamma |x|, mean c^2 by 4 gamma mean x^2, hence r by half of that over c^2.

    Never more than the width of what the computed and the real value both lie in.
    """
    x, flat = p["input"], p["input"]
    if node.params["like"] in ("aten.layer_norm", "aten.rms_norm"):
        dims = tuple(range(-len(p["normalized_shape"]), 0))
    else:
        groups, dims = p.get("num_groups", node.shape[1]), (-1,)
        lead = x.lower.shape[: x.lower.ndim - len(node.shape)]
        shape = (*lead, node.shape[0], groups, -1)
        flat = Interval(x.lower.reshape(shape), x.upper.reshape(shape))
    centred = node.params["like"] != "aten.rms_norm"
    eps = torch.finfo(node.dtype).eps if p["eps"] is None else p["eps"]
    normal = relax.normalised(flat, dims, eps, centred, unit)
    terms = math.prod(flat.lower.shape[d] for d in dims) + ELEMENTARY
    g, size = gamma(terms, unit), flat.size
    fastest = p["rate"].upper
    spread = fastest.clamp(min=1e-30) ** -2  # the least mean c^2 + eps
    drift = 4 * g * size.square().mean(dims, keepdim=True)
    relative = torch.where(drift < spread, drift / (spread - drift), math.inf)
    off = 2 * g * size.amax(dims, keepdim=True) * fastest + normal.size * (relative + ELEMENTARY * 2 * unit)
    off = torch.minimum(off.nan_to_num(math.inf), normal.upper - normal.lower).reshape(x.lower.shape)
    size = normal.size.reshape(x.lower.shape)
    per_channel = (-1, *[1] * (len(node.shape) - 2))
    weight, bias = (
        None if p.get(n) is None else (p[n] if dims != (-1,) or flat is x else p[n].reshape(per_channel))
        for n in ("weight", "bias")
    )
    if weight is not None:
        off, size = off * weight.abs(), size * weight.abs()
    if bias is not None:
        size = size + bias.abs()
    return off + gamma(4, unit) * size + 4 * TINY


def interval(node: Node, p: Params, unit: float) -> Interval:
    """The chain's interval with `rounding`, within the interval of the operator itself; for one example."""
    slack = rounding(node, p, unit)
    lower, upper = p["self"].lower - slack, p["self"].upper + slack
    if node.params["like"] == "logsumexp":
        dims, x = _behind(p["dim"], p["input"], node), p["input"]
        whole = Interval(*(end.logsumexp(dims).reshape(node.shape) for end in (x.lower, x.upper)))
        whole = Interval(whole.lower - slack, whole.upper + slack)
    else:
        first = "self" if node.params["like"] in SELF else "input"
        given = {key: value for key, value in p.items() if key not in ("self", "like", "rate", "shape")}
        given[first] = given.pop("input")
        whole = rule_of(replace(node, op=node.params["like"]))(
            replace(node, op=node.params["like"]), given, unit
        )
    return Interval(torch.maximum(lower, whole.lower), torch.minimum(upper, whole.upper))


SELF = frozenset(["aten.softmax", "aten.log_softmax", "aten.var", "aten.linalg_vector_norm"])
CHAINS: Mapping[str, Callable[[Node, Look], Chain | None]] = {
    "aten.softmax": softmax,
    "aten.log_softmax": softmax,
    "aten.layer_norm": layer_norm,
    "aten.rms_norm": layer_norm,
    "aten.group_norm": group_norm,
    "aten.instance_norm": group_norm,
    "aten.var": variance,
    "aten.linalg_vector_norm": norm,
}
