"""Bias correction: what rounding adds to the mean output of a layer is taken off its bias.

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
arXiv:1906.04721, section 4.2.

    b' = b - (W' - W) E[x]

with W' the decoded weight and E[x] the mean input on calibration data: then the mean output error of the
layer on that data is zero. `corrected` does so for the Change of any method; `bias_correction` rounds to
nearest first.

Differs from the paper: E[x] is measured on calibration data, not derived from batch-norm statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, weight_of
from netweight.core.grid import PER_TENSOR, Grid
from netweight.core.moments import moments
from netweight.core.rewrite import rewritten
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine


@dataclass(frozen=True)
class BiasCorrection:
    """Settings of `bias_correction`: bits, symmetric and group of the grid that weights are rounded to."""

    bits: int = 8
    symmetric: bool = True
    group: int = PER_TENSOR

    def __post_init__(self) -> None:
        Grid(self.bits, self.symmetric, self.group)


def bias_correction(model: nn.Module, task: Task, layers: Sequence[str], settings: BiasCorrection) -> Change:
    """Round to nearest, then correct the biases; a layer without a bias gets one."""
    grid = Grid(settings.bits, settings.symmetric, settings.group)
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    packed = {}
    for layer, weight in weights.items():
        packed[layer] = Affine.nearest(weight, grid, layer)
    return corrected(model, task, Change(packed, left=left))


def corrected(model: nn.Module, task: Task, change: Change) -> Change:
    """The same Change with a corrected bias for each packed Linear and Conv layer."""
    net = rewritten(model, change.rewrites)
    layers = [name for name in change.packed if isinstance(net.get_submodule(name), WEIGHTED)]
    seen = moments(net, task.calibration, layers)
    biases = dict(change.biases)
    for layer in layers:
        before = biases.get(layer, net.get_submodule(layer).bias)
        error = change.packed[layer].decode() - weight_of(net, layer)
        shift = mean_error(error, seen[layer].mean)
        biases[layer] = (-shift if before is None else before.detach().double() - shift).to(error.dtype)
    return replace(change, biases=biases)


def mean_error(
    error: Float[Tensor, "out in *kernel"], mean: Float[Tensor, "parts d"]
) -> Float[Tensor, " out"]:
    """(W' - W) E[x]; a grouped convolution has `parts`."""
    parts, d = mean.shape
    return (error.double().reshape(parts, -1, d) * mean.double()[:, None]).sum(-1).reshape(-1)
