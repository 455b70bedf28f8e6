"""The operators of ONNX that move data and decide shapes; see `onnx_ops` for how they are called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Settings = Mapping[str, Any]
MOST = 1 << 28  # numbers in one tensor


class Unreadable(ValueError):
    """A node that cannot be read; the text says why."""


def reshape(a: Settings, x: Tensor, shape: Sequence[int]) -> Tensor:
    """0 keeps the size of that axis."""
    kept = [x.shape[i] if size == 0 and not a.get("allowzero", 0) else size for i, size in enumerate(shape)]
    return x.reshape(kept)


def flatten(a: Settings, x: Tensor) -> Tensor:
    """To a matrix, cut before `axis`."""
    axis = a.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return (
        x.reshape(1, -1)
        if axis == 0
        else x.flatten(axis).flatten(0, axis - 1)
        if axis < x.ndim
        else x.reshape(-1, 1)
    )


def transpose(a: Settings, x: Tensor) -> Tensor:
    """The axes in another order, by default reversed."""
    return x.permute(*a.get("perm", range(x.ndim - 1, -1, -1)))


def squeeze(a: Settings, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Without axes of size 1."""
    axes = a.get("axes") if axes is None else axes
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def unsqueeze(a: Settings, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """With new axes of size 1, places counted in the result."""
    axes = a["axes"] if axes is None else axes
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def concat(a: Settings, *parts: Tensor) -> Tensor:
    """One after the other; what stands once is repeated for every example of a batch."""
    axis = a["axis"] % parts[0].ndim
    if axis > 0:
        batch = max(len(part) for part in parts)
        parts = tuple(part.expand(batch, *part.shape[1:]) if len(part) == 1 else part for part in parts)
    return torch.cat(parts, axis)


def split(a: Settings, x: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Into pieces along an axis."""
    axis = a.get("axis", 0)
    sizes = a.get("split") if sizes is None else sizes
    count = a.get("num_outputs", a["outputs"])
    return x.split(list(sizes) if sizes is not None else -(-x.shape[axis] // count), axis)


def slice_(
    a: Settings,
    x: Tensor,
    starts: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Ranges of axes, also backwards."""
    starts, ends = a.get("starts", starts), a.get("ends", ends)
    axes = a.get("axes", axes) or range(len(starts))
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts)):
        size = x.shape[axis]
        places = range(size)[start:end:step]
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def gather(a: Settings, x: Tensor, indices: Any) -> Tensor:
    """Entries of an axis."""
    axis = a.get("axis", 0) % x.ndim
    if isinstance(indices, int):
        return x.select(axis, indices)
    if isinstance(indices, list):
        indices = torch.tensor(indices, dtype=torch.int64, device=x.device)
    flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1)
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def expand(a: Settings, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast with a shape."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


def tile(a: Settings, x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Repeated along each axis."""
    sized([x.numel(), *repeats])
    return x.repeat(*repeats)


def pad(
    a: Settings, x: Tensor, pads: Sequence[int] | None = None, value: float | None = None, axes: Any = None
) -> Tensor:
    """Before and after each axis."""
    pads = a.get("pads") if pads is None else pads
    value = a.get("value", 0.0) if value is None else value
    mode = a.get("mode", "constant")
    if axes is not None or mode not in ("constant", "reflect", "edge"):
        raise Unreadable(f"padding of mode {mode!r} or of chosen axes is not read")
    rank = len(pads) // 2
    sized([size + max(0, low) + max(0, high) for size, low, high in zip(x.shape, pads[:rank], pads[rank:])])
    last_first = [n for axis in reversed(range(rank)) for n in (pads[axis], pads[axis + rank])]
    if mode != "constant":
        while last_first[-2:] == [0, 0]:
            last_first = last_first[:-2]
        return F.pad(x, last_first, "reflect" if mode == "reflect" else "replicate")
    return F.pad(x, last_first, value=float(value))


def sized(shape: Sequence[int]) -> None:
    """Refuses what would not fit into memory."""
    if any(n < 0 for n in shape) or math.prod(shape) > MOST:
        raise Unreadable(f"a tensor of the shape {list(shape)} is asked for, more than {MOST} numbers")


def constant_of_shape(a: Settings, shape: Sequence[int]) -> Tensor:
    """One value everywhere."""
    sized(shape)
    value = a.get("value")
    return torch.zeros(shape) if value is None else value.reshape(()).expand(tuple(shape)).clone()


def shape_of(a: Settings, x: Tensor) -> Tensor:
    """The shape as a tensor."""
    return torch.tensor(x.shape)[a.get("start", 0) : a.get("end")]


def one_hot(a: Settings, indices: Tensor, depth: Any, values: Tensor) -> Tensor:
    """The second value at an index, the first elsewhere."""
    depth = depth[0] if isinstance(depth, list) else int(depth)
    axis = a.get("axis", -1)
    rank = indices.ndim + 1
    sized([indices.numel(), depth])
    places = torch.arange(depth, device=indices.device).reshape([-1] + [1] * (rank - 1 - axis % rank))
    indices = torch.where(indices < 0, indices + depth, indices).unsqueeze(axis)
    return torch.where(indices == places, values[1], values[0])
