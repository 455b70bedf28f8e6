"""Sets around a point: what may happen to an input, a weight, a memory or a graph.

    Linf L2 L1    |s - x|_p <= eps, within the valid range [low, high]           inputs and activations
    Box           lower <= s <= upper, wherever x is                             inputs and activations
    WeightLinf    |s - x|_inf <= eps                                             weights
    Rounding      the cell of each weight's nearest grid code                    weights
    BitFlips      at most k flipped bits per example                             uint8 codes
    EdgeFlips     at most k flipped edges per example                            undirected 0/1 adjacency

`project` and `sample` return points that are inside to the last bit of their dtype; `contains` decides
exactly (float64 with its rounding error accounted for, rationals where that is not enough). `corners` and
`support` are for proofs: rounded outwards, never too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Num, UInt8
from torch import Tensor

from netweight.core import grid
from netweight.core.errors import BadInput, DoesNotFit, unknown

UNIT = 2.0**-52


@runtime_checkable
class Perturbation(Protocol):
    """A set around x; the first axis counts examples (for weights: rows)."""

    def project(self, s: Tensor, x: Tensor) -> Tensor:
        """A point of the set near s (the nearest, but for L2 and L1 within a range); s itself if inside."""
        ...

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of the set; drawn on the generator's device, returned on that of x."""
        ...

    def contains(self, s: Num[Tensor, "b *in"], x: Num[Tensor, "b *in"]) -> Bool[Tensor, " b"]:
        """Which examples of s lie in the set, decided exactly."""
        ...

    def corners(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper): a box around the set, rounded outwards."""
        ...

    def support(self, a: Float[Tensor, "b k *in"], x: Num[Tensor, "b *in"]) -> Float[Tensor, "b k"]:
        """max <a, s> over the set, or something above it; rounded up."""
        ...


@dataclass(frozen=True)
class Found:
    """What an attack found. points: inside the set. hit: where it reached what it looked for."""

    points: Tensor
    hit: Bool[Tensor, " b"]


def _spelled(self: Perturbation) -> str:
    """The words that `parse` reads, to six digits and without the valid range."""
    name = type(self).__name__.lower()
    values = [getattr(self, key) for key in ("eps", "k", "bits") if hasattr(self, key)]
    return f"{name}={values[0]:g}" if values else name


# Arithmetic that does not lie ---------------------------------------------------------------------------


def excess(a: Tensor, b: Tensor, eps: Tensor | float) -> Tensor:
    """The exact sign of (a - b) - eps for float64 a and b: Knuth's two-sum gives the error of a - b."""
    d = a - b
    lost = d - a
    error = (a - (d - lost)) - (b + lost)
    return torch.where(d == eps, error.sign(), (d - eps).sign())


def shifted(x: Tensor, d: Tensor | float, *, outward: bool) -> Tensor:
    """x + d in the dtype of x, moved by at most |d| from x (by at least |d| where `outward`), exactly."""
    wide, d = x.double(), torch.as_tensor(d, dtype=torch.float64, device=x.device)
    near = (wide + d).to(x.dtype)
    to, back = near.double(), d < 0
    side = excess(torch.where(back, wide, to), torch.where(back, to, wide), d.abs())
    if outward:
        return torch.where(
            side < 0, torch.nextafter(near, torch.full_like(near, math.inf) * d.sign().to(x.dtype)), near
        )
    return torch.where(side > 0, torch.nextafter(near, x), near)


def rounded(value: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """The float64 value in another dtype, rounded up or down."""
    near = value.to(dtype)
    wrong = near.double() < value if up else near.double() > value
    return torch.where(
        wrong, torch.nextafter(near, torch.full_like(near, math.inf if up else -math.inf)), near
    )


def shrunk(d: Float[Tensor, "b n"], eps: float, p: int) -> Float[Tensor, "b n"]:
    """Each float64 row scaled down until its p-norm is at most eps, whatever the rounding."""
    norm = torch.linalg.vector_norm(d, p, dim=1, keepdim=True)
    safe = eps * (1 - (d.shape[1] + 16) * UNIT)
    return d * (safe / norm.clamp(min=torch.finfo(d.dtype).tiny)).clamp(max=1.0)


def in_ball(s: Num[Tensor, "b *in"], x: Num[Tensor, "b *in"], eps: float, p: int) -> Bool[Tensor, " b"]:
    """sum |s - x|^p <= eps^p: in float64 where its error bound settles it, else in rationals."""
    d = (s.double() - x.double()).reshape(len(x), -1)
    total, bound = d.abs().pow(p).sum(1), eps**p
    unclear = total.isfinite() & ((total - bound).abs() <= 2 * (d.shape[1] + 16) * UNIT * (total + bound))
    inside = total <= bound
    for row in unclear.nonzero()[:, 0].tolist():
        pairs = zip(s[row].reshape(-1).tolist(), x[row].reshape(-1).tolist())
        inside[row] = sum(abs(Fraction(u) - Fraction(v)) ** p for u, v in pairs) <= Fraction(eps) ** p
    return inside


def highest(
    terms: Float[Tensor, "b k n"], rest: Float[Tensor, "b k"] | float, dtype: torch.dtype
) -> Float[Tensor, "b k"]:
    """The sum of the float64 terms plus `rest` (>= 0), rounded up by more than its error."""
    slack = (terms.abs().sum(-1) + rest) * ((terms.shape[-1] + 16) * UNIT) + torch.finfo(torch.float64).tiny
    return rounded(terms.sum(-1) + rest + slack, dtype, up=True)


def box_support(a: Float[Tensor, "b k *in"], lower: Tensor, upper: Tensor) -> Float[Tensor, "b k"]:
    """max <a, s> over lower <= s <= upper."""
    flat = a.double().flatten(2)
    low, high = (corner.double().reshape(len(a), 1, -1) for corner in (lower, upper))
    return highest(torch.maximum(flat * low, flat * high), 0.0, a.dtype)


# Balls --------------------------------------------------------------------------------------------------


def _checked_ball(self: Ball) -> None:
    name = type(self).__name__
    if not (math.isfinite(self.eps) and self.eps >= 0):
        raise BadInput(
            f"{name.lower()}={self.eps}: the radius is a number of at least 0; write for example linf=0.01"
        )
    if self.low is not None and self.high is not None and not self.low <= self.high:
        raise BadInput(
            f"{name}: low={self.low} is not below high={self.high}; give the valid range as low, high"
        )


def _valid(self: Ball, x: Tensor) -> None:
    """Raises where x is no input of this kind."""
    name = type(self).__name__.lower()
    if not x.is_floating_point():
        raise DoesNotFit(
            f"the inputs are whole numbers ({x.dtype}), but {name} needs floating point; attack embeddings"
        )
    for bound, wrong in ((self.low, torch.lt), (self.high, torch.gt)):
        if bound is not None and (outside := wrong(x.double(), bound)).any():
            value = x[outside][0].item()
            raise BadInput(
                f"an input holds {value:g}, outside its valid range {self.low} to {self.high}; scale the data"
            )


def _edges(self: Ball, x: Tensor, *, outward: bool) -> tuple[Tensor, Tensor]:
    """The box around the ball, cut to the valid range, rounded outwards or inwards."""
    _valid(self, x)
    lower, upper = shifted(x, -self.eps, outward=outward), shifted(x, self.eps, outward=outward)
    return _cut(self, lower, outward=outward), _cut(self, upper, outward=outward)


def _cut(self: Ball, s: Tensor, *, outward: bool) -> Tensor:
    """s clipped to the valid range, whose ends are rounded outwards or inwards."""
    if self.low is not None:
        s = s.maximum(rounded(s.new_full((), self.low, dtype=torch.float64), s.dtype, up=not outward))
    if self.high is not None:
        s = s.minimum(rounded(s.new_full((), self.high, dtype=torch.float64), s.dtype, up=outward))
    return s


def _ball_contains(self: Ball, s: Num[Tensor, "b *in"], x: Num[Tensor, "b *in"]) -> Bool[Tensor, " b"]:
    wide = s.double()
    inside = wide.isfinite()
    if self.low is not None:
        inside &= wide >= self.low
    if self.high is not None:
        inside &= wide <= self.high
    if self.norm == math.inf:
        to = x.double()
        inside &= (excess(wide, to, self.eps) <= 0) & (excess(to, wide, self.eps) <= 0)
        return inside.reshape(len(x), -1).all(1)
    return inside.reshape(len(x), -1).all(1) & in_ball(s, x, self.eps, int(self.norm))


def _ball_project(self: Ball, s: Tensor, x: Tensor) -> Tensor:
    """Linf clips; L2 clips to the range and scales the change, L1 thresholds it (Duchi et al. 2008)."""
    if self.norm == math.inf:
        return torch.clamp(s, *_edges(self, x, outward=False))
    _valid(self, x)
    d = (_cut(self, s, outward=False).double() - x.double()).reshape(len(x), -1)
    if self.norm == 1:
        ranked = d.abs().sort(1, descending=True).values
        mean = (ranked.cumsum(1) - self.eps) / torch.arange(1, d.shape[1] + 1, device=d.device)
        last = (ranked > mean).sum(1, keepdim=True).clamp(min=1) - 1
        d = d.sign() * (d.abs() - mean.gather(1, last).clamp(min=0)).clamp(min=0)
    moved = shifted(x, shrunk(d, self.eps, int(self.norm)).reshape(x.shape), outward=False)
    kept = _ball_contains(self, s, x).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(kept, s, moved)


def _ball_sample(self: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in the ball, before the valid range cuts it."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device=generator.device)

    b, n = len(x), x[0].numel()
    if self.norm == math.inf:
        d = 2 * draw(b, n) - 1
    elif self.norm == 2:
        d = torch.randn(b, n, generator=generator, dtype=torch.float64, device=generator.device)
        d = d / d.norm(dim=1, keepdim=True) * draw(b, 1) ** (1 / n)
    else:
        weights = -torch.log1p(-draw(b, n + 1))
        d = (weights / weights.sum(1, keepdim=True))[:, :n] * (2 * (draw(b, n) < 0.5) - 1)
    d = (self.eps * d).to(x.device).reshape(x.shape)
    return self.project((x.double() + d).to(x.dtype), x)


def _ball_corners(self: Ball, x: Tensor) -> tuple[Tensor, Tensor]:
    return _edges(self, x, outward=True)


def _ball_support(self: Ball, a: Float[Tensor, "b k *in"], x: Float[Tensor, "b *in"]) -> Float[Tensor, "b k"]:
    """The smaller of <a, x> + eps |a|_q, 1/p + 1/q = 1, and the same over the corners."""
    cornered = box_support(a, *_ball_corners(self, x))
    if self.norm == math.inf:
        return cornered
    flat = a.double().flatten(2)
    dual = torch.linalg.vector_norm(flat, 2 if self.norm == 2 else math.inf, dim=2)
    return torch.minimum(
        highest(flat * x.double().reshape(len(x), 1, -1), self.eps * dual, a.dtype), cornered
    )


def _ball_steepest(
    self: Ball, gradient: Float[Tensor, "b *in"], x: Float[Tensor, "b *in"]
) -> Float[Tensor, "b *in"]:
    """The step of size eps that raises a linear function most; L1 spreads it over the steepest hundredth."""
    if self.norm == math.inf:
        return self.eps * gradient.sign()
    flat = gradient.reshape(len(x), -1)
    if self.norm == 1:
        count = max(1, flat.shape[1] // 100)
        least = flat.abs().topk(count, 1).values[:, -1:]
        flat = flat.sign() * (flat.abs() >= least)
    norm = torch.linalg.vector_norm(flat, int(self.norm), dim=1, keepdim=True)
    return (self.eps * flat / norm.clamp(min=torch.finfo(flat.dtype).tiny)).reshape(x.shape)


@dataclass(frozen=True)
class Linf:
    """No coordinate moves by more than eps (units of the input) or leaves [low, high]."""

    eps: float
    low: float | None = None
    high: float | None = None
    norm: ClassVar[float] = math.inf
    __post_init__ = _checked_ball
    project, sample, contains = _ball_project, _ball_sample, _ball_contains
    corners, support, steepest = _ball_corners, _ball_support, _ball_steepest
    __str__ = _spelled


@dataclass(frozen=True)
class L2:
    """The Euclidean length of the change is at most eps; no coordinate leaves [low, high]."""

    eps: float
    low: float | None = None
    high: float | None = None
    norm: ClassVar[float] = 2
    __post_init__ = _checked_ball
    project, sample, contains = _ball_project, _ball_sample, _ball_contains
    corners, support, steepest = _ball_corners, _ball_support, _ball_steepest
    __str__ = _spelled


@dataclass(frozen=True)
class L1:
    """The changes add up to at most eps; no coordinate leaves [low, high]."""

    eps: float
    low: float | None = None
    high: float | None = None
    norm: ClassVar[float] = 1
    __post_init__ = _checked_ball
    project, sample, contains = _ball_project, _ball_sample, _ball_contains
    corners, support, steepest = _ball_corners, _ball_support, _ball_steepest
    __str__ = _spelled


@dataclass(frozen=True)
class WeightLinf:
    """No weight moves by more than eps (units of the weight); the first axis counts output rows."""

    eps: float
    low: ClassVar[None] = None
    high: ClassVar[None] = None
    norm: ClassVar[float] = math.inf
    __post_init__ = _checked_ball
    project, sample, contains = _ball_project, _ball_sample, _ball_contains
    corners, support = _ball_corners, _ball_support
    __str__ = _spelled


Ball = Linf | L2 | L1 | WeightLinf


# Cells --------------------------------------------------------------------------------------------------


def _inner(self: Cell, x: Tensor) -> tuple[Tensor, Tensor]:
    """The cell rounded inwards to the dtype of x; raises where no number of that dtype lies inside."""
    lower, upper = self.cell(x)
    lower, upper = rounded(lower, x.dtype, up=True), rounded(upper, x.dtype, up=False)
    if (lower > upper).any():
        raise DoesNotFit(f"no {x.dtype} number lies in one of the intervals; widen the box or use float64")
    return lower, upper


def _cell_contains(self: Cell, s: Num[Tensor, "b *in"], x: Num[Tensor, "b *in"]) -> Bool[Tensor, " b"]:
    lower, upper = self.cell(x)
    return ((s.double() >= lower) & (s.double() <= upper)).reshape(len(x), -1).all(1)


def _cell_project(self: Cell, s: Tensor, x: Tensor) -> Tensor:
    return torch.clamp(s, *_inner(self, x))


def _cell_sample(self: Cell, x: Tensor, generator: torch.Generator) -> Tensor:
    lower, upper = self.cell(x)
    share = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=generator.device).to(
        x.device
    )
    return self.project((lower + (upper - lower) * share).to(x.dtype), x)


def _cell_corners(self: Cell, x: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = self.cell(x)
    return rounded(lower, x.dtype, up=False), rounded(upper, x.dtype, up=True)


def _cell_support(self: Cell, a: Float[Tensor, "b k *in"], x: Float[Tensor, "b *in"]) -> Float[Tensor, "b k"]:
    return box_support(a, *self.cell(x))


@dataclass(frozen=True, eq=False)
class Box:
    """lower <= s <= upper, wherever x is. Bounds are numbers, `*in` or `b *in`, finite, in input units."""

    lower: Tensor | float
    upper: Tensor | float

    def __post_init__(self) -> None:
        low, high = torch.as_tensor(self.lower), torch.as_tensor(self.upper)
        if not (low.isfinite().all() and high.isfinite().all() and (low <= high.to(low.device)).all()):
            raise BadInput("box: the bounds must be finite with lower <= upper everywhere; check their order")

    def cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds in float64, in the shape of x."""
        _valid(Linf(0.0), x)
        sides = [torch.as_tensor(b, dtype=torch.float64, device=x.device) for b in (self.lower, self.upper)]
        return sides[0].expand(x.shape), sides[1].expand(x.shape)

    def steepest(self, gradient: Float[Tensor, "b *in"], x: Float[Tensor, "b *in"]) -> Float[Tensor, "b *in"]:
        """Half the width of the box, in the direction of the gradient's signs."""
        lower, upper = self.cell(x)
        return gradient.sign() * (0.5 * (upper - lower)).to(x.dtype)

    project, sample, contains = _cell_project, _cell_sample, _cell_contains
    corners, support = _cell_corners, _cell_support
    __str__ = _spelled


@dataclass(frozen=True)
class Rounding:
    """Around a weight `out in *kernel`: what a grid of its range rounds to the same codes (`core.grid`).

    Half a step to each side of the decoded code, widened where needed to hold the weight itself.
    """

    bits: int = 4
    symmetric: bool = False
    group: int = grid.PER_ROW

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 8 and self.group >= grid.PER_TENSOR):
            raise BadInput(
                f"rounding={self.bits}, group={self.group}: give 2 to 8 bits and a group of at least -1"
            )

    def cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each weight in float64, exact: scales are float16 or float32, codes have 8 bits."""
        how = grid.Grid(self.bits, self.symmetric, self.group)
        groups = grid.in_groups(x, self.group)
        scale, zero = grid.scale_and_zero(*grid.extent(groups, self.symmetric), how)
        codes = grid.to_codes(groups, scale, zero, how).double() - zero.double()[:, None]
        sides = [((codes + half) * scale.double()[:, None]).reshape(x.shape) for half in (-0.5, 0.5)]
        return torch.minimum(sides[0], x.double()), torch.maximum(sides[1], x.double())

    project, sample, contains = _cell_project, _cell_sample, _cell_contains
    corners, support = _cell_corners, _cell_support
    __str__ = _spelled


Cell = Box | Rounding


# Flips --------------------------------------------------------------------------------------------------


def _few(gain: Float[Tensor, "*rows n"], k: int) -> Bool[Tensor, "*rows n"]:
    """True at the k largest gains of each row that are above 0; ties go to the lower place."""
    places = gain.argsort(dim=-1, descending=True, stable=True)[..., : max(k, 0)]
    return torch.zeros_like(gain, dtype=torch.bool).scatter(-1, places, True) & (gain > 0)


def _flip_support(
    a: Float[Tensor, "b k n"], base: Num[Tensor, "b n"], gain: Float[Tensor, "b k m"], k: int
) -> Tensor:
    """<a, x> and the k best gains of flips, which add up because no two flips touch."""
    best = torch.where(_few(gain, k), gain, 0.0).sum(-1)
    return highest(a.double() * base.double()[:, None], best * (1 + gain.shape[-1] * UNIT), a.dtype)


def _checked_flips(self: BitFlips | EdgeFlips) -> None:
    if self.k < 0:
        raise BadInput(
            f"{type(self).__name__.lower()}={self.k}: the number of flips is a whole number of at least 0"
        )


@dataclass(frozen=True)
class BitFlips:
    """Memory of uint8 codes: at most k bits of each example differ; a whole memory is one: `codes[None]`."""

    k: int
    __post_init__ = _checked_flips
    __str__ = _spelled

    def project(self, s: UInt8[Tensor, "b *in"], x: UInt8[Tensor, "b *in"]) -> UInt8[Tensor, "b *in"]:
        """The k most significant of the bits in which s differs."""
        return x ^ _joined(_few(_bits(s ^ x).reshape(len(x), -1) * _worth(x), self.k), x)

    def sample(self, x: UInt8[Tensor, "b *in"], generator: torch.Generator) -> UInt8[Tensor, "b *in"]:
        """k different bits of each example, or all, flipped."""
        shape = (len(x), 8 * x[0].numel())
        order = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return x ^ _joined(_few(order.to(x.device) + 1, self.k), x)

    def contains(self, s: UInt8[Tensor, "b *in"], x: UInt8[Tensor, "b *in"]) -> Bool[Tensor, " b"]:
        """Counted on the bits."""
        return _bits(s ^ x).reshape(len(x), -1).sum(1) <= self.k

    def corners(self, x: UInt8[Tensor, "b *in"]) -> tuple[Tensor, Tensor]:
        """Each code alone: its k highest ones cleared, its k highest zeros set."""
        ones = _bits(x) * _worth(x[:0].new_zeros(1, 1))
        zeros = _bits(~x) * _worth(x[:0].new_zeros(1, 1))
        return x ^ _joined(_few(ones, self.k), x), x ^ _joined(_few(zeros, self.k), x)

    def support(self, a: Float[Tensor, "b k *in"], x: UInt8[Tensor, "b *in"]) -> Float[Tensor, "b k"]:
        """<a, x> and the k flips that raise it most."""
        flat, base = a.double().flatten(2), x.reshape(len(x), -1)
        ways = (1 - 2 * _bits(base)) * _worth(base[:, :1])
        gain = (flat[..., None] * ways[:, None]).flatten(2)
        return _flip_support(a.flatten(2), base, gain, self.k)


def _bits(x: UInt8[Tensor, "b *in"]) -> Float[Tensor, "b *in 8"]:
    """The bits of each code as 0 and 1, least significant first."""
    return ((x[..., None] >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1).double()


def _worth(x: UInt8[Tensor, "b *in"]) -> Float[Tensor, " bits"]:
    """1, 2, 4 ... 128, once for each code of an example."""
    return (2.0 ** torch.arange(8, dtype=torch.float64, device=x.device)).repeat(x[0].numel())


def _joined(bits: Bool[Tensor, "*any"], x: UInt8[Tensor, "b *in"]) -> UInt8[Tensor, "b *in"]:
    """Bits put together to codes in the shape of x."""
    weights = 2 ** torch.arange(8, device=x.device)
    return (bits.reshape(-1, 8) * weights).sum(1).to(torch.uint8).reshape(x.shape)


@dataclass(frozen=True)
class EdgeFlips:
    """Undirected graphs `b n n` of 0 and 1: at most k edges of each are added or taken away, no loops."""

    k: int
    __post_init__ = _checked_flips
    __str__ = _spelled

    def project(self, s: Num[Tensor, "b n n"], x: Num[Tensor, "b n n"]) -> Num[Tensor, "b n n"]:
        """The k edges that s moved furthest, of those it moved by more than a half."""
        moved = (s.double() - x.double()) * (1 - 2 * x.double())
        return self._flipped(x, _few(_upper(moved + moved.mT) / 2 - 0.5, self.k))

    def sample(self, x: Num[Tensor, "b n n"], generator: torch.Generator) -> Num[Tensor, "b n n"]:
        """k different edges of each graph, or all, flipped."""
        shape = _upper(x).shape
        order = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return self._flipped(x, _few(order.to(x.device) + 1, self.k))

    def contains(self, s: Num[Tensor, "b n n"], x: Num[Tensor, "b n n"]) -> Bool[Tensor, " b"]:
        """Still undirected, of 0 and 1, with the same loops, and at most k edges differ."""
        form = ((s == 0) | (s == 1)) & (s == s.mT)
        loops = (s.diagonal(dim1=1, dim2=2) == x.diagonal(dim1=1, dim2=2)).all(1)
        return form.flatten(1).all(1) & loops & ((_upper(s) != _upper(x)).sum(1) <= self.k)

    def corners(self, x: Num[Tensor, "b n n"]) -> tuple[Tensor, Tensor]:
        """0 and 1 for every edge, loops as they are; x itself for k = 0."""
        loop = torch.eye(x.shape[1], dtype=torch.bool, device=x.device) | (self.k == 0)
        return torch.where(loop, x, torch.zeros_like(x)), torch.where(loop, x, torch.ones_like(x))

    def support(self, a: Float[Tensor, "b k n n"], x: Num[Tensor, "b n n"]) -> Float[Tensor, "b k"]:
        """<a, x> and the k flips that raise it most."""
        gain = _upper(a.double() + a.double().mT) * (1 - 2 * _upper(x).double())[:, None]
        return _flip_support(a.flatten(2), x.flatten(1), gain, self.k)

    def _flipped(self, x: Tensor, edges: Bool[Tensor, "b pairs"]) -> Tensor:
        """x with those edges flipped; raises where x is no undirected graph."""
        if not (((x == 0) | (x == 1)) & (x == x.mT)).all():
            raise BadInput(
                "edgeflips: the graph is no symmetric matrix of 0 and 1; give its undirected adjacency"
            )
        both = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        row, column = torch.triu_indices(*x.shape[1:], offset=1, device=x.device)
        both[:, row, column] = edges
        return torch.where(both | both.mT, 1 - x, x)


def _upper(x: Num[Tensor, "*b n n"]) -> Num[Tensor, "*b pairs"]:
    """Each undirected pair once."""
    row, column = torch.triu_indices(*x.shape[-2:], offset=1, device=x.device)
    return x[..., row, column]


# Words --------------------------------------------------------------------------------------------------

SETS: dict[str, Callable[..., Perturbation]] = {
    "linf": Linf,
    "l2": L2,
    "l1": L1,
    "weightlinf": WeightLinf,
    "rounding": Rounding,
    "bitflips": BitFlips,
    "edgeflips": EdgeFlips,
}
WHOLE = ("rounding", "bitflips", "edgeflips")


def parse(text: str) -> Perturbation:
    """From "linf=0.01", "linf=2/255", "l2=0.5", "l1=3", "rounding", "rounding=4", "bitflips=3", ..."""
    name, _, value = (word.strip() for word in text.partition("="))
    if name.lower() not in SETS:
        raise unknown("set", name, SETS)
    name = name.lower()
    if name == "rounding" and not value:
        return Rounding()
    try:
        return SETS[name](
            int(value) if name in WHOLE else float(Fraction(value)) if "/" in value else float(value)
        )
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        kind, example = ("whole number", 3) if name in WHOLE else ("number", 0.01)
        raise BadInput(
            f"{text.strip()!r}: {value!r} is not a {kind}; write for example {name}={example}"
        ) from error


def with_range(within: Perturbation, low: float | None, high: float | None) -> Perturbation:
    """The set cut to valid inputs; sets of weights, memories and graphs have no range and stay."""
    if isinstance(within, Linf | L2 | L1):
        lows = [bound for bound in (within.low, low) if bound is not None]
        highs = [bound for bound in (within.high, high) if bound is not None]
        return replace(within, low=max(lows, default=None), high=min(highs, default=None))
    if isinstance(within, Box):
        lower, upper = torch.as_tensor(within.lower), torch.as_tensor(within.upper)
        return Box(
            lower.double().clamp(min=low) if low is not None else lower,
            upper.double().clamp(max=high) if high is not None else upper,
        )
    return within


# Ascent -------------------------------------------------------------------------------------------------


def ascend(
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Float[Tensor, "b *in"],
    within: Perturbation,
    *,
    steps: int,
    restarts: int,
    seed: int,
) -> Found:
    """Projected gradient ascent: points of the set around x with a high score.

    score: (points `b *in`, their rows in x) -> (value `b`, reached `b` bool), differentiable in the points.
    It starts at x, then `restarts` times at a random point of the set; steps shrink from eps to 0 as a half
    cosine. What has reached leaves the batch; elsewhere the best point seen is kept.
    """
    if not isinstance(within, Linf | L2 | L1 | Box):
        raise DoesNotFit(f"{within} is no set of inputs; give one of linf, l2, l1 to search around an input")
    generator = torch.Generator().manual_seed(seed)
    points = within.project(x, x)
    best, hit = (value.detach() for value in score(points, torch.arange(len(x), device=x.device)))
    for _ in range(restarts):
        rows = (~hit).nonzero()[:, 0]
        s = within.sample(x, generator)[rows]
        for step in range(steps + 1):
            if len(rows) == 0:
                break
            s = s.detach().requires_grad_()
            value, reached = score(s, rows)
            gradient = torch.autograd.grad(value.sum(), s)[0].nan_to_num(0.0)
            s, value = s.detach(), value.detach()
            better = reached | (value > best[rows])
            points[rows[better]], best[rows[better]], hit[rows] = s[better], value[better], reached
            rows, s, gradient = rows[~reached], s[~reached], gradient[~reached]
            size = 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
            s = within.project(s + size * within.steepest(gradient, x[rows]), x[rows])
    return Found(points, hit)
