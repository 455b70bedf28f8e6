"""Coefficients of linear functions of one value, for many rows at once: a row r stands for <a_r, value>.

Every example of a batch has equally many rows, so a slope or an interval of an example meets them by
broadcasting. Three forms, each for values of `shape` (no batch in it):

    Unit     +-1 at one element: the rows that ask for the bounds of single neurons; never built
    Window   a small patch `b s c kh kw` of a plane (1, c, h, w) and where its top left corner lies; the patch
             may reach outside of the plane, where its coefficients count for nothing
    Tensor   all coefficients, `b s *shape`

A Window is what makes rows through convolutions cheap: it grows by the kernel, not to the whole plane, and
stride, padding and a residual sum only move its corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding, pad

DIRECT = 512  # numbers that may be added up by a product of matrices, in any order; beyond that
BLOCK = 64  # numbers are added up one after the other, before their sums are added in float64


@dataclass(frozen=True, eq=False)
class Unit:
    """sign at the element `index` of the flattened value, 0 elsewhere."""

    index: Int[Tensor, "b s"]
    sign: Float[Tensor, "b s"]


@dataclass(frozen=True, eq=False)
class Window:
    """a[b, s] lies with its top left corner at spots[which[b, s]] = (example, row, column) of the planes.

    Rows of the channels of one pixel share a spot, so what lies under a window is looked up once for all of
    them. clean: the coefficients are 0 outside of the plane.
    """

    a: Float[Tensor, "b s c kh kw"]
    spots: Int[Tensor, "p 3"]
    which: Int[Tensor, "b s"]
    clean: bool = False

    def moved(self, a: Tensor, scale: Sequence[int], shift: Sequence[int], clean: bool = False) -> Window:
        """Other coefficients, the corners at scale * corner + shift."""
        device = self.spots.device
        by, to = torch.tensor([1, *scale], device=device), torch.tensor([0, *shift], device=device)
        return Window(a, self.spots * by + to, self.which, clean)

    def filled(self, a: Tensor, clean: bool) -> Window:
        """Other coefficients at the same place."""
        return Window(a, self.spots, self.which, clean)


Rows = Unit | Window | Tensor


def dense(rows: Rows, shape: Sequence[int], dtype: torch.dtype) -> Float[Tensor, "b s *shape"]:
    """All coefficients."""
    if isinstance(rows, Tensor):
        return rows
    if isinstance(rows, Unit):
        b, s = rows.index.shape
        flat = torch.zeros(b, s, math.prod(shape), dtype=dtype, device=rows.index.device)
        flat.scatter_(2, rows.index.unsqueeze(2), rows.sign.to(dtype).unsqueeze(2))
        return flat.reshape(b, s, *shape)
    b, s, channels, kh, kw = rows.a.shape
    height, width = shape[-2:]
    y, x, inside = _places(rows, height, width)
    where = y.clamp(0, height - 1).unsqueeze(2) * width + x.clamp(0, width - 1).unsqueeze(1)
    patch = rows.a if rows.clean else rows.a * inside[rows.which].unsqueeze(2)
    flat = rows.a.new_zeros(b, s, channels, height * width)
    places = where.flatten(1)[rows.which].unsqueeze(2)
    flat.scatter_add_(3, places.expand(b, s, channels, kh * kw), patch.flatten(3))
    return flat.reshape(b, s, *shape)


def windowed(rows: Unit, shape: Sequence[int], dtype: torch.dtype) -> Window:
    """Single elements of planes (1, c, h, w) as windows of one pixel."""
    spots, which, channel = spotted(rows.index, shape)
    a = torch.zeros(*rows.index.shape, shape[1], dtype=dtype, device=rows.index.device)
    a.scatter_(2, channel.unsqueeze(2), rows.sign.to(dtype).unsqueeze(2))
    return Window(a[..., None, None], spots, which, True)


def spotted(index: Int[Tensor, "b s"], shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(spots, which, channel) of the elements of planes (1, c, h, w)."""
    height, width = shape[-2:]
    plane = height * width
    owner = torch.arange(len(index), device=index.device).unsqueeze(1)
    spots, which = (owner * plane + index % plane).unique(return_inverse=True)
    place = spots % plane
    return torch.stack([spots // plane, place // width, place % width], 1), which, index // plane


def planar(shape: Sequence[int]) -> bool:
    """Whether a value is planes (1, c, h, w)."""
    return len(shape) == 4 and shape[0] == 1


def _places(rows: Window, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, inside) of the elements under each spot: p kh, p kw, p kh kw."""
    kh, kw = rows.a.shape[-2:]
    device = rows.a.device
    y = rows.spots[:, 1:2] + torch.arange(kh, device=device)
    x = rows.spots[:, 2:3] + torch.arange(kw, device=device)
    inside = ((y >= 0) & (y < height)).unsqueeze(2) & ((x >= 0) & (x < width)).unsqueeze(1)
    return y, x, inside


def cleaned(rows: Window, shape: Sequence[int]) -> Window:
    """The window with zeros outside of the plane."""
    if rows.clean:
        return rows
    inside = _places(rows, *shape[-2:])[2]
    if not bool(inside.all()):
        rows = rows.filled(rows.a * inside[rows.which].unsqueeze(2), True)
    return rows.filled(rows.a, True)


def patches(values: Float[Tensor, "b ..."], rows: Window) -> Float[Tensor, "b s c kh kw"]:
    """What `values` of one plane each hold under each window, 0 outside."""
    kh, kw = rows.a.shape[-2:]
    planes = values.reshape(len(values), -1, *values.shape[-2:])
    owner, y, x = rows.spots.unbind(1)
    height, width = planes.shape[-2:]
    low = [max(0, -int(o.min())) for o in (y, x)]
    high = [max(0, int(y.max()) + kh - height), max(0, int(x.max()) + kw - width)]
    if any(low) or any(high):
        planes = pad(planes, (low[1], high[1], low[0], high[0]))
    under = planes.unfold(2, kh, 1).unfold(3, kw, 1)[owner, :, y + low[0], x + low[1]]
    return embedding(rows.which, under.flatten(1)).reshape(rows.a.shape)


def added(first: Rows | None, second: Rows, shape: Sequence[int], dtype: torch.dtype) -> Rows:
    """The sum of two sets of rows; windows stay windows where their corners differ by the same step."""
    if first is None:
        return second
    if isinstance(first, Unit) and isinstance(second, Window):
        first = windowed(first, shape, dtype)
    if isinstance(first, Window) and isinstance(second, Unit):
        second = windowed(second, shape, dtype)
    if isinstance(first, Window) and isinstance(second, Window):
        together = _united(first, second)
        if together is not None:
            return together
    return dense(first, shape, dtype) + dense(second, shape, dtype)


def _united(first: Window, second: Window) -> Window | None:
    if len(first.spots) != len(second.spots) or not torch.equal(first.which, second.which):
        return None
    step = second.spots - first.spots
    if not bool((step == step[:1]).all()):
        return None
    _, dy, dx = step[0].tolist()
    (ah, aw), (bh, bw) = first.a.shape[-2:], second.a.shape[-2:]
    top, left = min(0, dy), min(0, dx)
    height, width = max(ah, dy + bh) - top, max(aw, dx + bw) - left
    a = pad(first.a, (-left, width - aw + left, -top, height - ah + top))
    b = pad(second.a, (dx - left, width - bw - dx + left, dy - top, height - bh - dy + top))
    return first.moved(a + b, (1, 1), (top, left), first.clean and second.clean)


def take(rows: Rows, order: Int[Tensor, "b t"]) -> Rows:
    """Some of the rows of each example."""
    if isinstance(rows, Unit):
        return Unit(rows.index.gather(1, order), rows.sign.gather(1, order))
    if isinstance(rows, Window):
        return Window(_taken(rows.a, order), rows.spots, rows.which.gather(1, order), rows.clean)
    return _taken(rows, order)


def _taken(a: Tensor, order: Tensor) -> Tensor:
    if len(a) == 1:
        return a[:, order[0]]
    return a[torch.arange(len(a), device=a.device).unsqueeze(1), order]


def dot(rows: Window | Tensor, values: Tensor) -> Float[Tensor, "b s"]:
    """<a, values>: one `b *shape` for all rows of an example, or one for each row, `b s *shape`."""
    if isinstance(rows, Window):
        return total(rows.a * patches(values, rows))
    return total(rows * (values if values.ndim == rows.ndim else values.unsqueeze(1)))


def inner(a: Float[Tensor, "b s n"], values: Float[Tensor, "b 1 n"]) -> Float[Tensor, "b s"]:
    """<a, values>, off by gamma of DIRECT + 1 at most."""
    if a.shape[2] <= DIRECT:
        return torch.matmul(a, values.transpose(1, 2)).squeeze(2)
    return total(a * values)


def total(products: Float[Tensor, "b s ..."]) -> Float[Tensor, "b s"]:
    """The sum over all axes but the first two, off by gamma_(BLOCK + 1) of the sizes however many there are.

    In float32; in float64 a number more for each block. A sum in any order of the machine's choice would be
    off by gamma_n, far too much for the constants of a large layer.
    """
    flat = products.flatten(2)
    count = flat.shape[2]
    if count <= BLOCK:
        return flat.sum(2)
    flat = pad(flat, (0, -count % BLOCK)) if count % BLOCK else flat
    return flat.unflatten(2, (-1, BLOCK)).sum(3).sum(2, dtype=torch.float64).to(flat.dtype)
