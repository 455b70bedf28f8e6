"""SmoothQuant: outliers of the activations are moved into the weights, then both are rounded to 8 bits.

Paper: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML 2023, arXiv:2211.10438.

For a norm and the layers that read it, per channel j,

    s_j = max |X_j|^alpha / max |W_:j|^(1 - alpha),    norm / s,    columns times s,

which is exact; then weights are rounded symmetrically (per tensor) and the inputs of the same layers to the
grid of a range chosen on calibration data (static, see `nn/ranges.py`), or of each token (dynamic).

Differs from the paper: attention itself (query, key, value products) stays in floating point, and the static
min-max range of a smoothed input is the largest |X_j| / s_j on both sides, also where one side reaches less
far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, ActivationRounding, Change, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.grid import PER_TENSOR, Grid
from netweight.core.moments import Moments, moments
from netweight.core.rewrite import Scale, rewritten
from netweight.core.sites import Site, column_ranges, sites
from netweight.core.task import Data, Task
from netweight.nn.fake import DynamicRounding, StaticRounding
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine
from netweight.nn.ranges import check, input_ranges


@dataclass(frozen=True)
class SmoothQuant:
    """Settings of `smoothquant`.

    bits: of weights, 2 to 8. activation_bits: 2 to 16. alpha: how much of the outliers moves, 0 to 1; None
    moves nothing (plain rounding of weights and activations). group: weights that share a scale, -1 the
    tensor. dynamic: a range per token at run time. range: of static rounding, one of `nn.ranges.HOW`.
    """

    bits: int = 8
    activation_bits: int = 8
    alpha: float | None = 0.5
    group: int = PER_TENSOR
    dynamic: bool = False
    range: str = "min-max"

    def __post_init__(self) -> None:
        check(self.range)
        if not 2 <= self.activation_bits <= 16 or self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(
                f"need 2 <= activation_bits <= 16 and 0 <= alpha <= 1 or None, got "
                f"activation_bits={self.activation_bits}, alpha={self.alpha}"
            )
        Grid(self.bits, True, self.group)


def smoothquant(model: nn.Module, task: Task, layers: Sequence[str], settings: SmoothQuant) -> Change:
    """Smooth every site whose readers are all in `layers`, then round weights and inputs of all layers."""
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    seen = moments(model, task.calibration, list(weights))
    rewrites = []
    for site in smoothed(model, task.calibration, list(weights)) if settings.alpha is not None else []:
        columns = torch.stack([column_ranges(model, reader) for reader in site.consumers]).amax(0)
        scale = scale_of(seen[site.consumers[0]].largest, columns, settings.alpha)
        rewrites.append(Scale(site.producer, site.consumers, scale))

    grid = Grid(settings.bits, True, settings.group)
    net, packed = rewritten(model, rewrites), {}
    for layer in weights:
        weight = weight_of(net, layer)
        packed[layer] = Affine.nearest(weight, grid, layer)
    if settings.dynamic:
        activations = {layer: DynamicRounding(settings.activation_bits) for layer in weights}
    elif settings.range == "min-max":
        moved = {reader: rewrite.scale for rewrite in rewrites for reader in rewrite.consumers}
        activations = {layer: rounding(seen[layer], moved.get(layer), settings) for layer in weights}
    else:
        bits = settings.activation_bits
        ranges = input_ranges(net, task.calibration, list(weights), settings.range, bits=bits)
        activations = {layer: StaticRounding.of(*ends, bits) for layer, ends in ranges.items()}
    return Change(packed, rewrites, activations, left)


def smoothed(model: nn.Module, data: Data, layers: Sequence[str]) -> list[Site]:
    """Norms whose readers are all in `layers`; none where the model cannot be captured."""
    try:
        found = sites(model, data)
    except DoesNotFit:
        return []
    return [site for site in found if site.norm(model) and set(site.consumers) <= set(layers)]


def scale_of(
    inputs: Float[Tensor, " in"], columns: Float[Tensor, " in"], alpha: float
) -> Float[Tensor, " in"]:
    """s_j; 1 for a channel that is never active or never read."""
    alive = (inputs > 0) & (columns > 0)
    s = inputs.double().pow(alpha) / columns.double().pow(1 - alpha)
    return torch.where(alive, s, 1.0).clamp(1e-5, 1e5).float()


def rounding(seen: Moments, scale: Float[Tensor, " in"] | None, settings: SmoothQuant) -> ActivationRounding:
    """How the input of a layer is rounded by its min-max range, after it was divided by `scale`."""
    low, high = seen.low, seen.high
    if scale is not None:
        most = float((seen.largest / scale.to(seen.largest)).max())
        low, high = (-most if low < 0 else 0.0), (most if high > 0 else 0.0)
    return StaticRounding.of(low, high, settings.activation_bits)
