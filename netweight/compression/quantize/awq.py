"""AWQ: input channels that carry most are scaled up before rounding, and the scales are folded away.

Paper: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys
2024, arXiv:2306.00978.

The error of one rounded weight at the output is Delta E|round error| |x_j|. With s_j > 1 on column j, and x_j
divided by s_j, Delta stays mostly what it was and the error falls by s_j. For each site (a producer and the
layers F that read it), with a_j = mean |x_j| and alpha in {0, 1/n, .., (n - 1)/n},

    s = max(a^alpha, 1e-4),    s <- s / sqrt(max s min s),
    loss(alpha) = mean (B(x; Q(W diag(s)) diag(s)^-1, W in F) - B(x; W))^2,

the s of the least loss is folded: producer / s, columns of F times s. alpha = 0 is round to nearest. B is the
whole attention or gated MLP where F feeds one, else each layer of F. Then, for every layer but query and key,
the range [-m, m] of each (row, group) is searched:

    m = (1 - i / 20) max |w|,    loss(m) = mean (sum_j x_j (Q(clamp(w_j, -m, m)) - w_j))^2,    i = 0, 1, ..

Layers that are no part of a site of which ALL readers are asked for are clipped alone. Inputs are those of
the float network; those of a single layer enter through their Gram matrix (`core.moments`).

Differs from the paper: single layers are judged on all calibration tokens, through the Gram matrix, and not
on 512; a group of weights on one side of 0 has its range extended to 0, since a zero point cannot leave the
codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from netweight.core.calls import Call, first, recorded
from netweight.core.compressed import WEIGHTED, Change, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, in_groups, nearest
from netweight.core.moments import Moments, moments
from netweight.core.progress import steps
from netweight.core.rewrite import Scale, rewritten
from netweight.core.sites import Site, sites
from netweight.core.task import Data, Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine

QUERY_KEY = ("q_proj", "k_proj")  # their errors meet in a product, so each alone is a poor guide to its range
CLIP_STEP = 1 / 20


@dataclass(frozen=True)
class AWQ:
    """Settings of `awq`.

    bits: 2 to 8, asymmetric. group: consecutive inputs that share one scale, 0 for a whole row.
    alphas: exponents tried per site, 1 for no scaling. clips: ranges tried per group, 1 for no clipping.
    """

    bits: int = 4
    group: int = 128
    alphas: int = 20
    clips: int = 10

    def __post_init__(self) -> None:
        if self.group < 0 or self.alphas < 1 or not 1 <= self.clips <= 20:
            raise ValueError(
                f"need group >= 0, alphas >= 1, 1 <= clips <= 20, got group={self.group}, "
                f"alphas={self.alphas}, clips={self.clips}"
            )
        Grid(self.bits, group=self.group)

    @property
    def grid(self) -> Grid:
        """The grid of every weight."""
        return Grid(self.bits, symmetric=False, group=self.group)


def awq(model: nn.Module, task: Task, layers: Sequence[str], settings: AWQ) -> Change:
    """Scale, clip, round and pack; the rewrites may reach producers that are not in `layers`, exactly.

    Raises `DoesNotFit` for a layer that is no Linear or Conv, and where `group` does not divide a row.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    for layer, weight in weights.items():
        in_groups(weight, settings.group, layer)
    change = scales(model, task, list(weights), settings) if settings.alphas > 1 else []
    rewrites = {reader: scale for scale in change for reader in scale.consumers}
    shared = {reader: scale.consumers[0] for reader, scale in rewrites.items()}
    seen = moments(model, task.calibration, sorted({shared.get(layer, layer) for layer in weights}))

    scaled, packed = rewritten(model, change), {}
    for layer in steps(weights, "Clipping and rounding"):
        weight, gram = weight_of(scaled, layer), seen[shared.get(layer, layer)].gram
        if layer in rewrites:
            s = spread(rewrites[layer].scale, scaled.get_submodule(layer)).to(gram)
            gram = gram / (s[:, :, None] * s[:, None, :])
        if layer.rpartition(".")[2] not in QUERY_KEY:
            weight = clipped(weight, gram, settings.grid, settings.clips)
        packed[layer] = Affine.nearest(weight, settings.grid)
    return Change(packed, change, left=left)


def scales(model: nn.Module, task: Task, layers: Sequence[str], settings: AWQ) -> list[Scale]:
    """The exact rewrites alone: the best s of every site whose readers are all in `layers`."""
    places = asked(model, task.calibration, layers)
    seen = moments(model, task.calibration, sorted({site.consumers[0] for site in places}))
    found = []
    for site in steps(places, "Searching scales"):
        calls = recorded(model, site.inspected, task.calibration) if site.inspected else []
        best = search(model, site, seen[site.consumers[0]], calls, settings)
        found.append(Scale(site.producer, site.consumers, best))
    return found


def asked(model: nn.Module, data: Data, layers: Sequence[str]) -> list[Site]:
    """The sites whose readers are all in `layers`; none where the model cannot be captured."""
    try:
        return [site for site in sites(model, data) if set(site.consumers) <= set(layers)]
    except DoesNotFit:
        return []


def search(
    model: nn.Module, site: Site, seen: Moments, calls: Sequence[Call], settings: AWQ
) -> Float[Tensor, " in"]:
    """The s of the least loss; the least alpha wins a tie."""
    best, least = torch.ones_like(seen.magnitude).float(), float("inf")
    for i in range(settings.alphas):
        scale = scale_of(seen.magnitude, i / settings.alphas)
        loss = loss_of(model, site, seen, calls, scale, settings.grid)
        if loss < least:
            best, least = scale, loss
    return best


def scale_of(magnitude: Float[Tensor, " in"], alpha: float) -> Float[Tensor, " in"]:
    """s = max(a^alpha, 1e-4) / sqrt(max min); the same for a and c a."""
    s = magnitude.double().pow(alpha).clamp(min=1e-4)
    return (s / (s.max() * s.min()).sqrt()).float()


def loss_of(
    model: nn.Module,
    site: Site,
    seen: Moments,
    calls: Sequence[Call],
    scale: Float[Tensor, " in"],
    grid: Grid,
) -> float:
    """Mean squared error of B, or summed over the readers, with the rounded weights of F."""
    rounded = {}
    for reader in site.consumers:
        module, weight = model.get_submodule(reader), weight_of(model, reader)
        scaled = nearest(times_columns(weight, scale, module), grid)
        rounded[reader] = times_columns(scaled, 1 / scale, module)
    if not site.inspected:
        return sum(seen.error(rounded[reader] - weight_of(model, reader)) for reader in site.consumers)
    inspected = model.get_submodule(site.inspected)
    inside = {f"{reader.removeprefix(f'{site.inspected}.')}.weight": w for reader, w in rounded.items()}
    with torch.no_grad():
        total = sum(
            float((first(functional_call(inspected, inside, args, extra)) - y).pow(2).sum())
            for args, extra, y in calls
        )
    return total / sum(y.numel() for _, _, y in calls)


def clipped(
    weight: Float[Tensor, "out in *kernel"], gram: Float[Tensor, "parts d d"], grid: Grid, tries: int
) -> Float[Tensor, "out in *kernel"]:
    """The weight clamped, in each (row, group), to the [-m, m] of least output error (ties: the larger)."""
    groups = in_groups(weight, grid.group)
    largest = groups.abs().amax(1)
    best, least = largest, torch.full_like(largest, torch.inf, dtype=torch.float64)
    for i in range(tries):
        m = largest * (1 - i * CLIP_STEP)
        clamped = groups.clamp(-m[:, None], m[:, None])
        error = group_errors(nearest(clamped, Grid(grid.bits, group=0)) - groups, gram)
        best, least = torch.where(error < least, m, best), torch.minimum(error, least)
    return groups.clamp(-best[:, None], best[:, None]).reshape(weight.shape)


def group_errors(
    change: Float[Tensor, "groups of"], gram: Float[Tensor, "parts d d"]
) -> Float[Tensor, " groups"]:
    """E (dw x)^2 = dw H_gg dw^T of each group by itself; a grouped convolution has several `parts`."""
    parts, d, _ = gram.shape
    of = change.shape[1]
    change = change.double().reshape(parts, -1, d // of, of)
    blocks = gram.double().reshape(parts, d // of, of, d // of, of).diagonal(dim1=1, dim2=3)
    return (torch.einsum("prgi,pijg->prgj", change, blocks) * change).sum(-1).reshape(-1).clamp(min=0)


def spread(scale: Float[Tensor, " in"], layer: nn.Module) -> Float[Tensor, "parts d"]:
    """s of every weight of a row as it lies in memory, for each part of a grouped convolution."""
    return scale.reshape(getattr(layer, "groups", 1), -1).repeat_interleave(layer.weight[0, 0].numel(), 1)


def times_columns(
    weight: Float[Tensor, "out in *kernel"], scale: Float[Tensor, " channels"], layer: nn.Module
) -> Float[Tensor, "out in *kernel"]:
    """W diag(s)."""
    s = spread(scale, layer).to(weight)
    return (weight.reshape(len(s), -1, s.shape[1]) * s[:, None]).reshape(weight.shape)
