"""Rounding of activations inside a forward pass: values stay floating point but lie on an integer grid.

    static    y = (clip(round(x / s) + z, 0, 2^b - 1) - z) s      with s, z fixed after calibration
    dynamic   the same with s, z from each token's own range at run time

Gradients pass straight through where x is inside the range and are zero outside (Jacob et al. 2018,
arXiv:1712.05877; Bengio et al. 2013, arXiv:1308.3432). Rounding is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


def fake_round(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x on the grid; `scale` and `zero` broadcast against x. Straight-through gradient inside the range."""
    lower, upper = -zero * scale, (2**bits - 1 - zero) * scale
    inside = torch.minimum(torch.maximum(x, lower), upper)
    rounded = ((inside / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
    return rounded.detach() + (inside - inside.detach())  # the second term is 0: the value is on the grid


def grid_of(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (whole, as floats) for the range from lo <= 0 to hi >= 0."""
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = (hi - lo) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-lo / scale).round().clamp(0, 2**bits - 1)


@dataclass(frozen=True)
class StaticRounding:
    """The input of a layer on a fixed grid. scale, zero: scalars (zero is whole). bits: 2 to 16."""

    scale: Float[Tensor, ""]
    zero: Float[Tensor, ""]
    bits: int = 8

    @classmethod
    def of(cls, lo: float, hi: float, bits: int = 8) -> StaticRounding:
        """For inputs seen between lo and hi."""
        return cls(*grid_of(torch.tensor(lo), torch.tensor(hi), bits), bits)

    def module(self) -> nn.Module:
        """The rounding as a layer."""
        return Static(self)


@dataclass(frozen=True)
class DynamicRounding:
    """The input of a layer on the grid of each token's own range (the last axis). bits: 2 to 16."""

    bits: int = 8

    def module(self) -> nn.Module:
        """The rounding as a layer."""
        return Dynamic(self.bits)


class Static(nn.Module):
    """Rounds to a fixed grid."""

    def __init__(self, rounding: StaticRounding) -> None:
        super().__init__()
        self.bits = rounding.bits
        self.register_buffer("scale", rounding.scale, persistent=False)
        self.register_buffer("zero", rounding.zero, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        return fake_round(x, self.scale, self.zero, self.bits)


class Dynamic(nn.Module):
    """Rounds each token to the grid of its own range."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        scale, zero = grid_of(x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True), self.bits)
        return fake_round(x, scale, zero, self.bits)
