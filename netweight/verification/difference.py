"""How far two networks can part: bounds on compressed(s) - original(s) by propagating the difference.

    graph = joined(captured(original, x), captured(compressed, x))    # its output is their difference

Both networks start from the same s, so a value z of the original and its twin z' = z + d in the compressed
one move together; what is bounded is d, which is small, not z' and z, which are not. Where an operator of
the one answers to one of the other (the same operator on values that answer to each other):

    affine, W and V = W + dW       d_out = V d + dW z + db                exact
    ReLU and other kinks           d_out = f(z + d) - f(z) in [m d, M d], slopes m..M of f between z and z'
                                   below: the chord from (d_l, M d_l) to (d_u, m d_u), above: from
                                   (d_l, m d_l) to (d_u, M d_u); exact where z and z' lie on one piece
    anything else                  d_out = f(z + d) - f(z), each relaxed by itself

An operator that only the compressed network has (rounded activations) works on z' = z + d, and its result
minus z is the next difference. So pruning is V = W mask, and networks that nothing links still get a sound
bound, the one of a plain subtraction. Evaluation in floating point is covered by what each of the two loses
at each operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from netweight.core.errors import DoesNotFit
from netweight.core.graph import Graph, Node, Ref
from netweight.verification.backward import MOVED, SUMMED, is_affine
from netweight.verification.lines import Lines
from netweight.verification.products import through
from netweight.verification.relax import Interval

GAP, NOISE = "netweight.gap", "netweight.noise"
KINKS = ("aten.relu", "aten.leaky_relu", "aten.hardtanh", "aten.abs")
WEIGHTED = ("aten.linear", "aten.convolution")
PLAIN = MOVED | SUMMED | frozenset(["aten.neg", "aten._to_copy"])


@dataclass(eq=False)
class Joint:
    """The graph in the making. answers: for a value of the compressed network, the value of the original
    that it is a twin of. differences, values: the joint node that holds its difference to that, or itself,
    where there is one.
    """

    nodes: list[Node]
    constants: dict[str, Tensor]
    shapes: dict[str, Node]
    rounding: bool
    answers: dict[str, str] = field(default_factory=dict)
    differences: dict[str, str | None] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    def put(self, like: Node, name: str, op: str, overload: str, params: Mapping[str, Any]) -> str:
        """A new node with the shape of another."""
        refs = [v for value in params.values() for v in (value if isinstance(value, list) else [value])]
        inputs = tuple(ref.name for ref in refs if isinstance(ref, Ref))
        unique = f"{name}_{len(self.nodes)}"
        node = Node(unique, op, overload, inputs, params, like.shape, like.dtype, like.layer)
        self.nodes.append(node)
        self.shapes[unique] = node
        return unique

    def keep(self, name: str, tensor: Tensor) -> Ref:
        """A new constant."""
        unique = f"{name}_{len(self.constants)}"
        self.constants[unique] = tensor
        return Ref(unique)

    def plus(self, like: Node, first: str | None, second: str | None) -> str | None:
        """The sum of two values, None being 0."""
        if first is None or second is None:
            return first or second
        return self.put(like, "sum", "aten.add", "Tensor", _pair(first, second))

    def minus(self, like: Node, first: str, second: str) -> str:
        """The difference of two values."""
        return self.put(like, "apart", "aten.sub", "Tensor", _pair(first, second))

    def value(self, name: str) -> str:
        """The compressed network's value itself: z + d."""
        if name not in self.values:
            z = self.answers[name]
            self.values[name] = self.plus(self.shapes[z], z, self.differences[name]) or z
        return self.values[name]

    def difference(self, name: str) -> str | None:
        """The compressed network's value minus the one that it is a twin of; None where they are the same."""
        if name not in self.differences:
            z = self.answers[name]
            self.differences[name] = self.minus(self.shapes[z], self.values[name], z)
        return self.differences[name]


def _pair(first: str, second: str) -> dict[str, Any]:
    return {"self": Ref(first), "other": Ref(second), "alpha": 1}


def joined(original: Graph, compressed: Graph, *, twins: bool = True, rounding: bool = True) -> Graph:
    """One graph of both networks whose output is compressed(s) - original(s).

    twins: propagate differences; without, both networks stand side by side and only their outputs are
    subtracted. rounding: whether what evaluation in floating point loses is to be covered. Raises
    `DoesNotFit` unless inputs and outputs of both have the same shapes.
    """
    _alike(original, compressed)
    joint = Joint(
        list(original.nodes),
        dict(original.constants),
        {node.name: node for node in (*original.inputs, *original.nodes)},
        rounding,
    )
    for first, second in zip(original.inputs, compressed.inputs):
        joint.answers[second.name], joint.differences[second.name] = first.name, None
    renamed = {name: joint.keep(f"small_{name}", tensor) for name, tensor in compressed.constants.items()}
    waiting: dict[Any, list[Node]] = {}
    for node in original.nodes if twins else ():
        waiting.setdefault(_key(node, original, node.inputs), []).append(node)
    for node in compressed.nodes:
        _join(joint, original, compressed, node, renamed, waiting)
    last = compressed.outputs[0]
    if joint.answers.get(last) == original.outputs[0]:
        found = joint.difference(last)
        if found is None:  # nothing differs
            found = joint.minus(joint.shapes[original.outputs[0]], original.outputs[0], original.outputs[0])
    else:
        found = joint.minus(joint.shapes[original.outputs[0]], joint.value(last), original.outputs[0])
    return replace(original, nodes=tuple(joint.nodes), constants=joint.constants, outputs=(found,))


def _alike(original: Graph, compressed: Graph) -> None:
    def ends(graph: Graph) -> tuple[Any, ...]:
        shapes = {node.name: node.shape for node in (*graph.inputs, *graph.nodes)}
        return tuple(node.shape for node in graph.inputs), shapes[graph.outputs[0]]

    (first, out), (second, other) = ends(original), ends(compressed)
    if first != second or out != other:
        raise DoesNotFit(
            f"the networks map {first} to {out} and {second} to {other}; only networks with the same inputs "
            "and outputs can be compared"
        )


def _key(node: Node, graph: Graph, inputs: tuple[str, ...] | list[str]) -> Any:
    """What twins have in common: the operator, the shape of the result, and what they read."""
    return node.op, node.shape, tuple(name for name in inputs if name not in graph.constants)


def _join(
    joint: Joint,
    original: Graph,
    compressed: Graph,
    node: Node,
    renamed: Mapping[str, Ref],
    waiting: dict[Any, list[Node]],
) -> None:
    """One node of the compressed network."""
    read = [name for name in node.inputs if name not in compressed.constants]
    twin = None
    if all(name in joint.answers for name in read):
        key = _key(node, original, [joint.answers[name] for name in read])
        twins = waiting.get(key, [])
        twin = twins.pop(0) if twins else None
    if twin is not None:
        joint.answers[node.name] = twin.name
        found = _propagated(joint, original, node, twin, renamed)
        if found is not _ALONE:
            joint.differences[node.name] = found
            return
    params = _named(node.params, lambda name: renamed[name] if name in renamed else Ref(joint.value(name)))
    joint.values[node.name] = joint.put(node, node.name, node.op, node.overload, params)
    if twin is None and len(read) == 1 and read[0] in joint.answers:
        stands = joint.answers[read[0]]
        if joint.shapes[stands].shape == node.shape and node.dtype == joint.shapes[stands].dtype:
            joint.answers[node.name] = stands  # what rounds or scales a value stands for it


_ALONE = object()  # no rule for differences: the operator works on the value itself


def _named(value: Any, own: Any) -> Any:
    """Params with other names."""
    if isinstance(value, Ref):
        return own(value.name)
    if isinstance(value, Mapping):
        return {key: _named(v, own) for key, v in value.items()}
    return [_named(v, own) for v in value] if isinstance(value, list | tuple) else value


def _propagated(joint: Joint, original: Graph, node: Node, twin: Node, renamed: Mapping[str, Ref]) -> Any:
    """The difference after two operators that answer to each other; `_ALONE` where there is no rule."""
    read = [name for name in node.inputs if name not in renamed]
    fixed_alike = _same_constants(joint, node, twin, renamed)
    if node.op in KINKS and fixed_alike and len(read) == 1:
        d = joint.difference(read[0])
        params = {key: v for key, v in twin.params.items() if key != "self"}
        own = {"value": Ref(joint.answers[read[0]]), "difference": Ref(d or ""), "of": twin, **params}
        return None if d is None else joint.put(twin, "gap", GAP, "", own)
    if not is_affine(twin, lambda name: name not in original.constants) or len(node.shape) == 0:
        return _ALONE
    if node.op in WEIGHTED and len(read) == 1:
        found = _weighted(joint, node, twin, read[0], renamed)
    elif node.op in PLAIN and fixed_alike and len(read) == 1 and twin.dtype.is_floating_point:
        d = joint.difference(read[0])
        name = joint.answers[read[0]]
        params = _named(twin.params, lambda ref: Ref(d or "") if ref == name else Ref(ref))
        found = None if d is None else joint.put(twin, "moved", twin.op, twin.overload, params)
    elif node.op == "aten.add" and node.params["alpha"] == 1 and fixed_alike:
        parts = [joint.difference(name) for name in read]
        if any(d is not None and joint.shapes[d].shape != twin.shape for d in parts):
            return _ALONE
        found = parts[0] if len(parts) == 1 else joint.plus(twin, *parts)
    elif node.op in ("aten.sub", "aten.mul", "aten.div") and fixed_alike and len(read) == 1:
        d = joint.difference(read[0])
        if "self" not in twin.params or twin.params["self"] != Ref(joint.answers[read[0]]):
            return _ALONE
        scaled = node.op != "aten.sub"
        params = {**twin.params, "self": Ref(d or "")}
        found = d if not scaled or d is None else joint.put(twin, "scaled", twin.op, twin.overload, params)
    else:
        return _ALONE
    return _with_noise(joint, node, twin, renamed, found)


def _same_constants(joint: Joint, node: Node, twin: Node, renamed: Mapping[str, Ref]) -> bool:
    """Whether both operators have the same numbers and constant tensors."""

    def told(value: Any, small: bool) -> Any:
        if isinstance(value, Ref):
            if small:
                return renamed.get(value.name)
            return value if value.name in joint.constants else None
        return [told(v, small) for v in value] if isinstance(value, list | tuple) else value

    for key in node.params.keys() | twin.params.keys():
        a, b = told(node.params.get(key), True), told(twin.params.get(key), False)
        if isinstance(a, Ref) and isinstance(b, Ref):
            first, second = joint.constants[a.name], joint.constants[b.name]
            if first.shape != second.shape or not torch.equal(first, second):
                return False
        elif a != b:
            return False
    return True


def _weighted(joint: Joint, node: Node, twin: Node, read: str, renamed: Mapping[str, Ref]) -> str | None:
    """V d + dW z + db."""
    d, z = joint.difference(read), joint.answers[read]
    small, large = renamed[node.params["weight"].name], twin.params["weight"]
    change = joint.constants[small.name].double() - joint.constants[large.name].double()
    biases = [
        None if ref is None else joint.constants[ref.name].double()
        for ref in (node.params["bias"] and renamed[node.params["bias"].name], twin.params["bias"])
    ]
    shift = None
    if any(bias is not None for bias in biases):
        shift = sum(bias * sign for bias, sign in zip(biases, (1, -1)) if bias is not None)
    parts: list[str | None] = [None, None]
    if d is not None:
        params = {**twin.params, "input": Ref(d), "weight": small, "bias": None}
        parts[0] = joint.put(twin, "passed", twin.op, twin.overload, params)
    if bool(change.any()) or (shift is not None and bool(shift.any())):
        params = {**twin.params, "input": Ref(z), "weight": joint.keep("change", change), "bias": None}
        if shift is not None:
            params["bias"] = joint.keep("shift", shift)
        parts[1] = joint.put(twin, "changed", twin.op, twin.overload, params)
    return joint.plus(twin, *parts)


def _with_noise(
    joint: Joint, node: Node, twin: Node, renamed: Mapping[str, Ref], found: str | None
) -> str | None:
    """The difference with what each of the two evaluations loses at this operator."""
    if not joint.rounding or found is None or twin.op in MOVED or twin.op in ("aten.neg", "aten._to_copy"):
        return found
    params = _named(node.params, lambda name: renamed[name] if name in renamed else Ref(joint.value(name)))
    for own in (twin.params, params):
        noise = joint.put(twin, "noise", NOISE, "", {**own, "of": twin})
        found = joint.plus(twin, found, noise)
    return found


# The rules of its two operators --------------------------------------------------------------------------


def slopes(node: Node, p: Mapping[str, Any], lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest slope of a function with kinks on [lower, upper]."""
    if node.op == "aten.hardtanh":
        inside = (lower < p["max_val"]) & (upper > p["min_val"])
        within = (lower >= p["min_val"]) & (upper <= p["max_val"])
        return within.to(lower.dtype), inside.to(lower.dtype)
    left = {"aten.relu": 0.0, "aten.abs": -1.0}.get(node.op)
    left = float(p["negative_slope"]) if left is None else left
    one = torch.ones_like(lower)
    at_left, at_right = torch.where(lower < 0, left * one, one), torch.where(upper > 0, one, left * one)
    return torch.minimum(at_left, at_right), torch.maximum(at_left, at_right)


def _slopes_between(node: Node, p: Mapping[str, Any]) -> tuple[Interval, Tensor, Tensor]:
    """(d, least, largest slope) between z and z + d."""
    z, d = p["value"], p["difference"]
    lower = torch.minimum(z.lower, z.lower + d.lower)
    upper = torch.maximum(z.upper, z.upper + d.upper)
    step = 4 * torch.finfo(lower.dtype).eps * torch.maximum(z.size, d.size)
    return d, *slopes(p["of"], p, lower - step, upper + step)


def open_between(node: Node, p: Mapping[str, Any]) -> Tensor:
    """Where f has several slopes between z and z + d, so that the bounds of d matter."""
    _, least, most = _slopes_between(node, p)
    return least < most


def gap(node: Node, p: Mapping[str, Any], unit: float) -> Interval:
    """f(z + d) - f(z): between its slopes times d."""
    d, least, most = _slopes_between(node, p)
    ends = [d.lower * least, d.lower * most, d.upper * least, d.upper * most]
    lower, upper = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
    slack = 4 * (unit + torch.finfo(lower.dtype).eps) * torch.maximum(lower.abs(), upper.abs())
    return Interval(lower - slack, upper + slack)


def gap_rows(node: Node, a: Tensor, p: Mapping[str, Any], alpha: Any = None) -> tuple[dict[str, Tensor], Any]:
    """Rows of f(z + d) - f(z) as rows of d: chords of the slopes."""
    d, least, most = _slopes_between(node, p)
    crosses = (d.lower < 0) & (d.upper > 0)
    width = torch.where(crosses, d.upper - d.lower, 1.0)
    # one sign of d: between the two lines through 0; else chords, which are equal to them at both ends
    low = torch.where(
        d.lower >= 0, least, torch.where(d.upper <= 0, most, (d.upper * least - d.lower * most) / width)
    )
    high = torch.where(
        d.lower >= 0, most, torch.where(d.upper <= 0, least, (d.upper * most - d.lower * least) / width)
    )
    under = torch.where(crosses, d.upper * (least - low), 0.0)
    over = torch.where(crosses, d.upper * (most - high), 0.0)
    found, bias = through(a, Lines(low, under, high, over))
    return {"difference": found}, bias


INTERVALS = {GAP: gap}
RULES = {GAP: gap_rows}
