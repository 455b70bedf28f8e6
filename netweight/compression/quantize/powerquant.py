"""PowerQuant: weights on a power grid, whose exponent leaves the least weight error. Looks at no data.

Paper: Yvinec et al., "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR 2023,
arXiv:2301.09858.

With phi_a(x) = sign(x) |x|^a, q = 2^(b-1) - 1 and m the largest |w| of a group,

    n = round(q phi_a(w / m)),        w' = m phi_1/a(n / q),        a* = argmin_a |W - W'|^2  per layer.

Bell-shaped weights get a < 1: more levels near 0, where they are. a = 1 is `compression/quantize/rtn.py` on a
symmetric grid. Products of codes stay products, so the layer runs on integers (`nn/power_integer.py`).

Differs from the paper: one exponent per layer where the paper has one for the network; a scan and golden
section in place of Nelder-Mead; weights alone (inputs: `compression/quantize/nupes.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from netweight.core.compressed import Change
from netweight.core.grid import Grid
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.power import Power


@dataclass(frozen=True)
class PowerQuant:
    """Settings of `powerquant`.

    bits: 2 to 8. group: weights that share a scale; -1 the tensor, 0 a row, else so many inputs of a row.
    exponent: a; None: that of least weight error, layer by layer.
    """

    bits: int = 4
    group: int = 0
    exponent: float | None = None

    def __post_init__(self) -> None:
        Grid(self.bits, True, self.group)
        if self.exponent is not None and not 0.05 <= self.exponent <= 4:
            raise ValueError(f"need 0.05 <= exponent <= 4 or None, got exponent={self.exponent}")


def powerquant(model: nn.Module, task: Task, layers: Sequence[str], settings: PowerQuant) -> Change:
    """Round Linear, Conv, transposed Conv and Embedding weights to power grids. Looks at no data.

    Raises `DoesNotFit` for another kind of layer and where `group` does not divide a row.
    """
    weights, left = weights_to_pack(model, layers)
    how = settings.bits, settings.group, settings.exponent
    return Change({name: Power.nearest(weight, *how, name) for name, weight in weights.items()}, left=left)
