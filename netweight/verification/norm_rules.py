"""What normalisation with the statistics of the input does to intervals (see `rules`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from netweight.core.errors import DoesNotFit
from netweight.core.graph import Node
from netweight.verification import relax
from netweight.verification.relax import ELEMENTARY, Interval, widened

Params = Mapping[str, Any]


def layer_norm(node: Node, p: Params, unit: float) -> Interval:
    """Over the last axes; rms_norm leaves the mean in."""
    centred = node.op == "aten.layer_norm"
    eps = torch.finfo(node.dtype).eps if p["eps"] is None else p["eps"]
    dims = tuple(range(-len(p["normalized_shape"]), 0))
    found = relax.normalised(p["input"], dims, eps, centred, unit)
    return relax.scaled(found, p["weight"], p.get("bias"), unit)


def group_norm(node: Node, p: Params, unit: float) -> Interval:
    """Over groups of channels; instance_norm is one channel each."""
    x = p["input"]
    if node.op == "aten.instance_norm" and not p["use_input_stats"]:
        raise DoesNotFit(
            f"{node.name}: no bounds are known for an instance norm with stored statistics; use a batch norm"
        )
    groups = p.get("num_groups", x.lower.shape[1])
    shape = (x.lower.shape[0], groups, -1)
    flat = Interval(x.lower.reshape(shape), x.upper.reshape(shape))
    found = relax.normalised(flat, (-1,), p["eps"], True, unit)
    whole = Interval(found.lower.reshape(x.lower.shape), found.upper.reshape(x.lower.shape))
    per_channel = (-1, *[1] * (x.lower.ndim - 2))
    weight, bias = (None if p[n] is None else p[n].reshape(per_channel) for n in ("weight", "bias"))
    return relax.scaled(whole, weight, bias, unit)


def variance(node: Node, p: Params, unit: float) -> Interval:
    """Mean squared distance from the mean."""
    x = p["self"]
    dims = tuple(p["dim"]) if p["dim"] else tuple(range(x.lower.ndim))
    count = math.prod(x.lower.shape[d] for d in dims) - (
        1.0 if p["correction"] is None else float(p["correction"])
    )
    found = relax.divided(relax.deviation(x, dims, True, unit), count, unit)
    return Interval(found.lower.reshape(node.shape), found.upper.reshape(node.shape))


def norm(node: Node, p: Params, unit: float) -> Interval:
    """1-, 2- and infinity-norms of vectors."""
    x, order = p["self"], float(p["ord"])
    dims = tuple(p["dim"]) if p["dim"] else tuple(range(x.lower.ndim))
    if order == 2:
        found = relax.powered(relax.deviation(x, dims, False, unit), 0.5, unit)
    elif order == 1:
        near = relax.absolute(x)
        lower, upper = near.lower.sum(dims, keepdim=True), near.upper.sum(dims, keepdim=True)
        found = widened(lower, upper, upper, x.lower.numel() // upper.numel() + ELEMENTARY, unit)
    elif order == math.inf:
        near = relax.absolute(x)
        found = Interval(near.lower.amax(dims, keepdim=True), near.upper.amax(dims, keepdim=True))
    else:
        raise DoesNotFit(
            f"{node.name}: no bounds are known for a norm of order {order:g}; use 1, 2 or infinity"
        )
    return Interval(found.lower.reshape(node.shape), found.upper.reshape(node.shape))
