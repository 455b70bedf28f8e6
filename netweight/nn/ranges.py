"""Ranges of layer inputs for rounding to a fixed grid: what is clipped, so that what stays is finer.

Papers: Migacz, "8-bit Inference with TensorRT", GTC 2017 (kl); Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877 (moving
average); Wu et al., 2020, arXiv:2004.09602 (percentile); Nagel et al., 2021, arXiv:2106.08295 (mse).

    min-max          [min x, max x]
    moving average   m <- 0.9 m + 0.1 (min or max of the batch), from those of the first batch on
    percentile       [-c, c] within min-max, c the least bin edge with a share q of the |x| below it
    mse              [r min, r max],  r = argmin over 1.00, 0.99 .. 0.21 of  sum |x - Q_r(x)|^p
    kl               [-c, c] within min-max,  c = (i + 1/2) bins,  i = argmin over 128 .. 2048: KL(P_i | Q_i)

P_i: the first i of 2048 bins of |x|, with all beyond added to the last. Q_i: the same bins without what is
beyond, merged into 2^(b-1) levels (2^b where all x have one sign) and spread evenly over the non-empty bins
of P_i; both normalised. Zeros are left out of all histograms: every grid holds 0, and after a ReLU half of
the values would speak for clipping the others.

A spike of equal values swallows what is clipped onto it, so that kl can clip far too much there (the
background of images, at 4 bits: see the figures of `reproduce/quantization_survey.py`).

Differs from the papers: the largest i of equal divergences is taken; ends of merged bins are spread evenly
over i where the levels do not divide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit
from netweight.core.moments import watched
from netweight.core.progress import steps
from netweight.core.task import Data
from netweight.nn.fake import fake_round, grid_of

HOW = ("min-max", "moving average", "percentile", "mse", "kl")
BINS, FIRST = 2048, 128
KEPT = 0.9  # of a moving average at each batch
RATIOS = tuple(percent / 100 for percent in range(100, 20, -1))
TIE = 1e-9  # nats: a few values that stand apart are held exactly by many i, and the largest clips none
AT_ONCE = 2**23  # numbers of a table of divergences that are in memory together


@dataclass
class Seen:
    """Inputs of one layer: least and largest of every batch, and `2 bins` counts of |x|, negatives first."""

    lows: list[float]
    highs: list[float]
    counts: Float[Tensor, "2 bins"]

    @property
    def extent(self) -> tuple[float, float]:
        """Least and largest of all."""
        return min(self.lows), max(self.highs)


def input_ranges(
    model: nn.Module,
    data: Data,
    layers: Sequence[str],
    how: str = "min-max",
    *,
    bits: int = 8,
    share: float = 0.9999,
    norm: float = 2.0,
) -> dict[str, tuple[float, float]]:
    """lo <= 0 <= hi for the input of each layer on all of `data`, in one pass or two (with a histogram).

    how: one of `HOW`. bits: of the grid that is meant (mse, kl). share: q. norm: p. The model is left as it
    was. Raises `DoesNotFit` for a layer that is never called, or whose inputs hold NaN or Inf.
    """
    check(how)
    found = _extents(model, data, layers)
    if how == "min-max":
        chosen = {layer: seen.extent for layer, seen in found.items()}
    elif how == "moving average":
        chosen = {layer: (moving(seen.lows), moving(seen.highs)) for layer, seen in found.items()}
    else:
        _count(model, data, found)
        chosen = {layer: by_histogram(seen, how, bits, share, norm) for layer, seen in found.items()}
    return {layer: (min(lo, 0.0), max(hi, 0.0)) for layer, (lo, hi) in chosen.items()}


def check(how: str) -> None:
    """Raises ValueError unless that is one of `HOW`."""
    if how not in HOW:
        raise ValueError(f"need a range of {', '.join(map(repr, HOW))}, got range={how!r}")


def moving(values: Sequence[float]) -> float:
    """The moving average of the values."""
    average = values[0]
    for value in values[1:]:
        average = KEPT * average + (1 - KEPT) * value
    return average


def by_histogram(seen: Seen, how: str, bits: int, share: float, norm: float) -> tuple[float, float]:
    """The range of one layer by percentile, mse or kl."""
    lo, hi = seen.extent
    largest = max(-lo, hi)
    if largest == 0:
        return lo, hi
    if how == "mse":
        ratio = least_error(seen, bits, norm)
        return ratio * lo, ratio * hi
    sizes = seen.counts.sum(0)
    if how == "percentile":
        within = int((sizes.cumsum(0) < share * sizes.sum() - 1e-9).sum()) + 1
        c = largest * min(within, BINS) / BINS
    else:
        levels = 2**bits if lo >= 0 or hi <= 0 else 2 ** (bits - 1)
        c = largest * float(kl_shares(sizes[None], levels))
    return max(lo, -c), min(hi, c)


def least_error(seen: Seen, bits: int, norm: float) -> float:
    """r of the least error, every value counted as the middle of its bin; the larger r wins a tie."""
    lo, hi = seen.extent
    middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * max(-lo, hi)
    values, counts = torch.stack([-middles, middles]).to(seen.counts.device), seen.counts
    best, least = 1.0, torch.inf
    for ratio in RATIOS:
        ends = (values.new_tensor(ratio * min(lo, 0.0)), values.new_tensor(ratio * max(hi, 0.0)))
        rounded = fake_round(values, *grid_of(*ends, bits), bits)
        error = float(((values - rounded).abs().pow(norm) * counts).sum())
        if error < least:
            best, least = ratio, error
    return best


def kl_shares(counts: Float[Tensor, "groups bins"], levels: int) -> Float[Tensor, " groups"]:
    """c of each histogram of sizes as a share of its range, at most 1; 1 where it is empty."""
    bins = counts.shape[1]
    found = []
    for some in counts.split(max(1, AT_ONCE // (bins * (min(levels, bins) + 1)))):
        tried, distance = divergences(some, levels)
        least = distance.amin(1, keepdim=True)
        best = torch.where(distance <= least + TIE, tried, 0).amax(1)
        found.append(torch.where(least[:, 0].isfinite(), (best + 0.5) / bins, 1.0).clamp(max=1))
    return torch.cat(found)


def divergences(
    counts: Float[Tensor, "groups bins"], levels: int
) -> tuple[Tensor, Float[Tensor, "groups tries"]]:
    """Every i, and KL(P_i | Q_i) in nats for it; infinite where Q_i is 0 and P_i is not.

    With running sums of h, of (h > 0) and of h log h each i costs one look-up per level.
    """
    counts = counts.double()
    bins, levels = counts.shape[1], min(levels, counts.shape[1])
    tried = torch.arange(min(FIRST, bins), bins + 1, device=counts.device)
    place = torch.arange(levels + 1, device=counts.device)
    edges = torch.where(
        tried[:, None] >= levels, place * tried[:, None] // levels, place.minimum(tried[:, None])
    )
    total, filled, spread = (_sums(v) for v in (counts, (counts > 0).double(), _x_log_x(counts)))
    q, n = total[:, edges].diff(dim=2), filled[:, edges].diff(dim=2)
    last = counts[:, tried - 1]
    beyond = total[:, -1:] - total[:, tried]
    end = (edges[:, 1:] > edges[:, :-1]).sum(1) - 1  # the level that the last bin is in
    end = end.expand(len(counts), -1)[..., None]
    p = q.scatter_add(2, end, beyond[..., None])
    n = n.scatter_add(2, end, ((last == 0) & (beyond > 0)).double()[..., None])
    logs = torch.where(p > 0, p * (q / n.clamp(min=1)).log(), 0.0)
    whole = total[:, -1:]
    entropy = spread[:, tried - 1] + _x_log_x(last + beyond)
    distance = (entropy - logs.sum(2)) / whole - whole.log() + total[:, tried].log()
    return tried, torch.where(distance.isfinite(), distance.clamp(min=0), torch.inf)


def _sums(values: Float[Tensor, "groups bins"]) -> Float[Tensor, "groups ends"]:
    """Sums of the first 0, 1, .. bins."""
    return torch.cat([values.new_zeros(len(values), 1), values.cumsum(1)], 1)


def _x_log_x(x: Tensor) -> Tensor:
    return torch.xlogy(x, x)


def _extents(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, Seen]:
    found: dict[str, Seen] = {}

    def see(layer: str, x: Tensor) -> None:
        if not x.isfinite().all():
            raise DoesNotFit(
                f"{layer}: its inputs hold NaN or Inf; repair the network or leave the layer out"
            )
        seen = found.setdefault(
            layer, Seen([], [], torch.zeros(2, BINS, dtype=torch.float64, device=x.device))
        )
        seen.lows.append(float(x.min()))
        seen.highs.append(float(x.max()))

    _pass(model, data, layers, see)
    for layer in layers:
        if layer not in found:
            raise DoesNotFit(f"{layer}: the layer is never called on the calibration data; leave it out")
    return {layer: found[layer] for layer in layers}


def _count(model: nn.Module, data: Data, found: dict[str, Seen]) -> None:
    """Fill the histograms."""

    def see(layer: str, x: Tensor) -> None:
        lo, hi = found[layer].extent
        for side, sizes in enumerate((-x[x < 0], x[x > 0])):
            found[layer].counts[side] += torch.histc(sizes.float(), BINS, 0, max(-lo, hi) or 1).double()

    _pass(model, data, list(found), see)


def _pass(model: nn.Module, data: Data, layers: Sequence[str], see) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with watched(model, layers, see):
        for x, _ in steps(data, "Watching ranges", total=-(-len(data) // data.batch)):
            model(x.to(device))
