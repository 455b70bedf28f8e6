"""Arithmetic on sets that does not lie: exact comparisons, and rounding outwards or inwards."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

UNIT = 2.0**-52


def spelled(self: object) -> str:
    """The words for a set that `core.perturbation.parse` reads, to six digits and without the valid range."""
    name = type(self).__name__.lower()
    values = [getattr(self, key) for key in ("eps", "k", "bits") if hasattr(self, key)]
    return f"{name}={values[0]:g}" if values else name


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
