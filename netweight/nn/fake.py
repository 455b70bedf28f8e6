"""Rounding of activations inside a forward pass: values stay floating point but lie on an integer grid.

    static    y = (clip(round(x / s) + z, 0, 2^b - 1) - z) s      with s, z fixed after calibration
    dynamic   the same with s, z from each token's own range at run time

Gradients pass straight through where x is inside the range and are zero outside (Jacob et al. 2018,
arXiv:1712.05877; Bengio et al. 2013, arXiv:1308.3432). Rounding is half to even. `round_between` is for
ranges that are learnt: its gradients reach them too (Esser et al., "Learned Step Size Quantization", ICLR
2020, arXiv:1902.08153).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def fake_round(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x on the grid; `scale` and `zero` broadcast against x. Straight-through gradient inside the range."""
    lower, upper = -zero * scale, (2**bits - 1 - zero) * scale
    inside = torch.minimum(torch.maximum(x, lower), upper)
    rounded = ((inside / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
    return rounded.detach() + (inside - inside.detach())  # the second term is 0: the value is on the grid


def round_between(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """x on the grid from lo <= 0 to hi >= 0, which are `... 1` beside `... n`; gradients reach all three.

    They are those of (clip(round(x / s) + z) - z) s, s = (hi - lo) / (2^b - 1), z = round(-lo / s), where
    round counts as the identity.
    """
    return _Between.apply(x, lo.clamp(max=0), hi.clamp(min=0), bits)


class _Between(torch.autograd.Function):
    """One step where the chain of single operators takes a dozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
        """The values on the grid."""
        top = 2**bits - 1
        scale, zero = grid_of(lo, hi, bits)
        ratio = x / scale
        near = ratio.round()
        code = near + zero
        inside = (code >= 0) & (code <= top)
        level = code.clamp_(0, top).sub_(zero)
        ctx.save_for_backward(inside, torch.where(inside, near - ratio, level), scale, lo)
        ctx.top = top
        return level * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, lo and hi; none of the latter where the range is a point."""
        inside, by_scale, scale, lo = ctx.saved_tensors
        (g,) = grads
        within = g * inside
        to_scale = (g * by_scale).sum(-1, keepdim=True)
        to_zero = (within - g).sum(-1, keepdim=True) * scale
        to_scale = (to_scale + to_zero * lo / scale.square()) / ctx.top
        return within, -to_scale - to_zero / scale, to_scale, None


def learnt_round(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`fake_round` with a gradient for the scale too: round(x / s) - x / s inside the range, the end's code
    less z outside (Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153)."""
    ratio = x / scale
    whole = ratio + (ratio.round() - ratio).detach()
    return ((whole + zero).clamp(0, 2**bits - 1) - zero) * scale


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

    def stored(self) -> DynamicRounding:
        """As it is stored."""
        return DynamicRounding(self.bits)
