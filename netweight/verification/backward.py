"""Rows through affine operators: <a, op(x)> = <J^T a, x> + <a, op(0)>.

    rule(node, a, p, alpha) -> (coefficients by param name, bias)

a is [*lead, *node.shape]; an Interval in p marks what is perturbed. Products of matrices and convolutions are
written out; for every other affine operator the transpose comes from its vector-Jacobian product at 0, so
that a view, a pool, a gather or a sum needs no rule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import fold

from netweight.core.graph import Node, call
from netweight.verification.relax import Interval
from netweight.verification.rows import inner, total

FEW = 150  # coefficients of a row, up to which its convolution is cheaper as a product of matrices
Params = Mapping[str, Any]
Back = tuple[dict[str, Any], Tensor | float]

# fmt: off
MOVED = frozenset(f"aten.{name}" for name in [
    "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "select", "slice", "cat",
    "stack", "flip", "roll", "repeat", "reflection_pad1d", "reflection_pad2d", "replication_pad2d",
    "split_with_sizes", "unbind", "tril", "triu", "diagonal", "slice_scatter", "select_scatter",
    "pixel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "unfold", "im2col", "index",
    "index_select", "gather", "as_strided",
])
"""Operators that only move elements, and do not round."""
SUMMED = frozenset(f"aten.{name}" for name in [
    "sum", "mean", "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_bilinear2d", "upsample_linear1d",
])
"""Sums with weights that are not negative."""
AFFINE = MOVED | SUMMED | frozenset([
    "aten.linear", "aten.convolution", "aten.add", "aten.sub", "aten.rsub", "aten.neg", "aten._to_copy",
    "aten.constant_pad_nd", "aten.batch_norm", "aten._native_batch_norm_legit_no_training",
    "netweight.rounded",
])
BILINEAR = frozenset([
    "aten.mul", "aten.div", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm",
])
"""Affine where one of the factors is fixed (of a division: the divisor)."""
# fmt: on


def is_affine(node: Node, perturbed: Callable[[str], bool]) -> bool:
    """Whether the operator is affine in what `perturbed` (by name of the value) says is perturbed."""

    def moves(name: str) -> bool:
        value = node.params.get(name)
        refs = value if isinstance(value, list | tuple) else [value]
        return any(hasattr(ref, "name") and perturbed(ref.name) for ref in refs)

    if node.op == "aten.where":
        return not moves("condition")
    if node.op == "aten.div":
        return not moves("other") and node.params.get("rounding_mode") is None
    if node.op in ("aten.addmm", "aten.baddbmm"):
        return sum(moves(name) for name in ("mat1", "mat2", "batch1", "batch2")) < 2
    if node.op in BILINEAR:
        return sum(moves(name) for name in ("self", "other", "mat2")) < 2
    if node.op in ("aten.index", "aten.gather", "aten.index_select"):
        return not moves("index") and not moves("indices")
    if node.op in ("aten.linear", "aten.convolution"):
        return not moves("weight")
    if node.op == "aten.batch_norm":
        return not node.params["training"]
    return node.op in AFFINE


def back(node: Node, a: Tensor, p: Params) -> Back:
    """One affine node."""
    rule = WRITTEN.get(node.op)
    found = rule(node, a, p) if rule is not None else None
    return transposed(node, a, p) if found is None else found


def transposed(node: Node, a: Any, p: Params) -> Back:
    """The transpose of any affine operator; a holds rows by index where the node has several results."""
    forward, zeros = _of_marked(node, p)
    names = [name for name, value in p.items() if _marks(value, [])]
    values, pull = torch.func.vjp(forward, *zeros)
    if isinstance(a, Mapping):
        lead = next(iter(a.values())).shape[:2]
        a = tuple(a[i] if i in a else part.new_zeros(*lead, *part.shape) for i, part in enumerate(values))
        bias = 0.0
        found = torch.vmap(torch.vmap(lambda *parts: pull(parts)))(*a)
    else:
        lead = a.shape[:2]
        bias = _against(a, values)
        found = torch.vmap(torch.vmap(pull))(a)
    coefficients = iter(found)
    return {name: _replaced(p[name], coefficients, none=True) for name in names}, bias


def at_zero(node: Node, p: Params) -> Tensor | tuple[Tensor, ...]:
    """op(0) for one example: what an affine node adds; a tuple where it has several results."""
    forward, zeros = _of_marked(node, p)
    return forward(*zeros)


def _of_marked(node: Node, p: Params) -> tuple[Callable[..., Any], list[Tensor]]:
    """The node as a function of what is perturbed, for one example, and zeros for it."""
    marked: list[Interval] = []
    for value in p.values():
        _marks(value, marked)

    def forward(*x: Tensor) -> Any:
        values = iter(x)
        found = call(node, {name: _replaced(value, values) for name, value in p.items()})
        return tuple(found) if isinstance(found, list) else found  # vjp tells them apart

    return forward, [x.lower.new_zeros(_example_shape(node, x)) for x in marked]


def _example_shape(node: Node, x: Interval) -> Sequence[int]:
    """Intervals have one more axis in front of an example's shape."""
    return x.lower.shape[1:]


def _marks(value: Any, marked: list[Interval]) -> bool:
    """Appends the Intervals in a param, and says whether there are any."""
    before = len(marked)
    if isinstance(value, Interval):
        marked.append(value)
    elif isinstance(value, list):
        for item in value:
            _marks(item, marked)
    return len(marked) > before


def _replaced(value: Any, values: Any, none: bool = False) -> Any:
    if isinstance(value, Interval):
        return next(values)
    if isinstance(value, list):
        return [_replaced(item, values, none) for item in value]
    return None if none else value


def summed_to(a: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows for a value that was broadcast: summed over the axes that it does not have."""
    extra = a.ndim - 2 - len(shape)
    if extra:
        a = a.sum(tuple(range(2, 2 + extra)))
    axes = tuple(i + 2 for i, n in enumerate(shape) if n == 1 and a.shape[i + 2] != 1)
    return a.sum(axes, keepdim=True) if axes else a


# What most networks consist of ---------------------------------------------------------------------------


def _linear(node: Node, a: Tensor, p: Params) -> Back:
    bias = 0.0 if p["bias"] is None else _against(a, p["bias"])
    return {"input": torch.matmul(a, p["weight"])}, bias


def _convolution(node: Node, a: Tensor, p: Params) -> Back:
    weight, like = p["weight"], p["input"].lower.shape[1:]
    spatial = like[2:]
    padding = [0] * len(spatial)
    if not p["transposed"]:
        ends = zip(a.shape[4:], p["stride"], p["padding"], p["dilation"], weight.shape[2:])
        covered = [(n - 1) * s - 2 * q + d * (k - 1) + 1 for n, s, q, d, k in ends]
        padding = [full - part for full, part in zip(spatial, covered)]
    found = unconvolved(a.flatten(0, 2), p, p["padding"], padding)
    bias = 0.0 if p["bias"] is None else _against(a, p["bias"].reshape(-1, *[1] * len(spatial)))
    return {"input": found.reshape(*a.shape[:2], *like)}, bias


def unconvolved(a: Tensor, p: Params, padding: Sequence[int], more: Sequence[int]) -> Tensor:
    """The transpose of a convolution for rows `n *out`; of few coefficients as one product of matrices."""
    weight, (stride, dilation, groups) = p["weight"], (p["stride"], p["dilation"], p["groups"])

    def transposed(rows: Tensor) -> Tensor:
        return torch.ops.aten.convolution(
            rows, weight, None, stride, padding, dilation, not p["transposed"], more, groups
        )

    size = a[0].numel()
    if size <= FEW and len(a) > size // 2:
        eye = torch.eye(size, dtype=a.dtype, device=a.device).reshape(size, *a.shape[1:])
        by = transposed(eye)
        return torch.matmul(a.flatten(1), by.flatten(1)).reshape(len(a), *by.shape[1:])
    single = weight.ndim == 4 and weight.shape[1] == groups == 1 and not p["transposed"]
    if single and all(d == 1 for d in dilation):
        ends = zip(a.shape[2:], stride, padding, weight.shape[2:], more)
        plane = [(n - 1) * s - 2 * q + k + m for n, s, q, k, m in ends]
        columns = torch.matmul(weight.flatten(1).T, a.flatten(2))
        return fold(columns, plane, weight.shape[2:], padding=padding, stride=stride)
    return transposed(a)


def _add(node: Node, a: Tensor, p: Params) -> Back:
    sign = -1 if node.op == "aten.sub" else 1
    coefficients: dict[str, Any] = {}
    bias: Tensor | float = 0.0
    for name, factor in (("self", 1), ("other", sign * p["alpha"])):
        rows = a if factor == 1 else a * factor
        if isinstance(p[name], Interval):
            coefficients[name] = summed_to(rows, p[name].lower.shape[1:])
        else:
            bias = bias + _against(rows, p[name])
    return coefficients, bias


def _against(a: Tensor, value: Tensor | float) -> Tensor:
    """<a, value> for a constant that may be broadcast."""
    if isinstance(value, Tensor):
        return inner(a.flatten(2), value.expand(a.shape[2:]).reshape(1, 1, -1))
    return total(a * value)


def _mul(node: Node, a: Tensor, p: Params) -> Back:
    name, other = ("self", "other") if isinstance(p["self"], Interval) else ("other", "self")
    return {name: summed_to(a * p[other], p[name].lower.shape[1:])}, 0.0


def _div(node: Node, a: Tensor, p: Params) -> Back:
    return {"self": summed_to(a / p["other"], p["self"].lower.shape[1:])}, 0.0


def _neg(node: Node, a: Tensor, p: Params) -> Back:
    return {"self": -a}, 0.0


def _same(node: Node, a: Tensor, p: Params) -> Back:
    return {"self": a}, 0.0


def _reshape(node: Node, a: Tensor, p: Params) -> Back:
    return {"self": a.reshape(*a.shape[:2], *p["self"].lower.shape[1:])}, 0.0


def _permute(node: Node, a: Tensor, p: Params) -> Back:
    dims = [d % len(node.shape) for d in p["dims"]]
    inverse = [dims.index(i) + 2 for i in range(len(dims))]
    return {"self": a.permute(0, 1, *inverse)}, 0.0


def _transpose(node: Node, a: Tensor, p: Params) -> Back:
    first, second = (d % len(node.shape) + 2 for d in (p.get("dim0", 0), p.get("dim1", 1)))
    return {"self": a.transpose(first, second)}, 0.0


def _matmul(node: Node, a: Tensor, p: Params) -> Back | None:
    right = "other" if "other" in p else "mat2"
    if isinstance(p["self"], Interval) and p[right].ndim == 2:
        return {"self": torch.matmul(a, p[right].T)}, 0.0
    return None


def _batch_norm(node: Node, a: Tensor, p: Params) -> Back:
    slope, shift = norm_lines(p)
    shape = (-1, *[1] * (len(node.shape) - 2))
    return {"input": a * slope.reshape(shape)}, _against(a, shift.reshape(shape))


def norm_lines(p: Params) -> tuple[Tensor, Tensor]:
    """A batch norm with stored statistics as slope x + shift, per channel."""
    slope = (p["running_var"] + p["eps"]).rsqrt()
    slope = slope if p["weight"] is None else slope * p["weight"]
    shift = -slope * p["running_mean"]
    return slope, shift if p["bias"] is None else shift + p["bias"]


WRITTEN: Mapping[str, Callable[[Node, Tensor, Params], Back | None]] = {
    "aten.linear": _linear,
    "aten.convolution": _convolution,
    "aten.add": _add,
    "aten.sub": _add,
    "aten.mul": _mul,
    "aten.div": _div,
    "aten.neg": _neg,
    "aten._to_copy": _same,
    "netweight.rounded": _same,
    "aten.reshape": _reshape,
    "aten.unsqueeze": _reshape,
    "aten.squeeze": _reshape,
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.t": _transpose,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.batch_norm": _batch_norm,
    "aten._native_batch_norm_legit_no_training": _batch_norm,
}


def terms(node: Node, p: Params) -> int:
    """Of how many products or summands an element of an affine node is the sum; 0 where nothing rounds."""
    if node.op in MOVED or node.op in ("aten.neg", "aten.where", "aten._to_copy"):
        return 0
    if node.op == "aten.linear":
        return _ends(p["weight"]).shape[1] + 2
    if node.op == "aten.convolution":
        weight = _ends(p["weight"])
        return weight.numel() // min(weight.shape[:2]) + 2
    if node.op in SUMMED:
        name = next(key for key, value in p.items() if isinstance(value, Interval))
        before, after = p[name].lower[0].numel(), math.prod(node.shape)
        return before + 16 if node.op == "aten.cumsum" else 16 * -(-before // after) + 64
    if node.op in BILINEAR:
        left = _ends(
            next(p[name] for name in ("mat1", "batch1", "self") if name in p and p[name] is not None)
        )
        return (left.shape[-1] if isinstance(left, Tensor) and left.ndim else 0) + 8
    return 16


def _ends(value: Any) -> Any:
    return value.lower if isinstance(value, Interval) else value
