"""What each operator of the graph does to intervals: one rule per operator, looked up by its name.

A rule takes the node, its params (with an `Interval` for what depends on the input, float64 tensors for what
does not) and the unit roundoff of the network, and gives an interval; `relax` says what it covers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from netweight.core.errors import DoesNotFit
from netweight.core.graph import Node, call
from netweight.verification import norm_rules, relax
from netweight.verification.relax import ELEMENTARY, Interval, interval, widened

Params = Mapping[str, Any]
Rule = Callable[[Node, Params, float], Any]  # (node, params, unit roundoff) -> Interval or tuple of them


# Operators that rise in every argument: data movement, pools, monotone functions -------------------------


def side(params: Any, name: str) -> Any:
    """Params with one side of every Interval."""
    if isinstance(params, Interval):
        return getattr(params, name)
    if isinstance(params, Mapping):
        return {key: side(value, name) for key, value in params.items()}
    return [side(value, name) for value in params] if isinstance(params, list) else params


def exact(node: Node, p: Params, unit: float) -> Any:
    """Operators that rise in every argument and do not round."""
    lower, upper = call(node, side(p, "lower")), call(node, side(p, "upper"))
    if isinstance(lower, Tensor):
        return Interval(lower, upper)
    return tuple(Interval(a, b) if a.dtype == lower[0].dtype else None for a, b in zip(lower, upper))


def limited(node: Node, p: Params, unit: float) -> Interval:
    """Operators that rise and bring in a plain number, which is rounded to the precision of the network."""
    found = exact(node, p, unit)
    return widened(found.lower, found.upper, found.size, 1, unit)


def rising(node: Node, p: Params, unit: float) -> Interval:
    """Rising elementary functions."""
    if p.get("alpha", 1) < 0 or p.get("beta", 1) < 0:
        raise DoesNotFit(
            f"{node.name}: no bounds are known for {node.op} with a negative factor; use a positive"
        )
    found = exact(node, p, unit)
    return widened(found.lower, found.upper, found.size, ELEMENTARY, unit)


def softplus(node: Node, p: Params, unit: float) -> Interval:
    """Rises, but for a step down at the threshold, from where on torch takes x itself."""
    found, step = rising(node, p, unit), math.log1p(math.exp(-p["threshold"])) / p["beta"]
    return Interval(found.lower - step, found.upper + step)


def summed(node: Node, p: Params, unit: float) -> Interval:
    """Sums and averages with weights that are not negative."""
    name = next(key for key, value in p.items() if isinstance(value, Interval))
    p = {**p, "dtype": None} if "dtype" in p else p
    x, found = p[name], exact(node, p, unit)
    terms = 16 * -(-x.lower.numel() // max(1, found.lower.numel())) + 64
    if "kernel_size" in p:
        terms += math.prod(p["kernel_size"])
    if node.op == "aten.cumsum":
        terms += x.lower.shape[p["dim"]]
    return widened(found.lower, found.upper, call(node, {**p, name: x.size}), terms, unit)


def kinked(node: Node, p: Params, unit: float) -> Interval:
    """leaky_relu and prelu: linear on both sides of 0, with any slopes."""
    x, found = p["self"], exact(node, p, unit)
    through = (x.lower < 0) & (x.upper > 0)
    lower, upper = torch.minimum(found.lower, found.upper), torch.maximum(found.lower, found.upper)
    lower = torch.where(through, lower.clamp(max=0), lower)
    upper = torch.where(through, upper.clamp(min=0), upper)
    return widened(lower, upper, Interval(lower, upper).size, 2, unit)


def valley(bottom: float) -> Rule:
    """A function that falls until about `bottom` and rises from there."""

    def rule(node: Node, p: Params, unit: float) -> Interval:
        x, ends = p["self"], exact(node, p, unit)
        lowest = torch.full_like(x.lower, bottom).clamp(x.lower, x.upper)
        lower, upper = call(node, {**p, "self": lowest}), torch.maximum(ends.lower, ends.upper)
        lower = torch.minimum(lower, torch.minimum(ends.lower, ends.upper))
        return widened(lower, upper, x.size + Interval(lower, upper).size, ELEMENTARY, unit)

    return rule


def gelu(node: Node, p: Params, unit: float) -> Interval:
    """x Phi(x), or its form with tanh; each falls until a point of its own."""
    return valley(-0.7517916243 if p["approximate"] == "none" else -0.7524614220)(node, p, unit)


# Affine operators and products ---------------------------------------------------------------------------


def fixed(node: Node, p: Params, name: str) -> Any:
    """A param that may not depend on the input."""
    if isinstance(p[name], Interval):
        raise DoesNotFit(
            f"{node.name}: no bounds are known for {node.op} whose {name} depends on the input; use matmul"
        )
    return p[name]


def linear(node: Node, p: Params, unit: float) -> Interval:
    """x W^T + b."""
    weight = fixed(node, p, "weight")

    def by(x: Tensor, absolute: bool) -> Tensor:
        return torch.nn.functional.linear(x, weight.abs() if absolute else weight)

    return relax.affine(p["input"], by, fixed(node, p, "bias"), weight.shape[1] + 2, unit)


def convolution(node: Node, p: Params, unit: float) -> Interval:
    """Any convolution, transposed ones too."""
    weight, bias = fixed(node, p, "weight"), fixed(node, p, "bias")
    bias = None if bias is None else bias.reshape(-1, *[1] * (weight.ndim - 2))

    def by(x: Tensor, absolute: bool) -> Tensor:
        return call(node, {**p, "input": x, "weight": weight.abs() if absolute else weight, "bias": None})

    return relax.affine(p["input"], by, bias, weight.numel() // min(weight.shape[:2]) + 2, unit)


def matmul(node: Node, p: Params, unit: float) -> Interval:
    """A product of two matrices or vectors, intervals or not."""
    a, b = interval(p["self"]), interval(p.get("other", p.get("mat2")))
    if a.lower.ndim > 1 and b.lower.ndim > 1:
        return relax.multiplied(a, b, unit)
    left = a if a.lower.ndim > 1 else Interval(a.lower[None], a.upper[None])
    right = b if b.lower.ndim > 1 else Interval(b.lower[:, None], b.upper[:, None])
    found = relax.multiplied(left, right, unit)
    return Interval(found.lower.reshape(node.shape), found.upper.reshape(node.shape))


def with_summand(first: str, second: str) -> Rule:
    """beta self + alpha (first second)."""

    def rule(node: Node, p: Params, unit: float) -> Interval:
        found = relax.multiplied(interval(p[first]), interval(p[second]), unit)
        return relax.added(
            relax.times(p["self"], float(p["beta"]), unit), relax.times(found, float(p["alpha"]), unit), unit
        )

    return rule


def batch_norm(node: Node, p: Params, unit: float) -> Interval:
    """(x - mean) w / sqrt(var + eps) + b with stored statistics."""
    x = p["input"]

    def channel(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (x.lower.ndim - 2))

    mean, var = channel(p["running_mean"]), channel(p["running_var"])
    slope = (var + p["eps"]).rsqrt() * (1.0 if p["weight"] is None else channel(p["weight"]))
    shift = torch.zeros_like(mean) if p["bias"] is None else channel(p["bias"])
    ends = [slope * (x.lower - mean) + shift, slope * (x.upper - mean) + shift]
    size = slope.abs() * (x.size + mean.abs()) + shift.abs()
    return widened(torch.minimum(*ends), torch.maximum(*ends), size, ELEMENTARY, unit)


# Single operators ----------------------------------------------------------------------------------------


def largest(node: Node, p: Params, unit: float) -> Any:
    """topk: the i-th largest of what rises, rises."""
    if not p["sorted"]:
        raise DoesNotFit(f"{node.name}: a topk that is not sorted may give any order; use sorted=True")
    return exact(node, p, unit)


def item(node: Node, p: Params, unit: float) -> Interval:
    """One of several results."""
    found = p["self"][p["index"]]
    if found is None:
        raise DoesNotFit(f"{node.name}: no bounds are known for places of extremes; use their values alone")
    return found


def known(node: Node, p: Params, unit: float) -> Interval:
    """Rows of a table, for indices that cannot change."""
    indices = [value for value in _flat(p.values()) if isinstance(value, Interval) and not _is_real(value)]
    if any(not torch.equal(value.lower, value.upper) for value in indices):
        raise DoesNotFit(
            f"{node.name}: the indices of {node.op} are perturbed; perturb the embedding instead"
        )
    return exact(node, p, unit)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else [value]


def _is_real(value: Interval) -> bool:
    return value.lower.is_floating_point()


def converted(node: Node, p: Params, unit: float) -> Interval:
    """Another dtype: floating point stays float64 here, whole numbers and truth become it."""
    x = p["self"]
    if not node.dtype.is_floating_point:
        if _is_real(x):
            raise DoesNotFit(
                f"{node.name}: no bounds are known for a conversion to {node.dtype}; keep it floating point"
            )
        return exact(node, p, unit)
    return widened(x.lower.double(), x.upper.double(), x.size.double(), 1, unit)


def truth(node: Node, p: Params, unit: float) -> Interval:
    """and, or, not, any, all of truth values."""
    if any(x.lower.dtype != torch.bool for x in p.values() if isinstance(x, Interval)):
        raise DoesNotFit(
            f"{node.name}: no bounds are known for {node.op} of numbers; compare them with 0 first"
        )
    return relax.no(p["self"]) if node.op.endswith("_not") else exact(node, p, unit)


def plus(sign: int) -> Rule:
    """a + alpha b, or a - alpha b."""

    def rule(node: Node, p: Params, unit: float) -> Interval:
        other = p["other"] if p["alpha"] == 1 else relax.times(p["other"], float(p["alpha"]), unit)
        return relax.added(p["self"], other if sign > 0 else relax.negated(other), unit)

    return rule


def power(node: Node, p: Params, unit: float) -> Interval:
    """x to a fixed number."""
    exponent = p["exponent"]
    if isinstance(exponent, Interval | Tensor) or isinstance(p["self"], int | float):
        raise DoesNotFit(
            f"{node.name}: no bounds are known for a power that is not one fixed number; use exp and log"
        )
    return relax.powered(p["self"], float(exponent), unit)


def quotient(node: Node, p: Params, unit: float) -> Interval:
    """a / b."""
    if p.get("rounding_mode") is not None:
        raise DoesNotFit(
            f"{node.name}: no bounds are known for a division that rounds; divide and round apart"
        )
    return relax.divided(p["self"], p["other"], unit)


def rule_of(node: Node) -> Rule:
    """The rule of the node's operator; `DoesNotFit` where there is none."""
    rule = RULES.get(node.op)
    if rule is None:
        where = f" (in layer {node.layer})" if node.layer else ""
        raise DoesNotFit(
            f"{node.name}{where}: no bounds are known for the operator {node.op}; replace it by one that is"
        )
    return rule


# fmt: off
EXACT = [
    "relu", "maximum", "minimum", "max_pool1d",
    "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "amax", "amin", "max", "min", "sign", "round",
    "floor", "ceil", "trunc", "reshape", "permute",
    "transpose", "t", "expand", "unsqueeze", "squeeze", "select", "slice", "cat", "stack", "flip",
    "roll", "repeat", "reflection_pad1d", "reflection_pad2d", "replication_pad2d",
    "split_with_sizes", "unbind", "tril", "triu", "diagonal", "slice_scatter", "select_scatter",
    "pixel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "unfold", "im2col", "sort",
]
TRUTH = ["logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "any", "all"]
LIMITED = ["hardtanh", "clamp", "clamp_min", "clamp_max", "constant_pad_nd"]
RISING = [
    "sigmoid", "tanh", "exp", "expm1", "log", "log1p", "log2", "log10", "elu",
    "hardsigmoid", "erf", "atan", "asinh", "sinh",
]
SUMMED = [
    "sum", "mean", "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_bilinear2d", "upsample_linear1d",
]
# fmt: on

RULES: Mapping[str, Rule] = {
    **{f"aten.{name}": exact for name in EXACT},
    **{f"aten.{name}": rising for name in RISING},
    **{f"aten.{name}": summed for name in SUMMED},
    **{f"aten.{name}": truth for name in TRUTH},
    **{f"aten.{name}": limited for name in LIMITED},
    **{f"aten.{name}": known for name in ("embedding", "gather", "index", "index_select")},
    "getitem": item,
    "aten._to_copy": converted,
    "aten.leaky_relu": kinked,
    "aten.prelu": kinked,
    "aten._prelu_kernel": kinked,
    "aten.silu": valley(-1.2784645427),
    "aten.softplus": softplus,
    "aten.topk": largest,
    "aten.mish": valley(-1.1924312145),
    "aten.hardswish": valley(-1.5),
    "aten.gelu": gelu,
    "aten.linear": linear,
    "aten.convolution": convolution,
    "aten.matmul": matmul,
    "aten.mm": matmul,
    "aten.bmm": matmul,
    "aten.addmm": with_summand("mat1", "mat2"),
    "aten.baddbmm": with_summand("batch1", "batch2"),
    "aten._native_batch_norm_legit_no_training": batch_norm,
    "aten.layer_norm": norm_rules.layer_norm,
    "aten.rms_norm": norm_rules.layer_norm,
    "aten.group_norm": norm_rules.group_norm,
    "aten.instance_norm": norm_rules.group_norm,
    "aten.var": norm_rules.variance,
    "aten.linalg_vector_norm": norm_rules.norm,
    "aten.softmax": lambda node, p, unit: relax.softmax(p["self"], p["dim"], unit),
    "aten.log_softmax": lambda node, p, unit: relax.log_softmax(p["self"], p["dim"], unit),
    "aten.add": plus(1),
    "aten.sub": plus(-1),
    "aten.rsub": lambda node, p, unit: relax.added(p["other"], relax.negated(p["self"]), unit),
    "aten.mul": lambda node, p, unit: relax.times(p["self"], p["other"], unit),
    "aten.div": quotient,
    "aten.reciprocal": lambda node, p, unit: relax.divided(1.0, p["self"], unit),
    "aten.neg": lambda node, p, unit: relax.negated(p["self"]),
    "aten.abs": lambda node, p, unit: relax.absolute(p["self"]),
    "aten.pow": power,
    "aten.square": lambda node, p, unit: relax.powered(p["self"], 2, unit),
    "aten.sqrt": lambda node, p, unit: relax.powered(p["self"], 0.5, unit),
    "aten.rsqrt": lambda node, p, unit: relax.powered(p["self"], -0.5, unit),
    "aten.sin": lambda node, p, unit: relax.wave(p["self"], math.pi / 2, torch.sin, unit),
    "aten.cos": lambda node, p, unit: relax.wave(p["self"], 0.0, torch.cos, unit),
    "aten.gt": lambda node, p, unit: relax.above(p["self"], p["other"], True, unit),
    "aten.ge": lambda node, p, unit: relax.above(p["self"], p["other"], False, unit),
    "aten.lt": lambda node, p, unit: relax.above(p["other"], p["self"], True, unit),
    "aten.le": lambda node, p, unit: relax.above(p["other"], p["self"], False, unit),
    "aten.eq": lambda node, p, unit: relax.equal(p["self"], p["other"], unit),
    "aten.ne": lambda node, p, unit: relax.no(relax.equal(p["self"], p["other"], unit)),
    "aten.where": lambda node, p, unit: relax.chosen(p["condition"], p["self"], p["other"]),
}
