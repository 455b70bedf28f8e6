"""Layers as integers compute them, in floating point: what fine-tuning runs, and what is packed afterwards.

A row of a weight of b bits, its bias, and an input of scale S_x:

    S_w = max |w| / (2^(b-1) - 1),    w' = S_w clip(round(w / S_w)),    b' = S_w S_x round(b / (S_w S_x))

(with a zero point where the grid is not symmetric, see `core.grid`).
b' is what an accumulator of 32 bits holds. Gradients pass straight through all three roundings (Bengio et
al. 2013, arXiv:1308.3432). S_w follows the weight, so a trained layer and the form packed from it give the
same numbers, bit for bit.

Two rows have another S_w: one that is all zero takes the smallest of the others, so that its bias has a grid
to lie on, and one whose bias would pass 2^30 steps takes what keeps it there.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.grid import Grid, extent, from_codes, in_groups, scale_and_zero, to_codes
from netweight.nn.fake import StaticRounding
from netweight.nn.layers import run
from netweight.nn.packed import Affine
from netweight.nn.quantizer import straight

MOST = 2.0**30  # steps of a bias: half of what an accumulator of 32 bits holds


def row_scales(
    weight: Float[Tensor, "out ..."], grid: Grid, bias: Tensor | None = None, step: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_w of each row as it is stored, and its zero code; `step` is S_x, None where the input is not
    rounded."""
    low, high = extent(in_groups(weight.detach(), grid.group), grid.symmetric)
    alive = high > low
    high = torch.where(alive, high, (high - low)[alive].min() if bool(alive.any()) else 1.0)
    if bias is not None and step is not None:
        least = bias.detach().abs().double() / (step.double() * MOST)
        steps = 2 ** (grid.bits - 1) - 1 if grid.symmetric else 2**grid.bits - 1
        high = torch.maximum(high, least * steps + (0 if grid.symmetric else low))
    return scale_and_zero(low, high, grid)


def rounded_bias(bias: Float[Tensor, " out"], scale: Tensor, step: Tensor | None) -> Float[Tensor, " out"]:
    """b', in the dtype of the bias; the bias itself where `step` is None."""
    if step is None:
        return bias.detach()
    unit = scale.double() * step.double()
    return ((bias.detach().double() / unit).round().clamp(-MOST, MOST) * unit).to(bias)


def pack(
    weight: Float[Tensor, "out ..."], grid: Grid, bias: Tensor | None = None, step: Tensor | None = None
) -> Affine:
    """w' as it is stored; the grid has one scale for each row."""
    scale, zero = row_scales(weight, grid, bias, step)
    codes = to_codes(in_groups(weight.detach(), grid.group), scale, zero, grid)
    return Affine.of(codes, scale, zero, weight, grid)


class Simulated(nn.Module):
    """`like` with weight, bias and input rounded on each call; its own weight and bias are what is trained.

    like: a Linear, a Conv or an Embedding. rounding: of the input, None to leave input and bias as they are.
    """

    def __init__(self, like: nn.Module, grid: Grid, rounding: StaticRounding | None) -> None:
        super().__init__()
        self.like = like
        self.grid = grid
        self.rounding = None if rounding is None else rounding.module()

    def forward(self, x: Tensor) -> Tensor:
        """What the packed layer gives for x."""
        weight, bias = self.like.weight, getattr(self.like, "bias", None)
        step = None if self.rounding is None else self.rounding.scale
        scale, zero = row_scales(weight, self.grid, bias, step)
        codes = to_codes(in_groups(weight.detach(), self.grid.group), scale, zero, self.grid)
        shell = copy.copy(self.like)
        if bias is not None:
            vars(shell)["bias"] = straight(bias, rounded_bias(bias, scale, step))
        rounded = from_codes(codes, scale, zero).reshape(weight.shape).to(weight)
        return run(shell, x if self.rounding is None else self.rounding(x), straight(weight, rounded))
