"""Bias correction: what rounding adds to the mean output of a layer is taken off its bias.

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
arXiv:1906.04721, section 4.2.

    b' = b - (W' - W) E[x]

with W' the decoded weight and E[x] the mean input: measured on calibration data, so that the mean output
error of the layer on that data is zero, or without data from the statistics of the batch norms before it (see
`core/normals.py`); a layer for which they do not tell it keeps its bias. `corrected` does so for the Change
of any method; `bias_correction` rounds to nearest first.

Differs from the paper: E[x] is measured unless `data_free` is set, and there it is also had behind residual
sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.grid import PER_TENSOR, Grid
from netweight.core.moments import moments
from netweight.core.normals import expected_inputs
from netweight.core.rewrite import FoldBatchNorm, Scale, Unclip, rewritten
from netweight.core.task import Data, Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine


@dataclass(frozen=True)
class BiasCorrection:
    """Settings of `bias_correction`.

    bits, symmetric, group: of the grid that weights are rounded to. data_free: E[x] from batch norms.
    """

    bits: int = 8
    symmetric: bool = True
    group: int = PER_TENSOR
    data_free: bool = False

    def __post_init__(self) -> None:
        Grid(self.bits, self.symmetric, self.group)


def bias_correction(model: nn.Module, task: Task, layers: Sequence[str], settings: BiasCorrection) -> Change:
    """Round to nearest, then correct the biases; a layer without a bias gets one."""
    grid = Grid(settings.bits, settings.symmetric, settings.group)
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    packed = {}
    for layer, weight in weights.items():
        packed[layer] = Affine.nearest(weight, grid, layer)
    return corrected(model, task, Change(packed, left=left), data_free=settings.data_free)


def corrected(model: nn.Module, task: Task, change: Change, *, data_free: bool = False) -> Change:
    """The same Change with a corrected bias for each packed Linear and Conv layer.

    data_free: for each whose mean input the batch norms of `model` tell; of the data only the shape counts.
    """
    net = rewritten(model, change.rewrites)
    layers = [name for name in change.packed if isinstance(net.get_submodule(name), WEIGHTED)]
    if data_free:
        means = told(model, task.calibration, layers, change)
    else:
        means = {layer: seen.mean for layer, seen in moments(net, task.calibration, layers).items()}
    biases = dict(change.biases)
    for layer, mean in means.items():
        before = biases.get(layer, net.get_submodule(layer).bias)
        error = change.packed[layer].decode() - weight_of(net, layer)
        shift = mean_error(error, mean)
        biases[layer] = (-shift if before is None else before.detach().double() - shift).to(error.dtype)
    return replace(change, biases=biases)


def told(
    model: nn.Module, data: Data, layers: Sequence[str], change: Change
) -> dict[str, Float[Tensor, "parts d"]]:
    """E[x] of those layers after the rewrites of the change, where the batch norms of `model` tell it.

    Raises `DoesNotFit` for a rewrite after which that is not known.
    """
    for rewrite in change.rewrites:
        if not isinstance(rewrite, FoldBatchNorm | Scale | Unclip):
            kind = type(rewrite).__name__
            raise DoesNotFit(f"{kind}: mean inputs after it are not known without data; measure them")
    unclipped = [rewrite for rewrite in change.rewrites if isinstance(rewrite, Unclip)]
    free = rewritten(model, unclipped) if unclipped else model
    found = {}
    for layer, mean in expected_inputs(free, data, layers).items():
        for rewrite in change.rewrites:
            if isinstance(rewrite, Scale) and layer in rewrite.consumers:
                mean = mean / rewrite.scale.to(mean)
        module = model.get_submodule(layer)
        parts = mean.reshape(getattr(module, "groups", 1), -1)
        found[layer] = parts.repeat_interleave(weight_of(model, layer)[0, 0].numel(), 1)
    return found


def mean_error(
    error: Float[Tensor, "out in *kernel"], mean: Float[Tensor, "parts d"]
) -> Float[Tensor, " out"]:
    """(W' - W) E[x]; a grouped convolution has `parts`."""
    parts, d = mean.shape
    return (error.double().reshape(parts, -1, d) * mean.double()[:, None]).sum(-1).reshape(-1)
