"""Rounding to nearest after the range has been chosen: by error, as a percentile, or by the KL divergence.

Paper: Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
2020, arXiv:2004.09602, section 5 (percentile); Nagel et al., 2021, arXiv:2106.08295, section 3.1 (error);
Migacz, "8-bit Inference with TensorRT", GTC 2017 (KL, there for activations).

For one group w with range [lo, hi] (see `compression/quantize/rtn.py`), Q rounds to the grid of a smaller
range and clips to it:

    mse          range [r lo, r hi],   r = argmin over 1.00, 0.99 .. 0.21 of  sum_i |w_i - Q_r(w_i)|^p
    percentile   symmetric: c the smallest value with a share q of the |w_i| at or below it,     range [-c, c]
                 asymmetric: hi likewise among the w_i, lo likewise among the -w_i, negated
    kl           [-c, c] within [lo, hi], c as in `nn/ranges.py` from 2048 bins of the |w_i| other than 0

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
from netweight.nn.ranges import BINS, RATIOS, kl_shares

RANGES = ("mse", "percentile", "kl")


@dataclass(frozen=True)
class Clip:
    """Settings of `clip`.

    bits, symmetric, group: as in `RTN`. range: "mse", "percentile" or "kl". percentile: the share q of
    weights inside. norm: the power p of the error.
    """

    bits: int = 4
    symmetric: bool = False
    group: int = 0
    range: str = "mse"
    percentile: float = 0.9999
    norm: float = 2.0

    def __post_init__(self) -> None:
        Grid(self.bits, self.symmetric, self.group)
        if self.range not in RANGES:
            raise ValueError(f"need a range of {', '.join(map(repr, RANGES))}, got range={self.range!r}")
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
    elif settings.range == "kl":
        scale, zero = scale_and_zero(*divergence(groups, grid), grid)
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


def divergence(groups: Float[Tensor, "groups of"], grid: Grid) -> tuple[Tensor, Tensor]:
    """lo <= 0 <= hi of each group by the KL divergence between its histogram and the merged one."""
    lo, hi = extent(groups, grid.symmetric)
    sizes = groups.abs().double()
    largest = sizes.amax(1, keepdim=True)
    bins = (sizes / torch.where(largest > 0, largest, 1.0) * BINS).long().clamp(max=BINS - 1)
    counts = sizes.new_zeros(len(groups), BINS).scatter_add(1, bins, (sizes > 0).double())
    c = (largest[:, 0] * kl_shares(counts, 2 ** (grid.bits - 1))).to(groups.dtype)
    return torch.maximum(lo, -c), torch.minimum(hi, c)


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
