"""What each operator of the graph becomes among integers: one rule per operator, looked up by its name.

A rule takes the draft and the node and gives its value (several, where the operator has several results).
What has no rule is refused, naming operator and layer: softmax, norms, GELU and products of two values have
no exact form in multiplications, additions and shifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from netweight.core.graph import Node, Ref
from netweight.deployment.integer_draft import Draft, Layer, Value, constant, refuse, source
from netweight.deployment.integer_moves import MOVED
from netweight.nn.dyadic import INT32
from netweight.nn.integer_steps import Clip, Join, Negate, Pool, Product, outputs

Rule = Callable[[Draft, Node], Value | list[Value]]
BIAS = 2.0**30  # a larger one makes its row coarser


# Layers --------------------------------------------------------------------------------------------------


def product(draft: Draft, node: Node) -> Value:
    """Linear and convolutions: acc = W q + bias on the grid of their input."""
    layer, given = layer_of(draft, node), node.params["bias"]
    bias = None if given is None else constant(draft, given)
    if node.op == "aten.convolution" and node.params["transposed"]:
        raise refuse(node, "a transposed convolution has no integer form here; leave it out of the network")
    rounding, name = layer.rounding, node.layer.removesuffix(".layer")
    zero, step = int(rounding.zero), float(rounding.scale)
    low, high = -zero, 2**rounding.bits - 1 - zero
    q = draft.on_grid(source(draft, node, "input"), step, low, high, f"{name}.input")
    weight, scale, shift = with_bias(layer, bias, step)
    kind = torch.int8 if bool((weight.abs() < 128).all()) else torch.int16
    settings = {}
    if node.op == "aten.convolution":
        settings = {key: tuple(node.params[key]) for key in ("stride", "padding", "dilation")}
        settings["groups"] = node.params["groups"]
    made = Product(weight.to(kind), shift.to(torch.int32), **settings)
    axes = [-1 if axis == (1 if settings else len(node.shape) - 1) else 1 for axis in range(len(node.shape))]
    return draft.emit(name, made, [q], (scale * step).reshape(axes))


def layer_of(draft: Draft, node: Node) -> Layer:
    """The packed layer that the node is the whole of."""
    path, weight = node.layer.removesuffix(".layer"), node.params["weight"]
    of = draft.graph.sources.get(weight.name, "") if isinstance(weight, Ref) else ""
    if path not in draft.layers or of not in (f"{path}.weight", f"{path}.layer.weight"):
        raise refuse(node, f"{node.op} with a weight that is not packed; compress that layer too")
    return draft.layers[path]


def with_bias(layer: Layer, bias: Tensor | None, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, row scales, and the bias in units of S_w S_x; a row whose bias is too large is coarser."""
    weight, scale = layer.weight, layer.scale
    if bias is None:
        return weight, scale, torch.zeros(len(weight), dtype=torch.int64)
    needed = bias.abs() / (BIAS * step)
    coarse = torch.where(needed > scale, needed, scale)
    shrunk = (weight * (scale / coarse).reshape(-1, *[1] * (weight.ndim - 1))).round().to(weight.dtype)
    weight = torch.where((coarse > scale).reshape(-1, *[1] * (weight.ndim - 1)), shrunk, weight)
    return weight, coarse, (bias / (coarse * step)).round().to(torch.int64)


# Elementwise ---------------------------------------------------------------------------------------------


def clipped(low: str | float | None, high: str | float | None) -> Rule:
    """max and min with plain numbers, by the names of their params (or the number itself)."""

    def rule(draft: Draft, node: Node) -> Value:
        value = draft.integer(source(draft, node, "self"), node)
        ends: list[Tensor | None] = []
        for given in (low, high):
            number = node.params.get(given) if isinstance(given, str) else given
            if isinstance(number, Ref):
                raise refuse(node, f"{node.op} with an end that is no number has no integer form")
            whole = None if number is None else (float(number) / value.scale).round().clamp(*INT32)
            ends.append(None if whole is None else whole.to(torch.int32))
        return draft.emit(node.name, Clip(*ends), [value], value.scale)

    return rule


def added(sign: int) -> Rule:
    """a + alpha b, or a - alpha b: a shift of real values, or a join of integers."""

    def rule(draft: Draft, node: Node) -> Value:
        alpha = sign * float(node.params.get("alpha", 1))
        parts = [node.params["self"], node.params["other"]]
        left, right = (constant(draft, part) for part in parts)
        if left is not None or right is not None:
            value = draft.look(parts[0 if left is None else 1])
            if not isinstance(value, Value) or not value.real:
                raise refuse(node, "a constant that is added has no integer form; fold it into a bias")
            if right is not None:
                return replace(value, offset=value.offset + right * alpha)
            return replace(value, scale=value.scale * alpha, offset=value.offset * alpha + left)
        first, second = source(draft, node, "self"), source(draft, node, "other")
        if first.reach.shape != second.reach.shape:
            raise refuse(node, "values of two shapes are added; expand the smaller one first")
        branches = [first, scaled_by(draft, second, alpha, node)]
        branches, scale = draft.joined(branches, draft.sizes[node.name], node)
        return draft.emit(node.name, Join(), branches, scale)

    return rule


def scaled_by(draft: Draft, value: Value, factor: float, node: Node) -> Value:
    """factor times the value: another scale, and for a negative factor another sign."""
    if factor == 1:
        return value
    if value.real:
        return replace(value, scale=value.scale * factor, offset=value.offset * factor)
    if factor == 0:
        raise refuse(node, "a factor of 0 has no scale; take that branch out")
    step = Negate() if factor < 0 else Clip()
    made = draft.emit(f"{node.name}.scaled", step, [value], value.scale * abs(factor))
    return replace(made, size=value.size * abs(factor))


def times(draft: Draft, node: Node) -> Value:
    """A product or quotient with a constant: part of the scale."""
    parts = [node.params["self"], node.params["other"]]
    left, right = (constant(draft, part) for part in parts)
    by = left if right is None else right
    if (
        by is None
        or node.params.get("rounding_mode") is not None
        or (node.op == "aten.div" and right is None)
    ):
        raise refuse(node, f"{node.op} by a value has no integer form here; leave that layer as it is")
    by = 1.0 / by if node.op == "aten.div" else by
    value = draft.look(parts[0 if left is None else 1])
    if not isinstance(value, Value):
        raise refuse(node, f"{node.op} of several results has no integer form")
    if value.real:
        return replace(value, scale=value.scale * by, offset=value.offset * by)
    if by.numel() == 1:
        return scaled_by(draft, value, float(by), node)
    if not bool((by > 0).all()):
        raise refuse(node, "factors per channel that are not positive have no integer form; fold them")
    return draft.emit(node.name, Clip(), [value], value.scale * by)


def negated(draft: Draft, node: Node) -> Value:
    """-x."""
    return scaled_by(draft, source(draft, node, "self"), -1.0, node)


def same(draft: Draft, node: Node) -> Value:
    """Another floating-point type: integers have none."""
    if not node.dtype.is_floating_point:
        raise refuse(node, f"a conversion to {node.dtype} has no integer form")
    return source(draft, node, "self")


# Pools ---------------------------------------------------------------------------------------------------


def pooled(of: str) -> Rule:
    """max_poolNd and avg_poolNd."""

    def rule(draft: Draft, node: Node) -> Value:
        p, count = node.params, int(node.op[-2])
        by = {
            key: tuple((list(p.get(name) or default) * count)[:count])
            for key, name, default in (
                ("kernel", "kernel_size", ()), ("stride", "stride", p["kernel_size"]),
                ("padding", "padding", [0]), ("dilation", "dilation", [1]),
            )
        }  # fmt: skip
        if any(by["padding"]) and p.get("count_include_pad") is False:
            raise refuse(node, "an average without its padding has no one divisor; set count_include_pad")
        value = source(draft, node, "self")
        sizes = value.reach.shape[-count:]
        axes = zip(sizes, *(by[key] for key in ("kernel", "stride", "padding", "dilation")))
        if tuple(outputs(*axis) for axis in axes) != tuple(node.shape[-count:]):
            raise refuse(
                node, "windows that reach over the edge (ceil_mode) have no one divisor; pad instead"
            )
        divisor = p.get("divisor_override") or math.prod(by["kernel"])
        return pool(draft, node, Pool(of, **by), range(-count, 0), divisor)

    return rule


def adaptive(draft: Draft, node: Node) -> Value:
    """adaptive_avg_poolNd whose windows are all alike."""
    value, out = source(draft, node, "self"), list(node.params["output_size"])
    sizes = value.reach.shape[-len(out) :]
    if any(size % n for size, n in zip(sizes, out)):
        raise refuse(
            node, f"windows of {tuple(sizes)} to {tuple(out)} are not all alike; use sizes that divide"
        )
    kernel = tuple(size // n for size, n in zip(sizes, out))
    rest = {"padding": (0,) * len(out), "dilation": (1,) * len(out)}
    step = Pool("sum", kernel=kernel, stride=kernel, **rest)
    if all(n == 1 for n in out):
        step = Pool("sum", tuple(range(len(node.shape) - len(out), len(node.shape))), True)
    return pool(draft, node, step, range(-len(out), 0), math.prod(kernel))


def over_axes(of: str) -> Rule:
    """mean, sum and amax over whole axes."""

    def rule(draft: Draft, node: Node) -> Value:
        value, dim = source(draft, node, "self"), node.params.get("dim")
        ndim = len(value.reach.shape) + 1
        axes = tuple(sorted(d % ndim for d in ([dim] if isinstance(dim, int) else dim or range(ndim))))
        if 0 in axes:
            raise refuse(node, f"{node.op} over the examples themselves; name the other axes")
        count = math.prod(value.reach.shape[axis - 1] for axis in axes)
        divisor = count if node.op == "aten.mean" else 1
        step = Pool(of, axes, bool(node.params.get("keepdim", False)))
        return pool(draft, node, step, axes, divisor)

    return rule


def pool(draft: Draft, node: Node, step: Pool, axes: Sequence[int], divisor: float) -> Value:
    """A pool of integers on one scale along `axes`; its sum worth 1 / divisor of theirs."""
    value = draft.common(source(draft, node, "self"), axes, node)
    if step.of == "max":
        scale = value.scale
    else:
        window = math.prod(step.kernel) or 1
        count = window if step.kernel else math.prod(value.reach.shape[axis - 1] for axis in step.axes)
        if not draft.fits(value, count):
            value = draft.joined([value], 0.0, node)[0][0]
        scale = value.scale / divisor
    if step.axes and not step.keep:
        scale = scale.squeeze(step.axes)
    return draft.emit(node.name, step, [value], scale)


def no_rule(draft: Draft, node: Node) -> Value:
    """Anything else."""
    hint = "; fold it into the layer before it" if "norm" in node.op else "; leave that network in float"
    raise refuse(
        node, f"the operator {node.op} has no form in integer multiplication, addition and shift{hint}"
    )


RULES: Mapping[str, Rule] = {
    "aten.linear": product,
    "aten.convolution": product,
    "aten.relu": clipped(0.0, None),
    "aten.hardtanh": clipped("min_val", "max_val"),
    "aten.clamp": clipped("min", "max"),
    "aten.clamp_min": clipped("min", None),
    "aten.clamp_max": clipped(None, "max"),
    "aten.add": added(1),
    "aten.sub": added(-1),
    "aten.mul": times,
    "aten.div": times,
    "aten.neg": negated,
    "aten._to_copy": same,
    **{f"aten.max_pool{n}d": pooled("max") for n in (1, 2, 3)},
    **{f"aten.avg_pool{n}d": pooled("sum") for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d": adaptive for n in (1, 2, 3)},
    "aten.mean": over_axes("sum"),
    "aten.sum": over_axes("sum"),
    "aten.amax": over_axes("max"),
    **MOVED,
}
