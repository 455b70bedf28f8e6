"""Largest, smallest and sorted values, as planes; rules in the form of `products`.

The largest of x_1 ... x_k is at least any x_i (the one with the largest lower bound; alpha mixes in the one
with the largest centre). With j that of the largest upper bound, u that bound and m the next largest,

    max_i x_i <= max(x_j, m) <= (1 - s) x_j + s u,        s = (m - l_j) / (u - l_j) where m > l_j, else 0,

which is x_j where it dominates and never above the constant u. The i-th of sorted values lies between the
i-th of the sorted lower and of the sorted upper bounds; where it is certain which value it is, it is that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netweight.core.graph import Node
from netweight.verification.backward import summed_to
from netweight.verification.products import LEAD, Alpha, Found, Params, Rule, against, aligned, spread
from netweight.verification.relax import Interval


@dataclass(frozen=True, eq=False)
class Picks:
    """Which values on the last axis stand for the largest, and its upper plane: weight x_top + constant."""

    sure: Tensor
    likely: Tensor
    top: Tensor
    weight: Tensor
    constant: Tensor


def picks(x: Interval) -> Picks:
    """Of the largest of the values on the last axis."""
    least_number = torch.finfo(x.lower.dtype).min
    centre = x.lower / 2 + x.upper / 2
    likely = torch.where(centre.isnan(), least_number, centre).argmax(-1)
    upper, places = x.upper.topk(min(2, x.upper.shape[-1]), -1)
    top, most = places[..., 0], upper[..., 0]
    second = upper[..., 1] if upper.shape[-1] > 1 else torch.full_like(most, -math.inf)
    least = x.lower.gather(-1, top.unsqueeze(-1)).squeeze(-1)
    over = second > least
    share = torch.where(over, (second - least) / torch.where(over, most - least, 1.0), 0.0)
    fine = share.isfinite() & ((most.isfinite() & (least > least_number)) | ~over)
    constant = torch.where(over, share * most, 0.0)
    return Picks(
        x.lower.argmax(-1), likely, top, torch.where(fine, 1 - share, 0.0), torch.where(fine, constant, most)
    )


def shares(a: Tensor, chosen: Picks, alpha: Alpha) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Rows `b s *out` of the largest: [(place on the last axis, rows for it)], bias."""
    positive = a.clamp(min=0)
    negative = a - positive
    found = [(chosen.top, negative * chosen.weight)]
    if alpha is None:
        found.append((chosen.sure, positive))
    else:
        found += [(chosen.sure, positive * (1 - alpha[0])), (chosen.likely, positive * alpha[0])]
    return found, against(negative, chosen.constant)


def _negated(x: Interval) -> Interval:
    return Interval(-x.upper, -x.lower)


def _mirrored(largest: Rule) -> Rule:
    """The rule for the smallest: min x = -max -x."""

    def rule(node: Node, a: Tensor, p: Params, alpha: Alpha) -> Found:
        flipped = {name: _negated(v) if isinstance(v, Interval) else v for name, v in p.items()}
        if isinstance(p.get("other"), Tensor):
            flipped["other"] = -p["other"]
        if isinstance(p.get("self"), Tensor):
            flipped["self"] = -p["self"]
        turned = None if alpha is None else (alpha[1], alpha[0])
        found, bias = largest(node, -_rows(a), flipped, turned)
        return {name: -rows for name, rows in found.items()}, bias

    return rule


# Of two --------------------------------------------------------------------------------------------------


def maximum(node: Node, a: Tensor, p: Params, alpha: Alpha) -> Found:
    """The larger of two values, of which one may be constant."""
    shape = aligned(len(node.shape))
    ends = [_ends(p[name], a, shape) for name in ("self", "other")]
    both = [torch.stack(torch.broadcast_tensors(*side), -1) for side in zip(*ends)]
    chosen, bias = shares(a, picks(Interval(*both)), alpha)
    found: dict[str, Any] = {}
    for i, name in enumerate(("self", "other")):
        rows = sum(torch.where(place == i, part, 0.0) for place, part in chosen)
        if isinstance(p[name], Interval):
            like = p[name].lower.shape[LEAD:]
            found[name] = summed_to(rows, like)
        else:
            bias = bias + against(rows, ends[i][0])
    return found, bias


def _ends(value: Any, like: Tensor, shape: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    if isinstance(value, Interval):
        return shape(value.lower), shape(value.upper)
    point = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    point = shape(point.reshape(1, 1, *point.shape))
    return point, point


# Along axes ----------------------------------------------------------------------------------------------


def along(node: Node, a: Any, p: Params, alpha: Alpha) -> Found:
    """The largest along axes: amax, max."""
    if isinstance(p.get("other"), Interval | Tensor):  # max of two is maximum
        return maximum(node, a, p, alpha)
    x = p["self"]
    like = x.lower.shape[LEAD:]
    dims = _dims(p.get("dim"), len(like))
    kept = [d for d in range(len(like)) if d not in dims]
    order = [*range(LEAD), *(d + LEAD for d in (*kept, *dims))]
    outer = [like[d] for d in kept]

    def last(t: Tensor) -> Tensor:
        return t.permute(order).reshape(*t.shape[:LEAD], *outer, -1)

    chosen = picks(Interval(last(x.lower), last(x.upper)))
    a = _rows(a)
    parts, bias = shares(a.reshape(*a.shape[:LEAD], *outer), chosen, spread(alpha, node.shape, outer))
    flat = a.new_zeros(*a.shape[:LEAD], *outer, math.prod(like[d] for d in dims))
    for place, rows in parts:
        flat = flat.scatter_add(-1, place.expand(rows.shape).unsqueeze(-1), rows.unsqueeze(-1))
    back = [order.index(i) for i in range(len(order))]
    shape = [*a.shape[:LEAD], *outer, *(like[d] for d in dims)]
    return {"self": flat.reshape(shape).permute(back)}, bias


def _dims(dim: Any, ndim: int) -> list[int]:
    if dim is None or dim == []:
        return list(range(ndim))
    return sorted(d % ndim for d in (dim if isinstance(dim, list | tuple) else [dim]))


def _rows(a: Any) -> Tensor:
    """Of the values; an operator that also gives their places has rows by index."""
    return a[0] if isinstance(a, Mapping) else a


# In windows ----------------------------------------------------------------------------------------------


def pool(node: Node, a: Any, p: Params, alpha: Alpha) -> Found:
    """The largest in each window of a plane; places in the padding count as minus infinity."""
    x, count = p["self"], int(node.op[-2])
    like = x.lower.shape[LEAD:]
    index = windows(like[-count:], node.shape[-count:], p).to(x.lower.device)
    outer = like[:-count]

    def inside(t: Tensor) -> Tensor:
        planes = t.flatten(-count).clamp(min=torch.finfo(t.dtype).min)  # the padding lies below all values
        return planes[..., index.clamp(min=0)].masked_fill(index < 0, -math.inf)

    chosen, a = picks(Interval(inside(x.lower), inside(x.upper))), _rows(a)
    parts, bias = shares(a.flatten(-count), chosen, spread(alpha, node.shape, [*outer, len(index)]))
    flat = a.new_zeros(*a.shape[:LEAD], *outer, math.prod(like[-count:]))
    spots = torch.arange(len(index), device=a.device)
    for place, rows in parts:
        flat = flat.scatter_add(-1, index[spots, place].clamp(min=0).expand(rows.shape), rows)
    return {"self": flat.reshape(*a.shape[:LEAD], *like)}, bias


def windows(inner: Sequence[int], outer: Sequence[int], p: Params) -> Tensor:
    """Places in the flattened plane `inner` that each place of `outer` sees: `out window`, -1 for none."""
    index, inside = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for axis, (size, out) in enumerate(zip(inner, outer)):
        places, fits = _reach(axis, size, out, p)
        index = (index[:, None, :, None] * size + places[None, :, None, :]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & fits[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.where(inside, index, -1)


def _reach(axis: int, size: int, out: int, p: Params) -> tuple[Tensor, Tensor]:
    """Along one axis: the places that each output looks at, and which of them exist."""
    number = torch.arange(out).unsqueeze(1)
    if "kernel_size" not in p:  # adaptive
        first, end = number * size // out, -(-(number + 1) * size // out)
        places = first + torch.arange(int((end - first).max()))
        return places, places < end

    def of(name: str) -> int:
        given = p[name] or p["kernel_size"]
        return given[axis % len(given)]

    places = number * of("stride") - p["padding"][axis % len(p["padding"])]
    places = places + torch.arange(of("kernel_size")) * of("dilation")
    return places, (places >= 0) & (places < size)


# Sorted --------------------------------------------------------------------------------------------------


def sort(node: Node, a: Any, p: Params, alpha: Alpha) -> Found:
    """sort and topk."""
    largest = p["largest"] if "largest" in p else p["descending"]
    a, x = _rows(a), p["self"]
    a, x = a.movedim(p["dim"] % len(node.shape) + LEAD, -1), _moved(x, p["dim"])
    if largest:
        rows, bias = _falling(a, x)
    else:
        rows, bias = _falling(-a, _negated(x))
        rows = -rows
    return {"self": rows.movedim(-1, p["dim"] % len(node.shape) + LEAD)}, bias


def _moved(x: Interval, dim: int) -> Interval:
    axis = dim % (x.lower.ndim - LEAD) + LEAD
    return Interval(x.lower.movedim(axis, -1), x.upper.movedim(axis, -1))


def _falling(a: Tensor, x: Interval) -> tuple[Tensor, Tensor]:
    """Rows of the largest, second largest, ... on the last axis."""
    lower, upper = (end.contiguous() for end in (x.lower, x.upper))
    count, kept = lower.shape[-1], a.shape[-1]
    low, high = lower.sort(-1).values, upper.sort(-1).values
    surely = count - torch.searchsorted(low, upper, right=True)  # how many lie above for certain
    maybe = count - torch.searchsorted(high, lower) - 1  # and how many can, oneself left out
    rank, settled = surely.clamp(max=kept - 1), (surely == maybe) & (surely < kept)
    rows = torch.where(settled, a.gather(-1, rank.expand(*a.shape[:-1], count)), 0.0)
    known = torch.zeros_like(low).scatter_add(-1, rank, settled.to(low.dtype))[..., :kept] > 0
    rest = torch.where(known, 0.0, a)
    positive = rest.clamp(min=0)
    floor, ceiling = (ends.flip(-1)[..., :kept] for ends in (low, high))
    return rows, against(positive, floor) + against(rest - positive, ceiling)


RULES: Mapping[str, Rule] = {
    "aten.maximum": maximum,
    "aten.minimum": _mirrored(maximum),
    "aten.amax": along,
    "aten.max": along,
    "aten.amin": _mirrored(along),
    "aten.min": _mirrored(along),
    **{f"aten.{kind}max_pool{d}d": pool for d in (1, 2, 3) for kind in ("", "adaptive_")},
    "aten.sort": sort,
    "aten.topk": sort,
}
