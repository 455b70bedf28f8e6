"""Rows through affine operators while they are single elements or windows (see `rows`).

Each gives (coefficients by param name, bias), or None where the rows must become full tensors first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from netweight.core.graph import Node
from netweight.verification.backward import norm_lines, unconvolved
from netweight.verification.relax import Interval
from netweight.verification.rows import Unit, Window, cleaned, planar, spotted, total

Params = Mapping[str, Any]


def back_unit(node: Node, rows: Unit, p: Params) -> tuple[dict[str, Any], Tensor | float] | None:
    """Single elements: rows of a weight, the kernel under one output; None where there is no short way."""
    if node.op == "aten.linear" and math.prod(node.shape) == node.shape[-1]:
        like = p["input"].lower.shape[1:]
        found = p["weight"][rows.index] * rows.sign.unsqueeze(2)
        bias = 0.0 if p["bias"] is None else p["bias"][rows.index] * rows.sign
        return {"input": found.reshape(*rows.index.shape, *like)}, bias
    if node.op == "aten.convolution" and planar(node.shape):
        if p["transposed"]:
            return None
        spots, which, channel = spotted(rows.index, node.shape)
        start = Window(_kernels(p, channel, rows.sign), spots, which)
        moved = start.moved(start.a, p["stride"], [-q for q in p["padding"]])
        bias = 0.0 if p["bias"] is None else p["bias"][channel] * rows.sign
        return {"input": moved}, bias
    if node.op in ("aten.reshape", "aten.unsqueeze", "aten.squeeze"):
        return {"self": rows}, 0.0
    if node.op == "aten.add" and all(
        isinstance(p[name], Interval) and p[name].lower.shape[1:] == torch.Size(node.shape)
        for name in ("self", "other")
    ):
        return ({"self": rows, "other": rows}, 0.0) if p["alpha"] == 1 else None
    return None


def _kernels(p: Params, channel: Tensor, sign: Tensor) -> Tensor:
    """weight[channel] * sign in all input channels: `b s c kh kw`, spread where it is dilated."""
    weight, groups = p["weight"], p["groups"]
    kernel = weight[channel] * sign[..., None, None, None]
    dilation = p["dilation"]
    if any(d != 1 for d in dilation):
        size = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
        wide = kernel.new_zeros(*kernel.shape[:3], *size)
        wide[..., :: dilation[0], :: dilation[1]] = kernel
        kernel = wide
    if groups == 1:
        return kernel
    each = weight.shape[1]
    full = kernel.new_zeros(*channel.shape, groups * each, *kernel.shape[3:])
    first = channel // (weight.shape[0] // groups) * each
    where = (first.unsqueeze(2) + torch.arange(each, device=channel.device))[..., None, None]
    return full.scatter(2, where.expand(kernel.shape), kernel)


def back_window(node: Node, rows: Window, p: Params) -> tuple[dict[str, Any], Tensor | float] | None:
    """Windows through operators that keep them windows; None where they must become full rows."""
    match node.op:
        case "aten.convolution" if not p["transposed"] and planar(node.shape):
            clean = cleaned(rows, node.shape)
            a = unconvolved(clean.a.flatten(0, 1), p, [0, 0], [0, 0])
            bias = 0.0 if p["bias"] is None else total(clean.a * p["bias"][:, None, None])
            a = a.unflatten(0, rows.a.shape[:2])
            return {"input": clean.moved(a, p["stride"], [-q for q in p["padding"]])}, bias
        case "aten.add" | "aten.sub" | "aten.mul" | "aten.div" if _per_channel(node, p) is not None:
            clean, value = cleaned(rows, node.shape), _per_channel(node, p)
            if node.op in ("aten.mul", "aten.div"):
                by = value if node.op == "aten.mul" else 1 / value
                return {"self": clean.filled(clean.a * by[:, None, None], True)}, 0.0
            bias = total(clean.a * value[:, None, None])
            return {"self": clean}, bias if node.op == "aten.add" else -bias
        case "aten.add" | "aten.sub":
            like = torch.Size(node.shape)
            both = all(isinstance(p[n], Interval) and p[n].lower.shape[1:] == like for n in ("self", "other"))
            if both and p["alpha"] == 1:
                other = rows if node.op == "aten.add" else rows.filled(-rows.a, rows.clean)
                return {"self": rows, "other": other}, 0.0
        case "aten.batch_norm" | "aten._native_batch_norm_legit_no_training":
            clean, (slope, shift) = cleaned(rows, node.shape), norm_lines(p)
            bias = total(clean.a * shift[:, None, None])
            return {"input": clean.filled(clean.a * slope[:, None, None], True)}, bias
        case "aten.slice" if p["dim"] in (2, 3) and planar(node.shape):
            return {"self": _spread(cleaned(rows, node.shape), p)}, 0.0
        case "aten.constant_pad_nd" if list(p["pad"][:4]) == [0, 0, 0, 0] and not any(p["pad"][6:]):
            clean, (front, behind) = cleaned(rows, node.shape), (*p["pad"][4:6], 0, 0)[:2]
            channels = clean.a.shape[2]
            bias = 0.0
            if p["value"]:
                outer = torch.cat([clean.a[:, :, :front], clean.a[:, :, channels - behind :]], 2)
                bias = total(outer * p["value"])
            return {"self": clean.filled(clean.a[:, :, front : channels - behind], True)}, bias
    return None


def _per_channel(node: Node, p: Params) -> Tensor | None:
    """The constant second argument as one number per channel, where it is one."""
    other = p["other"]
    if isinstance(other, Interval) or not isinstance(p["self"], Interval) or p.get("alpha", 1) != 1:
        return None
    channels = node.shape[1]
    other = torch.as_tensor(other, dtype=p["self"].lower.dtype, device=p["self"].lower.device)
    plain = other.ndim == 0 or (
        other.ndim >= 3 and other.shape[-2:] == (1, 1) and other.numel() in (1, channels)
    )
    return other.reshape(-1).expand(channels) if plain and p["self"].lower[0].shape == node.shape else None


def _spread(rows: Window, p: Params) -> Window:
    """A window before a slice with a step: its elements drawn apart."""
    axis, step, start = p["dim"] - 2, p["step"], p["start"] or 0
    size = list(rows.a.shape)
    size[3 + axis] = (size[3 + axis] - 1) * step + 1
    wide = rows.a.new_zeros(size)
    wide[(slice(None),) * (3 + axis) + (slice(None, None, step),)] = rows.a
    scale, shift = [1, 1], [0, 0]
    scale[axis], shift[axis] = step, start
    return rows.moved(wide, scale, shift, True)
