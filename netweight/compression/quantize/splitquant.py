"""SplitQuant: a layer becomes three whose weights lie close together, and each gets a scale of its own.

Paper: Song, Lin, "SplitQuant: Layer Splitting for Low-Bit Neural Network Quantization", Edge AI 2025,
arXiv:2501.12428.

The weights of a Linear layer, and those of each output kernel of a convolution, fall into three clusters of
means c1 <= c2 <= c3 (k-means on a line). With the cuts b1 = (c1 + c2) / 2, b2 = (c2 + c3) / 2

    lower = w [w <= b1],    middle = w [b1 < w < b2],    upper = w [b2 <= w],    w = lower + middle + upper,

    W x + b = (lower x + b_lower) + (middle x + b_middle) + (upper x + b_upper),

exactly, with biases cut the same way. Each part is then rounded to nearest on a grid over its own range,
which holds 0: the middle, where most weights lie, gains the whole range over its own in resolution, and
outliers stay. A layer with fewer outputs than parts is rounded whole.

Differs from the paper: k-means is exact and not begun at random; of the three copies only one code per
weight and the number of its part are stored (1.6 bits for three parts), not three codes of which two are
zero; biases are not rounded, as in the published code; activations are not split (off in the published runs).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, Packed, replace, weight_of
from netweight.core.grid import PER_TENSOR, Grid
from netweight.core.line_clusters import centres
from netweight.core.progress import steps
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.split import MOST, Split, Summed, summed


@dataclass(frozen=True)
class SplitQuant:
    """Settings of `splitquant`.

    bits: of a code. parts: layers that one layer is split into, 1 to 256; 1 is plain rounding. group: weights
    of one part that share a scale; -1 the tensor (the paper's), 0 a row, else so many inputs of a row.
    """

    bits: int = 4
    parts: int = 3
    group: int = PER_TENSOR

    def __post_init__(self) -> None:
        Grid(self.bits, False, self.group)
        if not 1 <= self.parts <= MOST:
            raise ValueError(f"need 1 <= parts <= {MOST}, got parts={self.parts}")


def splitquant(model: nn.Module, task: Task, layers: Sequence[str], settings: SplitQuant) -> Change:
    """Split and round Linear and Conv weights. Looks at no data.

    Raises `DoesNotFit` for another kind of layer and where `group` does not divide a row.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    packed: dict[str, Packed] = {}
    for layer, weight in steps(list(weights.items()), "Splitting layers"):
        parts = settings.parts if len(weight) >= settings.parts else 1
        packed[layer] = encode(weight, parts, Grid(settings.bits, False, settings.group), layer)
    return Change(packed, left=left)


def encode(weight: Float[Tensor, "out ..."], parts: int, grid: Grid, layer: str = "weight") -> Split:
    """The split weight as it is stored; `layer` is the name in error messages."""
    return Split.nearest(weight, partition(weight, parts), parts, grid, layer)


def partition(weight: Float[Tensor, ...], parts: int) -> UInt8[Tensor, ...]:
    """The part of each weight: of a matrix or a bias as a whole, of a convolution kernel by kernel."""
    rows = weight.reshape(len(weight) if weight.ndim > 2 else 1, -1)
    return torch.stack([between(row, cuts(row, parts)) for row in rows]).reshape(weight.shape)


def cuts(values: Float[Tensor, " n"], parts: int) -> Float[Tensor, " cuts"]:
    """b: half way between neighbouring means, float64."""
    means = torch.from_numpy(centres(values.double().cpu().numpy(), parts))
    return (means[1:] + means[:-1]) / 2


def between(values: Float[Tensor, " n"], cut: Float[Tensor, " cuts"]) -> UInt8[Tensor, " n"]:
    """0 up to the lowest cut, which it holds, the last part from the highest cut on, which it holds too.

    A value on a cut in between, of which the paper has none, goes to the lower part.
    """
    values, cut = values.double(), cut.to(values.device)
    found = torch.bucketize(values, cut)
    if len(cut) > 1:
        found = torch.where(values == cut[-1], len(cut), found)
    return found.to(torch.uint8)


def split(model: nn.Module, layers: Sequence[str], parts: int = 3) -> nn.Module:
    """A float copy of the network, in evaluation mode, in which each of those layers is `parts` layers and a
    sum: the same function, and what a quantizer of plain layers is given."""
    net = copy.deepcopy(model).eval()
    for layer in layers:
        module = net.get_submodule(layer)
        if isinstance(module, WEIGHTED) and len(weight_of(net, layer)) >= parts:
            replace(net, layer, apart(module, parts))
    return net


def apart(layer: nn.Module, parts: int) -> Summed:
    """The layer as layers of which each holds one part of the weight and one of the bias, and zeros."""
    return summed(layer, pieces(layer.weight.detach(), parts), biases_of(layer, parts))


def biases_of(layer: nn.Module, parts: int) -> list[Tensor] | None:
    """The parts of its bias; None for a layer without one."""
    return None if layer.bias is None else pieces(layer.bias.detach(), parts)


def pieces(weight: Tensor, parts: int) -> list[Tensor]:
    """w [part of w is c], for every part c."""
    which = partition(weight, parts)
    return [torch.where(which == c, weight, torch.zeros_like(weight)) for c in range(parts)]
