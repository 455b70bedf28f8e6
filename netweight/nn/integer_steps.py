"""The steps of an integer-only network: frozen dataclasses of integer tensors, each run on integer tensors.

    Entrance   q = clip(round(a x + b), low, high)          the one step that reads real numbers, in float64
    Product    acc = W q + bias                             Linear, convolutions: int8 or int16 weights
    Rescale    q' = clip((q m + 2^(e-1)) >> e, low, high)   to another scale: `nn.dyadic`
    Join       q_1 + q_2                                    of branches that were rescaled to one scale
    Concat     [q_1, q_2, ...]                              likewise
    Clip       max, min                                     ReLU and its kind
    Negate     -q
    Pool       the largest, or the sum, of each window or over whole axes
    Move       reshape, permute, slice, pad ...

`run` takes integers to integers with integer operators alone; `reach` gives the least and the greatest
number that can come out, so that no sum leaves int32 is known before anything runs. Scales are not part of a
step: what a number is worth is noted beside the network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from netweight.nn.dyadic import INT32, Dyadic, rescale

Range = tuple[int, int]
COLUMNS = 1 << 20  # numbers of unfolded inputs that are held at once: what a cache holds
WIDEST = 1 << 16  # kernel, stride, padding: a file may say anything


@dataclass(frozen=True)
class Entrance:
    """Real inputs onto a grid: half to even, as every input is rounded; gain, offset broadcast against x."""

    gain: Float[Tensor, "*_"]
    offset: Float[Tensor, "*_"]
    low: int
    high: int

    def __post_init__(self) -> None:
        for tensor in (self.gain, self.offset):
            if tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
                raise ValueError("gain and offset are finite and in float64")
        _check_range(self.low, self.high)

    def run(self, x: Float[Tensor, "*_"]) -> Int32[Tensor, "*_"]:
        """The codes, zero point taken off."""
        return self.whole(x).to(torch.int32)

    def whole(self, x: Float[Tensor, "*_"]) -> Float[Tensor, "*_"]:
        """The same whole numbers in float64."""
        return torch.round(x.double() * self.gain + self.offset).clamp(self.low, self.high)

    def reach(self) -> Range:
        """The grid."""
        return self.low, self.high


@dataclass(frozen=True)
class Product:
    """Linear (kernel of no axes) or a convolution with zero padding; bias int32, one per output channel."""

    weight: Int[Tensor, "out ..."]
    bias: Int32[Tensor, " out"]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        axes = self.weight.ndim - 2
        if self.weight.dtype not in (torch.int8, torch.int16) or self.bias.dtype != torch.int32:
            raise ValueError("the weights of an integer product are int8 or int16, its bias int32")
        if self.bias.shape != self.weight.shape[:1] or axes < 0 or axes > 3 or not self.weight.numel():
            raise ValueError(f"no product has weights {tuple(self.weight.shape)} and such a bias")
        for values, least in ((self.stride, 1), (self.padding, 0), (self.dilation, 1)):
            _check_sizes(values, axes, least)
        if not isinstance(self.groups, int) or self.groups < 1 or len(self.weight) % self.groups:
            raise ValueError(f"{len(self.weight)} outputs do not fall into {self.groups} groups")

    def run(self, q: Int32[Tensor, "b ..."]) -> Int32[Tensor, "b ..."]:
        """The sums, computed in int32."""
        weight = self.weight.to(torch.int32)
        if weight.ndim == 2:
            rows = multiplied(weight, q.reshape(-1, q.shape[-1]).t())
            return rows.t().reshape(*q.shape[:-1], len(weight)) + self.bias
        each = max(1, COLUMNS // max(1, q[:1].numel() * math.prod(weight.shape[2:])))
        parts = [self._convolved(part, weight) for part in q.split(each)]
        return torch.cat(parts) + self.bias.reshape(-1, *[1] * (weight.ndim - 2))

    def _convolved(self, q: Tensor, weight: Tensor) -> Tensor:
        """Without the bias: one product of matrices per group, kernel positions side by side."""
        found = slices(q, weight.shape[2:], self.stride, self.padding, self.dilation)
        out = found[0].shape[2:]
        columns = q.new_empty(q.shape[1], len(found), len(q), *out)
        for place, part in enumerate(found):
            columns[:, place] = part.transpose(0, 1)
        columns = columns.reshape(self.groups, -1, len(q) * math.prod(out))
        rows = weight.reshape(self.groups, len(weight) // self.groups, -1)
        made = torch.cat([multiplied(w, x) for w, x in zip(rows, columns)])
        return made.reshape(len(weight), len(q), *out).transpose(0, 1)

    def largest(self, low: int, high: int) -> int:
        """No sum of any of the terms, in any order, is larger: max over rows of sum |w| max |q| + |bias|."""
        rows = self.weight.flatten(1).to(torch.int64).abs().sum(1) * max(abs(low), abs(high))
        return int((rows + self.bias.to(torch.int64).abs()).max())

    def reach(self, low: int, high: int) -> Range:
        """The least and greatest result; padding brings in zeros."""
        if any(self.padding):
            low, high = min(low, 0), max(high, 0)
        rows = self.weight.flatten(1).to(torch.int64)
        negative, positive = rows.clamp(max=0).sum(1), rows.clamp(min=0).sum(1)
        lower, upper = positive * low + negative * high, positive * high + negative * low
        return int((lower + self.bias).min()), int((upper + self.bias).max())


@dataclass(frozen=True)
class Rescale:
    """To another scale, rounded half up; m and e broadcast against the input."""

    factor: Dyadic
    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def run(self, q: Int32[Tensor, "*_"]) -> Int32[Tensor, "*_"]:
        """In int64, back in int32."""
        return rescale(q, self.factor, self.low, self.high)

    def image(self, low: int, high: int) -> Range:
        """The range before clipping."""
        ends = [
            (end * m + (1 << (e - 1))) >> e
            for m, e in set(
                zip(self.factor.multiplier.flatten().tolist(), self.factor.shift.flatten().tolist())
            )
            for end in (low, high)
        ]
        return min(ends), max(ends)

    def reach(self, low: int, high: int) -> Range:
        """The image, clipped."""
        ends = [min(max(end, self.low), self.high) for end in self.image(low, high)]
        return ends[0], ends[1]


@dataclass(frozen=True)
class Join:
    """The sum of several branches on one scale."""

    def run(self, *branches: Int32[Tensor, "*_"]) -> Int32[Tensor, "*_"]:
        """Added in int32."""
        return functools.reduce(torch.add, branches)

    def reach(self, *ranges: Range) -> Range:
        """Sums of the ends."""
        return sum(low for low, _ in ranges), sum(high for _, high in ranges)


@dataclass(frozen=True)
class Concat:
    """Several branches on one scale side by side; axis 0 holds the examples."""

    axis: int

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or self.axis < 1:
            raise ValueError(f"examples are never joined, got axis={self.axis}")

    def run(self, *branches: Tensor) -> Tensor:
        """Joined along the axis."""
        return torch.cat(branches, self.axis)

    def reach(self, *ranges: Range) -> Range:
        """Of all."""
        return min(low for low, _ in ranges), max(high for _, high in ranges)


@dataclass(frozen=True)
class Clip:
    """At least `low`, at most `high`, each a number per channel that broadcasts, or None."""

    low: Int32[Tensor, "*_"] | None = None
    high: Int32[Tensor, "*_"] | None = None

    def __post_init__(self) -> None:
        if any(t is not None and (t.dtype != torch.int32 or not t.numel()) for t in (self.low, self.high)):
            raise ValueError("the ends of a clip are int32")

    def run(self, q: Tensor) -> Tensor:
        """Of integers, or of whole numbers in float64."""
        for end, nearer in ((self.low, torch.maximum), (self.high, torch.minimum)):
            q = q if end is None else nearer(q, end.to(q.dtype))
        return q

    def reach(self, low: int, high: int) -> Range:
        """The widest over the channels."""
        if self.low is not None:
            low, high = max(low, int(self.low.min())), max(high, int(self.low.max()))
        if self.high is not None:
            low, high = min(low, int(self.high.min())), min(high, int(self.high.max()))
        return low, high


@dataclass(frozen=True)
class Negate:
    """-q."""

    def run(self, q: Tensor) -> Tensor:
        """The negative."""
        return -q

    def reach(self, low: int, high: int) -> Range:
        """Ends change places."""
        return -high, -low


@dataclass(frozen=True)
class Pool:
    """`of` "max" or "sum": over windows of the last axes, or over whole `axes` (windows: kernel of none).

    The average is the sum: its division is part of the scale.
    """

    of: str
    axes: tuple[int, ...] = ()
    keep: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.of not in ("max", "sum") or bool(self.kernel) == bool(self.axes) or len(self.kernel) > 3:
            raise ValueError(f"no pool is of {self.of!r} over axes {self.axes} and windows {self.kernel}")
        if any(not isinstance(axis, int) or axis < 1 for axis in self.axes):
            raise ValueError(f"examples are never pooled, got axes={self.axes}")
        for values, least in ((self.kernel, 1), (self.stride, 1), (self.padding, 0), (self.dilation, 1)):
            _check_sizes(values, len(self.kernel), least)

    def run(self, q: Int[Tensor, "b ..."]) -> Int[Tensor, "b ..."]:
        """In the dtype of q."""
        if self.axes:
            if self.of == "max":
                return q.amax(self.axes, keepdim=self.keep)
            return q.sum(self.axes, keepdim=self.keep, dtype=q.dtype)
        fill = INT32[0] if self.of == "max" else 0
        found = slices(q, self.kernel, self.stride, self.padding, self.dilation, fill)
        return functools.reduce(torch.maximum if self.of == "max" else torch.add, found)

    def reach(self, low: int, high: int, count: int) -> Range:
        """`count`: how many numbers meet in a sum."""
        if self.of == "max":
            return low, high
        if any(self.padding):
            low, high = min(low, 0), max(high, 0)
        return low * count, high * count


@dataclass(frozen=True)
class Move:
    """Elements moved, none computed with. how: a key of `MOVES`. by: whole numbers, or lists of them."""

    how: str
    by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.how not in MOVES or any(not _numbers(value) for value in self.by.values()):
            raise ValueError(f"no move is {self.how!r} by {dict(self.by)!r}")

    def run(self, q: Tensor) -> Tensor:
        """Of any dtype."""
        return MOVES[self.how](q, self.by)

    def reach(self, low: int, high: int) -> Range:
        """Padding brings in zeros."""
        return (min(low, 0), max(high, 0)) if self.how == "pad" else (low, high)


MOVES: Mapping[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "reshape": lambda q, by: q.reshape(len(q), *by["shape"]),  # shape: of one example
    "permute": lambda q, by: q.permute(by["dims"]),
    "select": lambda q, by: q.select(by["dim"], by["index"]),
    "slice": lambda q, by: q[(slice(None),) * by["dim"] + (slice(by["start"], by["end"], by["step"]),)],
    "flip": lambda q, by: q.flip(by["dims"]),
    "pad": lambda q, by: F.pad(q, by["pad"]),
}
Step = Entrance | Product | Rescale | Join | Concat | Clip | Negate | Pool | Move


def multiplied(a: Int32[Tensor, "n k"], b: Int32[Tensor, "k m"]) -> Int32[Tensor, "n m"]:
    """The product of two matrices in int32; torch has one on the CPU alone."""
    return a @ b if a.device.type in ("cpu", "meta") else summed(a, b)


def summed(a: Int32[Tensor, "n k"], b: Int32[Tensor, "k m"]) -> Int32[Tensor, "n m"]:
    """The same from elementwise products and sums, which every device has for integers."""
    each = max(1, COLUMNS // max(1, a.numel()))
    return torch.cat([(a[:, :, None] * part[None]).sum(1, dtype=torch.int32) for part in b.split(each, 1)], 1)


def slices(
    q: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    fill: int = 0,
) -> list[Tensor]:
    """For each kernel position, the inputs that it meets: the last axes in the shape of the output."""
    if any(padding):
        q = F.pad(q, [p for size in reversed(padding) for p in (size, size)], value=fill)
    sizes = q.shape[-len(kernel) :]
    out = [outputs(*each) for each in zip(sizes, kernel, stride, [0] * len(kernel), dilation)]
    ends = places(kernel, stride, dilation, out)
    return [q[(..., *(slice(a, b, s) for a, b, s in zip(*pair, stride)))] for pair in ends]


def places(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], out: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """For each kernel position, where its inputs start and end on each axis."""
    found = []
    for place in itertools.product(*map(range, kernel)):
        starts = [p * d for p, d in zip(place, dilation)]
        found.append((starts, [at + (n - 1) * s + 1 for at, n, s in zip(starts, out, stride)]))
    return found


def outputs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many windows fit on an axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check_range(low: Any, high: Any) -> None:
    if not (isinstance(low, int) and isinstance(high, int) and INT32[0] <= low <= high <= INT32[1]):
        raise ValueError(f"no range of int32 goes from {low} to {high}")


def _check_sizes(values: Any, count: int, least: int) -> None:
    if len(values) != count or any(not isinstance(v, int) or not least <= v <= WIDEST for v in values):
        raise ValueError(f"need {count} whole numbers from {least} on, got {values}")


def _numbers(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(v, int) and abs(v) < 2**31 for v in values)
