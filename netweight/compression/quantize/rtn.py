"""Rounding to nearest: every weight goes to the nearest point of a uniform grid over its group's range.

Paper: Nagel et al., "A White Paper on Neural Network Quantization", 2021, arXiv:2106.08295, section 2.

For one group w of weights and b bits,

    asymmetric   s = (max w - min w) / (2^b - 1),   z = round(-min w / s)
                 w' = s (clip(round(w / s) + z, 0, 2^b - 1) - z)
    symmetric    s = max |w| / c,   c = 2^(b-1) - 1
                 w' = s clip(round(w / s), -c, c)

where the range of an asymmetric grid is widened to hold 0, so that a zero weight stays zero. Rounding is half
to even. A group is a row (group=0), g consecutive inputs of a row (group=g) or the whole tensor (group=-1);
the rows of a transposed convolution are its input channels, those of an embedding its entries.

Differs from the paper: scales are kept in float16 where that loses no range (see `core.grid`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import Change
from netweight.core.grid import Grid
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Affine


@dataclass(frozen=True)
class RTN:
    """Settings of `rtn`.

    bits: 2 to 8. symmetric: no zero point. group: weights that share a scale; 0 a row, -1 the tensor.
    """

    bits: int = 4
    symmetric: bool = False
    group: int = 0

    def __post_init__(self) -> None:
        Grid(self.bits, self.symmetric, self.group)


def rtn(model: nn.Module, task: Task, layers: Sequence[str], settings: RTN) -> Change:
    """Round Linear, Conv, transposed Conv and Embedding weights. Looks at no data.

    Raises `DoesNotFit` for another kind of layer and where `group` does not divide a row.
    """
    weights, left = weights_to_pack(model, layers)
    return Change({layer: encode(weight, settings, layer) for layer, weight in weights.items()}, left=left)


def encode(weight: Float[Tensor, "*shape"], settings: RTN, layer: str = "weight") -> Affine:
    """w' as it is stored; `layer` is the name in error messages."""
    return Affine.nearest(weight, Grid(settings.bits, settings.symmetric, settings.group), layer)
