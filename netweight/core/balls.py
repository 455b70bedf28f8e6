"""Balls around a point: Linf, L2 and L1 around inputs, within a range, and WeightLinf around weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.exact import box_support, excess, highest, in_ball, rounded, shifted, shrunk, spelled


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


def check_valid(self: Ball, x: Tensor) -> None:
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
    check_valid(self, x)
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
    check_valid(self, x)
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
    __str__ = spelled


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
    __str__ = spelled


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
    __str__ = spelled


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
    __str__ = spelled


Ball = Linf | L2 | L1 | WeightLinf
