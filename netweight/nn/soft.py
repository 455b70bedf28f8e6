"""Rounding that is learnt: each weight between its two neighbours on the grid, until it is told to choose.

Paper: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv:2004.10568.

    W' = s (clip(floor(W / s) + h(V) + z, ..) - z),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

V starts where W' = W; `undecided` is 0 where every h is 0 or 1, and in the end h >= 1/2 goes up.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.grid import Grid, extent, in_groups, scale_and_zero
from netweight.nn.layers import run
from netweight.nn.packed import Affine

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
WARM_UP = 0.2  # share of the steps without the second term
BETA_START, BETA_END = 20.0, 2.0


def share(V: Tensor) -> Tensor:
    """h(V), the stretched and clipped sigmoid."""
    return (torch.sigmoid(V) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def start(fraction: Tensor) -> Tensor:
    """V with h(V) = fraction, which lies in [0, 1]."""
    return torch.logit((fraction - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))


def undecided(h: Tensor, progress: float) -> Tensor:
    """sum (1 - |2 h - 1|^beta) at that share of the steps; 0 during the warm-up."""
    if progress < WARM_UP:
        return h.new_zeros(())
    along = (progress - WARM_UP) / (1 - WARM_UP)
    beta = BETA_END + (BETA_START - BETA_END) * (1 + math.cos(math.pi * along)) / 2
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def encode(
    weight: Float[Tensor, "out in *kernel"],
    scale: Tensor,
    zero: Tensor,
    up: Bool[Tensor, "groups of"],
    grid: Grid,
) -> Affine:
    """The codes floor(W / s) + up + z."""
    codes = (
        (in_groups(weight.float(), grid.group) / scale.float()[:, None]).floor() + up + zero.float()[:, None]
    )
    return Affine.of(codes.clamp(*map(float, grid.levels)).to(torch.uint8), scale, zero, weight, grid)


class SoftLayer(nn.Module):
    """The Linear or Conv layer `like` with the weight W'; `V` is what is learnt."""

    def __init__(self, like: nn.Module, weight: Tensor, grid: Grid, layer: str = "weight") -> None:
        """Raises `DoesNotFit` where the group of the grid does not divide a row of `layer`."""
        super().__init__()
        self.like, self.source, self.grid = like, weight, grid
        groups = in_groups(weight, grid.group, layer)
        self.scale, self.zero = scale_and_zero(*extent(groups, grid.symmetric), grid)
        s, z = self.scale.float()[:, None], self.zero.float()[:, None]
        ratio = groups.float() / s
        self.step, self.low, self.high = s, grid.levels[0] - z, grid.levels[1] - z
        self.floor = ratio.floor()
        self.V = nn.Parameter(start(ratio - self.floor))

    @property
    def h(self) -> Float[Tensor, "groups of"]:
        """The share by which each weight is above its lower neighbour."""
        return share(self.V)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives for x with the weight W'."""
        soft = torch.clamp(self.floor + self.h, self.low, self.high) * self.step
        return run(self.like, x, soft.reshape(self.source.shape).to(self.source.dtype))

    def form(self) -> Affine:
        """W' as it is stored once every weight has chosen."""
        return encode(self.source, self.scale, self.zero, self.h.detach() >= 0.5, self.grid)
