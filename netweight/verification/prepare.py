"""A captured graph in the form that linear bounds take it: the same function of the same floats.

    graph = prepared(capture(model, x))

What has no good relaxation is split into operators that have one (`split`), what was taken apart by the
export is put together where the whole is relaxed more tightly, and what no output depends on is dropped. The
names of nodes that stay are the same.

    clamp(round(x / s) + z, a, b) - z       one staircase, `netweight.quantized`, without the clamps before it
    clamp(floor(x), a, b)                   likewise, `netweight.floored`
    x > 0 ? x : w x                         prelu;   x > 0 ? x : a expm1(x / a)     celu, an elu
    min(0, x) - log1p(exp(-|x|))            -softplus(-x)
    m + log sum exp(x - m), m = max x       the same around the mean, which is affine
    max(dim).values                         amax

A batch norm stays what it is, an affine operator: folded into the layer before it, it would be another
network by the rounding of that layer's weights, and a certificate speaks of the network that runs. With
`fold` (for real arithmetic, where a proof only estimates its rounding) it is folded, in float64, and stored
in the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from netweight.core import graph as core
from netweight.core.graph import Graph, Node, Ref, run
from netweight.verification.folding import merged, scaling
from netweight.verification.relax import Interval
from netweight.verification.split import CHAINS, Chain, interval

Params = Mapping[str, Any]
Found = Chain | None


def prepared(graph: Graph, fold: bool = False) -> Graph:
    """The graph in operators that have lines and planes; evaluates to the same values.

    fold: batch norms and constant factors become part of the linear layer or convolution before them.
    """
    draft = Draft.of(graph)
    for joined in (JOINED, SPLIT):
        draft = draft.rewritten(joined)
    if fold:
        draft = draft.folded_in()
    return draft.finished(graph)


def evaluate(graph: Graph, *x: Tensor) -> Any:
    """What a prepared graph gives, as `core.graph.evaluate`."""
    found = run(graph, x, call)
    return found[0] if len(found) == 1 else found


def call(node: Node, params: Params) -> Any:
    """The operator itself on tensors."""
    if node.op == "netweight.rounded":
        return params["self"]
    if node.op in STAIRS:
        return _limited(STAIRS[node.op](params["self"]), params)
    return core.call(node, params)


def _limited(whole: Tensor, p: Params) -> Tensor:
    low, high = (torch.as_tensor(p[end], dtype=whole.dtype, device=whole.device) for end in ("low", "high"))
    return torch.minimum(torch.maximum(whole, low), high)


def quantized(node: Node, p: Params, unit: float) -> Interval:
    """The interval of `netweight.quantized` and `netweight.floored`."""
    return Interval(*(_limited(STAIRS[node.op](end), p) for end in (p["self"].lower, p["self"].upper)))


STAIRS = {"netweight.quantized": torch.round, "netweight.floored": torch.floor}
INTERVALS = {"netweight.rounded": interval, **dict.fromkeys(STAIRS, quantized)}


# Rewriting -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """Nodes by name in an order of evaluation, constants, and what was folded into them."""

    nodes: Mapping[str, Node]
    constants: Mapping[str, Tensor]
    folded: tuple[Node, ...]
    inputs: Mapping[str, Node]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, graph: Graph) -> Draft:
        """As captured."""
        return cls(
            {node.name: node for node in graph.nodes}, graph.constants, graph.folded,
            {node.name: node for node in graph.inputs}, graph.outputs,
        )  # fmt: skip

    def look(self, value: Any) -> Any:
        """The node, input or constant that a reference names; anything else is itself."""
        if not isinstance(value, Ref):
            return value
        if value.name in self.constants:
            return self.constants[value.name]
        return self.nodes.get(value.name) or self.inputs[value.name]

    def is_op(self, value: Any, *ops: str) -> bool:
        """Whether a value is made by one of the operators."""
        found = self.look(value)
        return isinstance(found, Node) and found.op in ops

    def users(self) -> Mapping[str, list[Node]]:
        """The nodes that read a value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    def rewritten(self, rules: Mapping[str, Callable[[Node, Draft], Found]]) -> Draft:
        """Every node replaced by the chain that its rule gives."""
        nodes: dict[str, Node] = {}
        constants, folded = dict(self.constants), list(self.folded)
        draft = replace(self, nodes=nodes, constants=constants)
        for node in self.nodes.values():
            chain = rules[node.op](node, draft) if node.op in rules else None
            for each in [node] if chain is None else chain.nodes:
                nodes[each.name] = each
            if chain is not None:
                constants.update(chain.constants)
                folded += chain.folded
        return replace(draft, folded=tuple(folded))

    def folded_in(self) -> Draft:
        """Batch norms and constant factors in the layers before them."""
        nodes, constants, users = dict(self.nodes), dict(self.constants), self.users()
        draft = replace(self, nodes=nodes, constants=constants)
        for node in self.nodes.values():
            slope, shift, source = scaling(node, draft.look)
            layer = nodes.get(source)
            if slope is None or layer is None or len(users[source]) > 1 or source in self.outputs:
                continue
            together = merged(layer, slope, shift, constants)
            if together is not None:
                del nodes[source]
                nodes[node.name] = replace(together, name=node.name)
        return draft

    def finished(self, graph: Graph) -> Graph:
        """What the outputs depend on."""
        alive = set(graph.outputs)
        kept = []
        for node in reversed(list(self.nodes.values())):
            if node.name in alive:
                kept.append(node)
                alive.update(node.inputs)
        for node in reversed(self.folded):
            if node.name in alive:
                alive.update(node.inputs)
        constants = {name: tensor for name, tensor in self.constants.items() if name in alive}
        return replace(graph, nodes=tuple(reversed(kept)), constants=constants, folded=self.folded)


# Putting together ----------------------------------------------------------------------------------------


def _whole(value: Any) -> bool:
    """Whether a constant has whole numbers only."""
    if isinstance(value, Tensor):
        return bool((value == value.round()).all())
    return isinstance(value, int | float) and float(value).is_integer()


def staircase(node: Node, draft: Draft) -> Found:
    """clamp(round(x) + z, a, b) or clamp(floor(x) + z, a, b) with whole a, b and constant whole z."""
    p = node.params
    if not all(_whole(draft.look(p.get(end))) for end in ("min", "max")):
        return None
    inner, offset = p["self"], None
    if draft.is_op(inner, "aten.add") and draft.look(inner).params["alpha"] == 1:
        inner, offset = draft.look(inner).params["self"], draft.look(inner).params["other"]
    rounded, zero = draft.look(inner), 0.0 if offset is None else draft.look(offset)
    if not draft.is_op(inner, "aten.round", "aten.floor") or "decimals" in rounded.params or not _whole(zero):
        return None
    chain, ends = Chain(node), {}
    for end, name in (("low", "min"), ("high", "max")):
        value = draft.look(p[name]) - zero
        if isinstance(value, Tensor):
            value = chain.constant(end, value) if value.numel() > 1 else float(value)
        ends[end] = value
    x, down = rounded.params["self"], rounded.op == "aten.floor"
    x = x if down else _before_clamps(x, draft, ends, chain)
    stairs = chain.add("quantized", node.shape, self=x, **ends)
    op = "netweight.floored" if down else "netweight.quantized"
    chain.nodes[-1] = replace(chain.nodes[-1], op=op, overload="")
    if offset is not None:
        chain.add("add", node.shape, "Tensor", self=stairs, other=offset, alpha=1)
    return chain.ended()


def _before_clamps(x: Ref, draft: Draft, ends: Mapping[str, Any], chain: Chain) -> Ref:
    """x / s without clamps of x that the stairs make up for: where those hold, the stairs have ended."""
    quotient = draft.look(x)
    if not draft.is_op(x, "aten.div") or draft.is_op(quotient.params["other"]):
        return x
    scale, source = draft.look(quotient.params["other"]), quotient.params["self"]
    low, high = (chain.constants[v.name] if isinstance(v, Ref) else v for v in (ends["low"], ends["high"]))
    if isinstance(scale, Node) or not bool((torch.as_tensor(scale) > 0).all()):
        return x
    found = source
    while draft.is_op(found, "aten.minimum", "aten.maximum"):
        clamp = draft.look(found)
        limit = draft.look(clamp.params["other"])
        if not isinstance(limit, Tensor | float | int):
            break
        step = torch.round(torch.as_tensor(limit) / scale)
        ended = step >= high if clamp.op == "aten.minimum" else step <= low
        if not bool(torch.as_tensor(ended).all()):
            break
        found = clamp.params["self"]
    if found == source or draft.look(found).shape != quotient.shape:
        return x
    return chain.add("div", quotient.shape, quotient.overload, **{**quotient.params, "self": found})


def fake_quantize(node: Node, draft: Draft) -> Found:
    """The native operator, (clamp(round(x (1 / s)) + z, a, b) - z) s, as its steps."""
    made = draft.look(node.params["self"])
    if not draft.is_op(node.params["self"], *NATIVE) or node.params["index"] != 0:
        return None
    p, chain = made.params, Chain(node)
    scale, zero = draft.look(p["scale"]), draft.look(p["zero_point"])
    if isinstance(scale, Node) or isinstance(zero, Node):
        return None
    low, high = p["quant_min"] - zero, p["quant_max"] - zero
    if isinstance(scale, Tensor):
        shape = [-1 if axis == p.get("axis", 0) else 1 for axis in range(len(node.shape))]
        shape = shape if scale.numel() > 1 else [1] * len(node.shape)
        scale, low, high = scale.reshape(shape), low.reshape(shape), high.reshape(shape)
        inverse = chain.constant("inverse", 1.0 / scale)
        scale = chain.constant("scale", scale)
        low, high = chain.constant("low", low.to(node.dtype)), chain.constant("high", high.to(node.dtype))
    else:
        inverse = float(1.0 / torch.tensor(scale, dtype=node.dtype))
        low, high = float(low), float(high)
    x = chain.add("mul", node.shape, "Tensor", self=p["self"], other=inverse)
    x = chain.add("quantized", node.shape, self=x, low=low, high=high)
    chain.nodes[-1] = replace(chain.nodes[-1], op="netweight.quantized", overload="")
    chain.add("mul", node.shape, "Tensor", self=x, other=scale)
    return chain.ended()


NATIVE = tuple(f"aten.fake_quantize_per_{what}_affine_cachemask" for what in ("tensor", "channel"))


def extremes(node: Node, draft: Draft) -> Found:
    """The values of max and min over an axis, and those of a native fake quantisation."""
    if node.params["index"] != 0:
        return None
    if draft.is_op(node.params["self"], *NATIVE):
        return fake_quantize(node, draft)
    made = draft.look(node.params["self"])
    if not draft.is_op(node.params["self"], "aten.max", "aten.min") or "dim" not in made.params:
        return None
    p, chain = made.params, Chain(node)
    chain.add(f"a{made.op[-3:]}", node.shape, self=p["self"], dim=[p["dim"]], keepdim=p["keepdim"])
    return chain.ended()


def piecewise(node: Node, draft: Draft) -> Found:
    """x where x > 0, else w x or a expm1(x / a)."""
    p = node.params
    condition, x, other = (draft.look(p[name]) for name in ("condition", "self", "other"))
    if not draft.is_op(p["condition"], "aten.gt") or condition.params["self"] != p["self"]:
        return None
    number = draft.look(condition.params["other"])
    if not isinstance(number, int | float) or number != 0 or not draft.is_op(p["other"], "aten.mul"):
        return None
    if not isinstance(x, Node) or x.shape != node.shape:
        return None
    chain, factors = Chain(node), [other.params["self"], other.params["other"]]
    for value, factor in (factors, factors[::-1]):
        found = draft.look(factor)
        if value == p["self"] and isinstance(found, Tensor):
            chain.add("_prelu_kernel", node.shape, self=p["self"], weight=factor)
            return chain.ended()
        if draft.is_op(value, "aten.expm1") and isinstance(found, int | float) and found > 0:
            inner = draft.look(draft.look(value).params["self"])
            if isinstance(inner, Node) and inner.op == "aten.div" and inner.params["self"] == p["self"]:
                if inner.params["other"] != found:
                    return None
                chain.add(
                    "elu",
                    node.shape,
                    self=p["self"],
                    alpha=float(found),
                    scale=1.0,
                    input_scale=1 / float(found),
                )
                return chain.ended()
    return None


def log_sigmoid(node: Node, draft: Draft) -> Found:
    """min(0, x) - log1p(exp(-|x|)) = -softplus(-x); a threshold of 40 is exact in float64."""
    p = node.params
    if p.get("alpha") != 1 or not draft.is_op(p["self"], "aten.minimum"):
        return None
    least, steps = draft.look(p["self"]).params, ["aten.log1p", "aten.exp", "aten.neg", "aten.abs"]
    x = least["other"] if isinstance(draft.look(least["self"]), Tensor) else least["self"]
    zero = draft.look(least["self"] if x == least["other"] else least["other"])
    value = p["other"]
    for op in steps:
        if not draft.is_op(value, op):
            return None
        value = draft.look(value).params["self"]
    if value != x or not isinstance(zero, Tensor) or bool((zero != 0).any()):
        return None
    chain = Chain(node)
    turned = chain.add("neg", node.shape, self=x)
    soft = chain.add("softplus", node.shape, self=turned, beta=1.0, threshold=40.0)
    chain.add("neg", node.shape, self=soft)
    return chain.ended()


def log_sum_exp(node: Node, draft: Draft) -> Found:
    """log sum exp(x - m) + m around the mean in place of the largest, m, which is not affine."""
    p = node.params
    if p.get("alpha") != 1 or not draft.is_op(p["self"], "aten.log"):
        return None
    total = draft.look(draft.look(p["self"]).params["self"])
    if (
        not isinstance(total, Node)
        or total.op != "aten.sum"
        or not draft.is_op(total.params["self"], "aten.exp")
    ):
        return None
    apart = draft.look(draft.look(total.params["self"]).params["self"])
    if not isinstance(apart, Node) or apart.op != "aten.sub":
        return None
    x, top = apart.params["self"], apart.params["other"]
    back = p["other"]
    if draft.is_op(back, "aten.squeeze"):
        back = draft.look(back).params["self"]
    if back != top or not draft.is_op(top, "aten.where") or not isinstance(draft.look(x), Node):
        return None
    most, dims, keep = (
        draft.look(draft.look(top).params["other"]),
        total.params["dim"],
        total.params["keepdim"],
    )
    if not isinstance(most, Node) or most.op != "aten.amax" or most.params["self"] != x:
        return None
    shape = draft.look(x).shape
    dims = sorted(d % len(shape) for d in dims)
    short = tuple(1 if d in dims else n for d, n in enumerate(shape))
    chain = Chain(replace(node, params={"self": x, "dim": dims, "keepdim": keep}))
    mean = chain.add("mean", short, "dim", self=x, dim=dims, keepdim=True, dtype=None)
    term = chain.add("exp", shape, self=chain.add("sub", shape, "Tensor", self=x, other=mean, alpha=1))
    total = chain.add("sum", node.shape, "dim_IntList", self=term, dim=dims, keepdim=keep, dtype=None)
    found = chain.add("log", node.shape, self=total)
    mean = mean if keep else chain.add("reshape", node.shape, self=mean, shape=list(node.shape))
    chain.add("add", node.shape, "Tensor", self=found, other=mean, alpha=1)
    return chain.rounded(like="logsumexp", shape=list(shape))


JOINED: Mapping[str, Callable[[Node, Draft], Found]] = {
    "aten.clamp": staircase,
    "getitem": extremes,
    "aten.where": piecewise,
    "aten.sub": log_sigmoid,
    "aten.add": log_sum_exp,
}
SPLIT = {op: lambda node, draft, chain=chain: chain(node, draft.look) for op, chain in CHAINS.items()}
