"""Whether a series of measurements looks tampered with: a two-sample test, and how it remembers itself.

Papers: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012 (maximum mean discrepancy, MMD; the median of
the distances as the kernel's width; p by permutation).

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
    k(a, b) = exp(-|a - b|^2 / (2 width^2)),

    p = (1 + number of permutations with as large an MMD^2) / (1 + number of permutations),

    autocorrelation at lag k = sum_t (z_t - m)(z_{t+k} - m) / sum_t (z_t - m)^2.

A row may be one hour or, through `windows`, a week: what no single sample tells, a longer one may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import BadInput


@dataclass(frozen=True)
class Discrepancy:
    """mmd2: the unbiased estimate, may be below 0. p: how likely as large a one is without a difference."""

    mmd2: float
    p: float


def two_samples(
    x: Float[Tensor, "n f"], y: Float[Tensor, "m f"], *, permutations: int = 200, seed: int = 0
) -> Discrepancy:
    """The MMD of two samples with its p-value.

    Raises `BadInput` for fewer than two rows, unequal columns and less than one permutation.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise BadInput(
            f"samples of shape {tuple(x.shape)} and {tuple(y.shape)}: give two rows or more each, of the "
            "same columns"
        )
    if permutations < 1:
        raise BadInput(f"permutations={permutations}: a p-value needs at least one")
    k, n = kernel(torch.cat([x, y]).double()), len(x)
    first = torch.arange(len(k)) < n
    generator = torch.Generator().manual_seed(seed)
    drawn = [first] + [first[torch.randperm(len(k), generator=generator)] for _ in range(permutations)]
    found = discrepancies(k, torch.stack(drawn).to(k))
    # a permutation that swaps nothing gives the same number up to rounding
    as_large = (found[1:] >= found[0] - 1e-12).sum()
    return Discrepancy(float(found[0]), float(1 + as_large) / (1 + permutations))


def kernel(z: Float[Tensor, "n f"]) -> Float[Tensor, "n n"]:
    """k of all pairs; the width is the median distance of different rows (1 where all are the same)."""
    apart = torch.cdist(z, z)
    pairs = apart[*torch.triu_indices(len(z), len(z), 1)]
    width = pairs.median()
    return torch.exp(-apart.square() / (2 * torch.where(width > 0, width, torch.ones_like(width)) ** 2))


def discrepancies(k: Float[Tensor, "n n"], first: Float[Tensor, "p n"]) -> Float[Tensor, " p"]:
    """MMD^2 for each way to say which rows are of the first sample (1) and which of the second (0)."""
    second = 1 - first
    n, m = first.sum(1), second.sum(1)
    within = [((g @ k) * g).sum(1) - g @ k.diagonal() for g in (first, second)]
    across = ((first @ k) * second).sum(1)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * across / (n * m)


def windows(series: Float[Tensor, "t f"], length: int) -> Float[Tensor, "n f_length"]:
    """Stretches of the series one after the other, each as one row; a rest is left out."""
    count = len(series) // length if length > 0 else 0
    if count < 1:
        raise BadInput(f"a series of {len(series)} has no window of {length}; give a shorter one")
    return series[: count * length].reshape(count, -1)


def autocorrelation(series: Float[Tensor, "t ..."], lags: int) -> Float[Tensor, "lags ..."]:
    """At lags 1 to `lags` along the first axis; 0 for a series that never changes."""
    if not 1 <= lags < len(series):
        raise BadInput(f"lags={lags}: give 1 to {len(series) - 1} for a series of {len(series)}")
    z = series.double() - series.double().mean(0)
    whole = z.square().sum(0)
    found = torch.stack([(z[:-lag] * z[lag:]).sum(0) for lag in range(1, lags + 1)])
    return found / torch.where(whole > 0, whole, torch.ones_like(whole))
