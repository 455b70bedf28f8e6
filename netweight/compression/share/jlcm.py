"""JLCM: tables of values and the places of the weights in them are learnt together.

Paper: Yvinec, Dapogny and Bailly, "Network Memory Footprint Compression Through Jointly Learnable Codebooks
and Mappings", ICLR 2024, arXiv:2309.17361.

Neurons i of a layer whose weights are spread alike form a group g(i), by k-means of log rms(W_i); they are
put side by side (`core.permute`; where channels are tied an order is stored), so that groups cost no bits:

    W'_ij = s_g(i) C[m_ij],    s_g = rms of the group,    C = k-means of W / s,    m_ij = arg max_k I_ijk,

one C for the layer or one a group. C and the logits I (1 at the start, 0 elsewhere) are learnt on the output
of the layer, layer by layer, with inputs x' of the network compressed so far:

    L       = sum over outputs of (W' x' - W x)^2, mean over the calibration data,
    dL/dC   = the gradients of all weights at that place, summed,
    dL/dI_k = s dL/dW'_ij sign(C_k - C_m) gap^2 / max(|C_k - C_m|, gap / 10),    0 for k = m,

gap the mean distance of neighbours in C. By the chain rule of a soft choice the factor would be C_k - C_m:
the farthest entry would be pushed most, and a weight would jump to an extreme ("naive"). The factor above has
the same sign and falls with the distance: the nearest entry that helps wins, a proximal search.

C is moved by Adam; I by momentum over ONE second moment a weight (its mean over k): a moment for each k would
divide the factor away.

Differs from the paper: which decreasing function, which measure of spread, and the schedules are not public
and are ours. L and its gradient are those of all calibration data at once, through E[x' x'^T] and E[x x'^T],
in place of batches; rates fall to 0 along half a cosine, and of the start and all iterates the best is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, replace, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.moments import patches, watched
from netweight.core.permute import Between, Permute, orderable
from netweight.core.progress import steps
from netweight.core.rewrite import rewritten
from netweight.core.task import Data, Task
from netweight.nn.codebook import Codebook, kept, most_bits, nearest, table_of
from netweight.nn.layers import weights_to_pack

NEAR = 0.1  # entries nearer than this share of the mean gap count as that near
MOMENTUM, SECOND, TINY = 0.9, 0.999, 1e-30


@dataclass(frozen=True)
class JLCM:
    """Settings of `jlcm`.

    bits: of a code; a table has 2^bits entries. groups: of neurons in a layer, each with its scale. tables:
    one for each group in place of one for the layer. steps: of learning, 0 for plain k-means. rate,
    mapping_rate: of entries, in root mean squares of the weights, and of logits. examples: of the calibration
    data, at most. search: "proximal", or "naive" as it is compared with. best: whether the best iterate is
    kept, or the last.
    """

    bits: int = 4
    groups: int = 4
    tables: bool = False
    steps: int = 500
    rate: float = 1e-3
    mapping_rate: float = 0.05
    examples: int = 256
    search: str = "proximal"
    best: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.groups < 1 or self.steps < 0 or self.examples < 1:
            raise ValueError(f"need 1 <= bits <= 8, groups >= 1, steps >= 0 and examples >= 1, got {self}")
        if self.rate < 0 or self.mapping_rate < 0 or self.search not in FACTORS:
            raise ValueError(f"need rates >= 0 and a search of {', '.join(FACTORS)}, got {self}")

    def stored_bits(self, shape: Sequence[int]) -> int:
        """Most bits that a weight of that shape takes: what a budget is held against."""
        return most_bits(shape, self.bits, self.groups, own_tables=self.tables)


def jlcm(model: nn.Module, task: Task, layers: Sequence[str], settings: JLCM) -> Change:
    """Group, then learn Linear and Conv layers one after the other, in the order of `layers`.

    With `groups` the neurons of other layers may change their order too, exactly. While it learns it takes a
    few times 2^bits numbers for each weight of the layer at work.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    data = task.calibration.take(settings.examples)
    groups = {layer: alike(weight, settings.groups) for layer, weight in weights.items()}
    rewrites = orders(model, task.calibration, groups) if settings.groups > 1 else []
    for rewrite in rewrites:
        moved = groups.keys() & set(rewrite.producers)
        groups.update({layer: groups[layer][rewrite.order.long()] for layer in moved})
    net = rewritten(model, rewrites)
    small, forms = copy.deepcopy(net), {}
    for layer in steps([*weights], "Learning codebooks"):
        weight = weight_of(net, layer)
        form = Codebook.nearest(weight, settings.bits, groups[layer], own_tables=settings.tables)
        if settings.steps and form.scale is not None:
            H, X = second_moments(net, small, layer, data)
            if not (H.isfinite().all() and X.isfinite().all()):
                left[layer] = "its inputs on the calibration data overflow"
                continue
            form = learnt(weight, form, groups[layer], H, X, settings)
        found, larger = kept({layer: form}, {layer: weight})
        forms.update(found)
        left.update(larger)
        for name in found:
            replace(small, name, form.layer(small.get_submodule(name)).plain())
    return Change(forms, rewrites, left=left)


def alike(weight: Float[Tensor, "out ..."], count: int) -> Int64[Tensor, " out"]:
    """The group of each row by k-means of log rms(W_i), at most `count`, ascending; zero rows are lowest."""
    root = weight.double().flatten(1).square().mean(1).sqrt()
    if count == 1 or not (root > 0).any():
        return torch.zeros(len(root), dtype=torch.int64, device=root.device)
    size = root.clamp(min=float(root[root > 0].min())).log()
    return nearest(size, table_of(size, count)).unique(return_inverse=True)[1]


def orders(model: nn.Module, data: Data, groups: dict[str, Tensor]) -> list[Permute]:
    """The rewrites that put groups side by side, where the neurons of a layer may be put in any order.

    Of several producers that share an order the first one's groups decide.
    """
    try:
        places: Sequence[Between] = orderable(model, data)
    except DoesNotFit:
        return []
    found = []
    for place in places:
        own = groups.get(place.producers[0])
        if own is not None and bool((own.diff() < 0).any()):
            found.append(place.permuted(own.argsort(stable=True).to(torch.int32)))
    return found


def second_moments(
    net: nn.Module, small: nn.Module, layer: str, data: Data
) -> tuple[Float[Tensor, "parts d d"], Float[Tensor, "parts d d"]]:
    """E[x' x'^T] and E[x x'^T] over examples, summed over positions; x' in `small`, x in `net`; float32.

    Raises `DoesNotFit` for a layer that is never called.
    """
    module = net.get_submodule(layer)
    device = module.weight.device
    H = X = torch.zeros((), dtype=torch.float64, device=device)
    for batch, _ in data:
        x, x_small = _inputs(net, layer, batch.to(device)), _inputs(small, layer, batch.to(device))
        for a, b in zip(x, x_small):
            a, b = patches(module, a.float()), patches(module, b.float())
            H, X = H + (b.mT @ b).double(), X + (a.mT @ b).double()
    if H.ndim == 0:
        raise DoesNotFit(f"{layer}: the layer is never called on the calibration data; leave it out")
    return (H / len(data)).float(), (X / len(data)).float()


def _inputs(model: nn.Module, layer: str, batch: Tensor) -> list[Tensor]:
    """The inputs of all calls of a layer on one batch."""
    found: list[Tensor] = []
    with watched(model, [layer], lambda _layer, x: found.append(x)):
        model(batch)
    return found


def learnt(
    weight: Float[Tensor, "out in *kernel"],
    start: Codebook,
    group_of: Int64[Tensor, " out"],
    H: Float[Tensor, "parts d d"],
    X: Float[Tensor, "parts d d"],
    settings: JLCM,
) -> Codebook:
    """The tables and places learnt from `start`, with its scales; tables are sorted at the end alone."""
    size, unit = H.diagonal(dim1=1, dim2=2).mean().clamp(min=TINY), start.scale.float().max()
    rows, H, X = weight.flatten(1).float() / unit, H / size, X / size  # squared gradients stay in range
    W = rows.reshape(len(H), -1, rows.shape[1])
    s = start.scale.float()[group_of][:, None] / unit
    C, m = start.tables.float(), start.places()
    table = (group_of if len(C) > 1 else torch.zeros_like(group_of))[:, None]
    logits = torch.nn.functional.one_hot(m, C.shape[1]).float()
    state = [
        torch.zeros_like(C),
        torch.zeros_like(C),
        torch.zeros_like(logits),
        torch.zeros_like(logits[..., :1]),
    ]
    target, least, best = W @ X, math.inf, (C, m)
    for step in range(settings.steps + 1):
        m = logits.argmax(-1)
        loss, gradient = output_error((s * C[table, m]).reshape(W.shape), H, target)
        if loss < least or not settings.best:
            least, best = loss, (C, m)
        if step == settings.steps:
            break
        g = gradient.reshape(rows.shape) * s
        fall = (1 + math.cos(math.pi * step / settings.steps)) / 2
        push = g[..., None] * FACTORS[settings.search](C)[table, m]
        dC = summed(g, C, table, m)
        logits = logits - settings.mapping_rate * fall * adam_step(push, state[2:], step)
        C = C - settings.rate * fall * adam_step(dC, state[:2], step)
    return ascending(*best, start, group_of, weight)


def output_error(
    decoded: Float[Tensor, "parts out d"], H: Float[Tensor, "parts d d"], target: Float[Tensor, "parts out d"]
) -> tuple[float, Float[Tensor, "parts out d"]]:
    """L but for a constant, tr(W' H W'^T) - 2 tr(W' T^T), and dL/dW' = 2 (W' H - T); the target T is W X."""
    out = decoded @ H
    return float((decoded * (out - 2 * target)).double().sum()), 2 * (out - target)


def summed(
    g: Float[Tensor, "out d"],
    C: Float[Tensor, "tables K"],
    table: Int64[Tensor, "out 1"],
    m: Int64[Tensor, "out d"],
) -> Float[Tensor, "tables K"]:
    """dL/dC: the gradients g of all weights at each place of each table, summed."""
    return torch.zeros_like(C).index_put_((table.expand_as(m), m), g, accumulate=True)


def adam_step(gradient: Tensor, state: Sequence[Tensor], step: int) -> Tensor:
    """Adam's step of rate 1; the second moment is a mean over the axes along which it has one entry."""
    first, second = state
    squared = gradient.square()
    first.lerp_(gradient, 1 - MOMENTUM)
    second.lerp_(squared if squared.shape == second.shape else squared.mean(-1, keepdim=True), 1 - SECOND)
    root = (second / (1 - SECOND ** (step + 1))).sqrt()
    return first / (1 - MOMENTUM ** (step + 1)) / root.clamp(min=TINY)


def ascending(
    C: Float[Tensor, "tables K"],
    m: Int64[Tensor, "out d"],
    start: Codebook,
    group_of: Int64[Tensor, " out"],
    weight: Float[Tensor, "out ..."],
) -> Codebook:
    """The form with tables C and places m, as it is stored: each table sorted, places renamed."""
    tables, order = C.sort(dim=1)
    rank = order.argsort(dim=1)[group_of if len(C) > 1 else torch.zeros_like(group_of)]
    return Codebook.of(rank.gather(1, m), tables, start.scale, group_of, weight)


def proximal(C: Float[Tensor, "tables K"]) -> Float[Tensor, "tables K K"]:
    """sign(C_k - C_m) gap^2 / max(|C_k - C_m|, gap / 10) at [m, k], 0 for k = m."""
    apart = C[:, None, :] - C[:, :, None]
    gap = (C.amax(1) - C.amin(1))[:, None, None] / max(C.shape[1] - 1, 1)
    return apart.sign() * gap.square() / apart.abs().clamp(min=NEAR * gap).clamp(min=TINY)


def naive(C: Float[Tensor, "tables K"]) -> Float[Tensor, "tables K K"]:
    """C_k - C_m at [m, k]: the derivative of a soft choice."""
    return C[:, None, :] - C[:, :, None]


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {"proximal": proximal, "naive": naive}
