"""The operators that a certificate can be re-checked on, each in the plainest form that is sound.

    affine   v = sum of linear maps of what moves + offset; transposed by automatic differentiation
    scalar   relu, leaky_relu, sigmoid, tanh: between two lines
    cut      maxima and clamps, which rise with what they read and round nothing: their interval is used

Everything is float64 and about one example. Nothing of the engine is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netweight.core.errors import DoesNotFit
from netweight.core.graph import Graph, Node, Ref, call

# fmt: off
VIEWS = frozenset(f"aten.{name}" for name in [
    "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select", "cat", "flip",
])
SUMS = frozenset(f"aten.{name}" for name in [
    "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
])
CUTS = frozenset(f"aten.{name}" for name in [
    "max_pool1d", "max_pool2d", "max_pool3d", "amax", "clamp", "hardtanh",
])
SCALARS = frozenset(["aten.relu", "aten.leaky_relu", "aten.sigmoid", "aten.tanh"])
# fmt: on
SIGNS = frozenset(["aten.relu", "aten.leaky_relu"])  # linear once the sign is known
ELEMENTARY = 16  # units in which sigmoid and tanh are right
FINE = 2.0**-44  # more than float64 loses where a line is drawn, relative
Values = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Affine:
    """by(*moving) + offset, the offset of |summands| up to `heavy`.

    size: `by` with absolute coefficients. terms: how many roundings of the network meet in one element, 0 for
    what only moves numbers about.
    """

    by: Callable[..., Tensor]
    size: Callable[..., Tensor]
    terms: int
    offset: Tensor | float = 0.0
    heavy: Tensor | float = 0.0


@dataclass(frozen=True, eq=False)
class Step:
    """One operator: the values that it reads and that move; its linear maps where it is affine."""

    node: Node
    moving: tuple[str, ...]
    affine: Affine | None = None


def step(graph: Graph, node: Node, constants: Values) -> Step:
    """How one operator is bounded; raises `DoesNotFit` for one that cannot be re-checked."""
    moving = tuple(name for name in node.inputs if name not in constants)
    if node.dtype.is_floating_point and node.params.get("dtype") is None:
        if node.op in SCALARS | CUTS and len(moving) == 1 and _single(node):
            return Step(node, moving)
        shapes = {each.name: each.shape for each in (*graph.inputs, *graph.nodes)}
        found = affine(node, constants, moving, sum(math.prod(shapes[name]) for name in moving))
        if found is not None:
            return Step(node, moving, found)
    raise DoesNotFit(
        f"a certificate of this network cannot be re-checked: {node.op} in {node.name}; "
        "the checker knows linear layers, convolutions, norms with fixed statistics, pools, views, sums, "
        "relu, leaky_relu, sigmoid and tanh"
    )


def _single(node: Node) -> bool:
    """Whether what the operator does rises with what it reads, in the way that is written out here."""
    if node.op == "aten.leaky_relu":
        return 0 <= node.params["negative_slope"] <= 1
    numbers = [value for key, value in node.params.items() if key in ("min", "max", "min_val", "max_val")]
    return not any(isinstance(value, Ref) for value in numbers)


def affine(node: Node, constants: Values, moving: tuple[str, ...], elements: int) -> Affine | None:
    """The linear maps of an affine operator that reads so many moving elements, None for any other."""
    p = {key: _filled(value, constants) for key, value in node.params.items()}
    if node.op in VIEWS | SUMS:
        if node.op == "aten.cat" and any(isinstance(part, Tensor) for part in p["tensors"]):
            return None
        by = _called(node, p, moving)
        return Affine(by, by, 0 if node.op in VIEWS else _summed(node, p, elements))
    match node.op:
        case "aten.linear" | "aten.convolution" if isinstance(p["weight"], Tensor) and len(moving) == 1:
            return _product(node, p, moving)
        case "aten.matmul" | "aten.mm" if len(moving) == 1:
            key = "mat2" if node.op == "aten.mm" else "other"
            key = key if isinstance(p[key], Tensor) else "self"
            size = _called(node, {**p, key: p[key].abs()}, moving)
            shape = p[key].shape
            terms = shape[-1] if key == "self" else shape[max(-2, -len(shape))]
            return Affine(_called(node, p, moving), size, terms + 2)
        case "aten.constant_pad_nd" if p["value"] == 0:
            by = _called(node, p, moving)
            return Affine(by, by, 0)
    return _scaled(node, p, moving)


def _product(node: Node, p: Values, moving: tuple[str, ...]) -> Affine:
    """A matrix or a kernel times what moves, and a bias."""
    weight, bias = p["weight"], p["bias"]
    bare = {**p, "bias": None}
    by, size = _called(node, bare, moving), _called(node, {**bare, "weight": weight.abs()}, moving)
    terms = weight.numel() // min(weight.shape[:2]) + 2
    if bias is None:
        return Affine(by, size, terms)
    flat = bias if node.op == "aten.linear" else bias.reshape(-1, *[1] * (weight.ndim - 2))
    return Affine(by, size, terms, flat.expand(node.shape), flat.abs().expand(node.shape))


def _scaled(node: Node, p: Values, moving: tuple[str, ...]) -> Affine | None:
    """Element by element: scale times what moves, and a constant."""
    scales: list[Any] = []
    offset: Any = 0.0
    heavy: Any = 0.0
    match node.op:
        case "aten.add" | "aten.sub":
            sign = p["alpha"] if node.op == "aten.add" else -p["alpha"]
            for key, scale in (("self", 1.0), ("other", sign)):
                if isinstance(p[key], Ref):
                    scales.append(scale)
                else:
                    offset = scale * torch.as_tensor(p[key], dtype=torch.float64)
                    heavy = offset.abs()
        case "aten.mul" if len(moving) == 1:
            scales = [p["other"] if isinstance(p["self"], Ref) else p["self"]]
        case "aten.div" if isinstance(p["self"], Ref) and len(moving) == 1 and not p.get("rounding_mode"):
            scales = [1 / torch.as_tensor(p["other"], dtype=torch.float64)]
        case "aten.neg":
            scales = [-1.0]
        case "aten._native_batch_norm_legit_no_training" if isinstance(p["input"], Ref) and len(moving) == 1:
            fits = [1, -1, *[1] * (len(node.shape) - 2)]
            mean, scale = p["running_mean"], torch.rsqrt(p["running_var"] + p["eps"])
            scale = scale if p["weight"] is None else scale * p["weight"]
            bias = torch.zeros_like(mean) if p["bias"] is None else p["bias"]
            scales, offset = [scale.reshape(fits)], (bias - mean * scale).reshape(fits)
            heavy = (bias.abs() + (mean * scale).abs()).reshape(fits)
        case _:
            return None

    def by(*x: Tensor) -> Tensor:
        return sum(scale * each for scale, each in zip(scales, x)).expand(node.shape)

    def size(*x: Tensor) -> Tensor:
        return sum(abs(scale) * each for scale, each in zip(scales, x)).expand(node.shape)

    return Affine(by, size, 10, offset, heavy)


def _called(node: Node, p: Values, moving: tuple[str, ...]) -> Callable[..., Tensor]:
    """The operator itself, of the values that move."""

    def by(*x: Tensor) -> Tensor:
        return call(node, {key: _filled(value, dict(zip(moving, x))) for key, value in p.items()})

    return by


def _filled(value: Any, values: Values) -> Any:
    """Params with the values that are known in the place of their names."""
    if isinstance(value, Ref):
        return values.get(value.name, value)
    return [_filled(v, values) for v in value] if isinstance(value, list | tuple) else value


def _summed(node: Node, p: Values, elements: int) -> int:
    """At most how many roundings meet in an element of a sum or a mean."""
    if "kernel_size" in p:
        return max(p["kernel_size"]) ** int(node.op[-2]) + 2  # avg_pool2d
    each = -(-elements // math.prod(node.shape))
    return (8 * each if "output_size" in p else each) + 2  # adaptive windows are up to twice as wide


# Elementwise functions -----------------------------------------------------------------------------------


def lines(
    node: Node, low: Tensor, high: Tensor, choice: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(slope, intercept) of a line below and of one above on [low, high], rounded to the safe side.

    choice: for relu and leaky_relu, where in [0, 1] the line below lies between the two pieces (Zhang et al.
    2018, arXiv:1811.00866); by default on the one that is longer. For sigmoid and tanh both lines have the
    smaller slope of the two ends, which the function is nowhere flatter than (Singh et al. 2018, DeepZ).
    """
    if node.op in SIGNS:
        flat = node.params.get("negative_slope", 0.0)
        choice = (high > -low).double() if choice is None else choice
        ends = [torch.where(end > 0, end, flat * end) for end in (low, high)]
        chord = (ends[1] - ends[0]) / (high - low).clamp(min=1e-300)
        under, over = flat + (1 - flat) * choice, chord
        for slope, inside in ((flat, high <= 0), (1.0, low >= 0)):
            under, over = torch.where(inside, slope, under), torch.where(inside, slope, over)
        under, over = under.clamp(flat, 1.0), over.clamp(flat, 1.0)
        lost = FINE * torch.maximum(low.abs(), high.abs())
        above = torch.maximum(ends[0] - over * low, ends[1] - over * high) + lost  # largest at an end: convex
        return under, torch.zeros_like(low), over, torch.where((low < 0) & (high > 0), above, 0.0)
    f = torch.sigmoid if node.op == "aten.sigmoid" else torch.tanh
    ends = [f(low), f(high)]
    flatter = [end * (1 - end) if node.op == "aten.sigmoid" else 1 - end * end for end in ends]
    slope = (torch.minimum(*flatter) - FINE).clamp(min=0)
    lost = FINE * (1 + slope * torch.maximum(low.abs(), high.abs()))
    return slope, ends[0] - slope * low - lost, slope, ends[1] - slope * high + lost


def ends(step: Step, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of an operator that rises with what it reads."""
    node, name = step.node, step.moving[0]

    def at(x: Tensor) -> Tensor:
        return call(node, {key: _filled(value, {name: x}) for key, value in node.params.items()})

    lower, upper = at(low), at(high)
    if node.op in ("aten.relu", *CUTS):
        return lower, upper
    return lower - FINE * lower.abs(), upper + FINE * upper.abs()
