"""Dyadic numbers: a positive factor as m 2^-e, so that scales change by multiplication, addition and shift.

    r = m 2^-e,   2^30 <= m < 2^31,                        |m 2^-e - r| <= 2^-31 r
    rescale(q) = clip((q m + 2^(e-1)) >> e, low, high)     in int64: r q rounded half up, whatever its sign

Paper: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, arXiv:2011.10680, section 3.2.
The shift of a negative number is arithmetic (towards minus infinity), so halves go up on both sides of 0.

`rescale_whole` gives the same whole numbers in float64. A product q m has up to 62 bits, of which float64
keeps 53; where it could have more, it is taken in two parts, m = 2^16 m' + m'':

    floor((q m + 2^(e-1)) / 2^e) = floor((q m' + floor(q m'' / 2^16) + 2^(e-17)) / 2^(e-16)),

in which every term is exact: what the inner floor drops is less than one of a sum of whole numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from netweight.core.errors import DoesNotFit

BITS = 31  # of m
LOWEST, LARGEST = 17, 62  # of e: below, a part would not be whole; above, 2^31 r < 1/2
INT32 = (-(2**31), 2**31 - 1)
EXACT = 2**52  # |q m| below this: q r + 1/2 is exact in float64


@dataclass(frozen=True)
class Dyadic:
    """m and e, of one shape. m is 0 where r is so small that r q rounds to 0 for every int32 q."""

    multiplier: Int64[Tensor, "*_"]
    shift: Int64[Tensor, "*_"]

    def __post_init__(self) -> None:
        m, e = self.multiplier, self.shift
        whole = m.dtype == e.dtype == torch.int64 and m.shape == e.shape and m.numel() > 0
        if not whole or bool(((m < 0) | (m >= 2**BITS) | (e < LOWEST) | (e > LARGEST)).any()):
            raise ValueError(
                f"a dyadic number has 0 <= m < 2^{BITS} and {LOWEST} <= e <= {LARGEST}, both int64"
            )

    @classmethod
    def of(cls, ratio: Float[Tensor, "*_"], what: str = "rescaling") -> Dyadic:
        """The nearest m 2^-e of each positive factor. Raises `DoesNotFit`, naming `what`, from 2^14 on."""
        if not bool((ratio.isfinite() & (ratio > 0)).all()):
            raise DoesNotFit(f"{what}: a scale is not positive and finite; calibrate on other data")
        mantissa, exponent = torch.frexp(ratio.double())
        m = (mantissa * 2.0**BITS).round().to(torch.int64)  # half to even: this is a number, not a shift
        e = BITS - exponent.to(torch.int64)
        m, e = torch.where(m == 2**BITS, m // 2, m), torch.where(m == 2**BITS, e - 1, e)
        if bool((e < LOWEST).any()):
            raise DoesNotFit(f"{what}: its scale grows by 2^14 or more; calibrate it on wider data")
        tiny = e > LARGEST
        return cls(torch.where(tiny, 0, m), torch.where(tiny, LARGEST, e))

    def value(self) -> Float[Tensor, "*_"]:
        """m 2^-e in float64, exactly."""
        return self.multiplier.double() * powers(-self.shift)


def half_up(q: Int[Tensor, "*_"], factor: Dyadic) -> Int64[Tensor, "*_"]:
    """r q rounded half up; the factor broadcasts against q, of which every number is below 2^31 in size."""
    product = q.to(torch.int64) * factor.multiplier
    return (product + (torch.ones_like(factor.shift) << (factor.shift - 1))) >> factor.shift


def rescale(q: Int[Tensor, "*_"], factor: Dyadic, low: int, high: int) -> Int32[Tensor, "*_"]:
    """r q rounded half up and clipped to [low, high]."""
    return half_up(q, factor).clamp(low, high).to(torch.int32)


@dataclass(frozen=True)
class WholeDyadic:
    """What `rescale_whole` multiplies with, in float64: r, or the parts of m with 2^(e-17) and 2^(16-e)."""

    ratio: Float[Tensor, "*_"]
    carried: Float[Tensor, "*_"] | None = None
    half: Float[Tensor, "*_"] | None = None
    unit: Float[Tensor, "*_"] | None = None

    @classmethod
    def of(cls, factor: Dyadic, size: int) -> WholeDyadic:
        """For |q| <= size: r where q r + 1/2 is exact, else the parts."""
        m = factor.multiplier
        if size * int(m.max()) < EXACT:
            return cls(factor.value())
        unit = powers(16 - factor.shift)
        return cls((m >> 16).double(), (m & 0xFFFF).double() * 2.0**-16, 0.5 / unit, unit)


def powers(exponent: Int64[Tensor, "*_"]) -> Float[Tensor, "*_"]:
    """2^exponent in float64, exactly (torch.pow is only near)."""
    found = [math.ldexp(1.0, e) for e in exponent.flatten().tolist()]
    return torch.tensor(found, dtype=torch.float64, device=exponent.device).reshape(exponent.shape)


def rescale_whole(q: Float[Tensor, "*_"], by: WholeDyadic) -> Float[Tensor, "*_"]:
    """r q rounded half up, for whole numbers q in float64 within the size that `by` was made for."""
    if by.unit is None:
        return torch.floor(q * by.ratio + 0.5)
    return torch.floor((q * by.ratio + torch.floor(q * by.carried) + by.half) * by.unit)
