"""Rounding to nearest after the range has been chosen: by the error it leaves, or as a percentile.

Paper: Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
2020, arXiv:2004.09602, section 5 (percentile); Nagel et al., 2021, arXiv:2106.08295, section 3.1 (error).

For one group w with range [lo, hi] (see `compression/quantize/rtn.py`), Q rounds to the grid of a smaller
range and clips to it:

    mse          range [r lo, r hi],   r = argmin over 1.00, 0.99 .. 0.21 of  sum_i |w_i - Q_r(w_i)|^p
    percentile   symmetric: c the smallest value with a share q of the |w_i| at or below it,     range [-c, c]
                 asymmetric: hi likewise among the w_i, lo likewise among the -w_i, negated

Both ends shrink by the same r. r = 1 is tried first and wins ties: the error is never above that of the whole
range.

Differs from the papers: percentiles are values that occur, not read off a histogram.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import Change
from netweight.core.grid import Grid, extent, from_codes, in_groups, scale_and_zero, to_codes
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine

RATIOS = tuple(percent / 100 for percent in range(100, 20, -1))


@dataclass(frozen=True)
class Clip:
    """Settings of `clip`.

    bits, symmetric, group: as in `RTN`. range: "mse" or "percentile". percentile: the share q of weights
    inside. norm: the power p of the error.
    """

    bits: int = 4
    symmetric: bool = False
    group: int = 0
    range: str = "mse"
    percentile: float = 0.9999
    norm: float = 2.0

    def __post_init__(self) -> None:
        Grid(self.bits, self.symmetric, self.group)
        if self.range not in ("mse", "percentile"):
            raise ValueError(f"need range 'mse' or 'percentile', got range={self.range!r}")
        if not 0.5 < self.percentile <= 1:
            raise ValueError(f"need 0.5 < percentile <= 1, got percentile={self.percentile}")
        if not 0 < self.norm < math.inf:
            raise ValueError(f"need a positive norm, got norm={self.norm}")


def clip(model: nn.Module, task: Task, layers: Sequence[str], settings: Clip) -> Change:
    """Round Linear, Conv, transposed Conv and Embedding weights within chosen ranges. Looks at no data.

    Raises `DoesNotFit` for another kind of layer and where `group` does not divide a row.
    """
    weights, left = weights_to_pack(model, layers)
    return Change({layer: encode(weight, settings, layer) for layer, weight in weights.items()}, left=left)


def encode(weight: Float[Tensor, "*shape"], settings: Clip, layer: str = "weight") -> Affine:
    """The rounded weight as it is stored; `layer` is the name in error messages."""
    grid = Grid(settings.bits, settings.symmetric, settings.group)
    groups = in_groups(weight, grid.group, layer)
    if settings.range == "percentile":
        scale, zero = scale_and_zero(*percentile(groups, settings.percentile, grid.symmetric), grid)
    else:
        scale, zero = least_error(groups, grid, settings.norm)
    return Affine.of(to_codes(groups, scale, zero, grid), scale, zero, weight, grid)


def percentile(groups: Float[Tensor, "groups of"], share: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """lo <= 0 <= hi of each group: the smallest values with that share of the weights at or within them."""
    of = groups.shape[1]
    place = min(max(math.ceil(share * of - 1e-9), 1), of)  # 1e-9: 0.9 * 10 is ten times nine tenths, not more
    if symmetric:
        c = groups.abs().sort(1).values[:, place - 1]
        return -c, c
    ordered = groups.sort(1).values
    return ordered[:, of - place].clamp(max=0), ordered[:, place - 1].clamp(min=0)


def least_error(groups: Float[Tensor, "groups of"], grid: Grid, norm: float) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group for the ratio r that leaves the least error."""
    lo, hi = extent(groups, grid.symmetric)
    ratios = torch.tensor(RATIOS, dtype=torch.float32, device=groups.device)[:, None]
    both = scale_and_zero((ratios * lo.float()).reshape(-1), (ratios * hi.float()).reshape(-1), grid)
    scales, zeros = (values.reshape(len(RATIOS), -1) for values in both)  # one dtype for all ratios
    best = torch.full_like(lo, torch.inf, dtype=torch.float32)
    chosen = torch.zeros_like(lo, dtype=torch.int64)
    for index, (scale, zero) in enumerate(zip(scales, zeros)):
        rounded = from_codes(to_codes(groups, scale, zero, grid), scale, zero)
        error = (groups.float() - rounded).abs().pow(norm).sum(1)
        chosen = torch.where(error < best, index, chosen)
        best = torch.minimum(best, error)
    return scales.gather(0, chosen[None])[0], zeros.gather(0, chosen[None])[0]
