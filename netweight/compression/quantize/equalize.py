"""Cross-layer equalization: channels get the same range on both sides of a ReLU, so that one scale fits all.

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
arXiv:1906.04721, section 4.1.

Batch norms are folded. Then, for each layer and the layers that read it through ReLU or pooling,

    r1_i = max |row i of W1|,    r2_i = max |column i of W2|,    s_i = sqrt(r1_i / r2_i),
    row i of W1 and b1_i divided by s_i, column i of W2 times s_i: both ranges become sqrt(r1_i r2_i),

around all pairs until no s moves. Weights are then rounded to nearest.

Differs from the paper: high biases are not absorbed, and a ReLU6 ends a chain, as it is not homogeneous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, Rewrite, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.grid import PER_TENSOR, Grid
from netweight.core.rewrite import FoldBatchNorm, Scale, rewritten
from netweight.core.sites import Site, column_ranges, foldable, sites
from netweight.core.task import Data, Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine

STILL = 1e-4  # |ln s| below which a pair counts as equal


@dataclass(frozen=True)
class Equalize:
    """Settings of `equalize`. bits, symmetric, group: of the grid. rounds: most passes over all pairs."""

    bits: int = 8
    symmetric: bool = True
    group: int = PER_TENSOR
    rounds: int = 100

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"need rounds >= 1, got rounds={self.rounds}")
        Grid(self.bits, self.symmetric, self.group)


def equalize(model: nn.Module, task: Task, layers: Sequence[str], settings: Equalize) -> Change:
    """Fold, equalize the pairs of which both sides are in `layers`, round. Of the data only the shape counts.

    Raises `DoesNotFit` for a model that cannot be captured as one graph.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    rewrites = equalized(model, task.calibration, list(weights), settings.rounds)
    net, grid = rewritten(model, rewrites), Grid(settings.bits, settings.symmetric, settings.group)
    packed = {}
    for layer in weights:
        weight = weight_of(net, layer)
        packed[layer] = Affine.nearest(weight, grid, layer)
    return Change(packed, rewrites, left=left)


def equalized(model: nn.Module, data: Data, layers: Sequence[str], rounds: int = 100) -> list[Rewrite]:
    """The folds of all norms behind `layers`, then one scale per pair."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    folds = [FoldBatchNorm(*pair) for pair in foldable(model, data) if pair[0] in layers] if norms else []
    net = rewritten(model, folds)
    pairs = [
        site
        for site in sites(net, data)
        if not site.norm(net) and {site.producer, *site.consumers} <= set(layers)
    ]
    return [*folds, *balanced(net, pairs, rounds)]


def balanced(net: nn.Module, pairs: Sequence[Site], rounds: int) -> list[Scale]:
    """One scale per pair, after which both sides of each have equal ranges; `net` is changed in place."""
    total = [torch.ones(len(weight_of(net, pair.producer)), dtype=torch.float64) for pair in pairs]
    for _ in range(rounds):
        moved = 0.0
        for pair, product in zip(pairs, total):
            scale = balance(net, pair)
            Scale(pair.producer, pair.consumers, scale).apply(net)
            product *= scale
            moved = max(moved, float(scale.log().abs().max()))
        if moved < STILL:
            break
    return [Scale(pair.producer, pair.consumers, s.float()) for pair, s in zip(pairs, total)]


def balance(net: nn.Module, site: Site) -> Float[Tensor, " channels"]:
    """s of one pair; 1 for a channel that is zero on one side."""
    rows = weight_of(net, site.producer).flatten(1).abs().amax(1).double()
    columns = torch.stack([column_ranges(net, reader) for reader in site.consumers]).amax(0).double()
    if len(rows) != len(columns):
        raise DoesNotFit(f"{site.producer}: {len(rows)} outputs, but {len(columns)} are read")
    alive = (rows > 0) & (columns > 0)
    return torch.where(alive, (rows / columns).sqrt(), 1.0)
