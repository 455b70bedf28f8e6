"""Inputs of layers on calibration data, streamed: Gram matrices, means, magnitudes.

For a layer y = W x the expected squared output error of another weight W + dW is

    E |dW x|^2 = sum over groups of tr(dW_g H_g dW_g^T),      H_g = E[x_g x_g^T],

with x the flattened inputs that one output position reads (for a convolution a patch), the sum over
positions, and the mean over examples. `moments` collects H and the rest in one pass over the data and keeps
them in `Data.memo` for as long as the model's tensors are unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED
from netweight.core.errors import DoesNotFit
from netweight.core.progress import steps
from netweight.core.task import Data

MIRRORED = 256  # inputs from which on a Gram matrix is computed on one side of its diagonal
AT_ONCE = 2**24  # products of single examples that are in memory together


@dataclass
class Moments:
    """What the inputs of one layer look like.

    gram: `groups d d` float64, sum over positions and mean over examples of x x^T; d = weights per output.
    total: `groups d`, the sum of x likewise. magnitude, largest: `in`, mean and maximum of |x_j| per input
    channel over all positions. low, high: smallest and largest input. positions: per example.
    """

    gram: Float[Tensor, "groups d d"]
    total: Float[Tensor, "groups d"]
    magnitude: Float[Tensor, " in"]
    largest: Float[Tensor, " in"]
    low: float
    high: float
    positions: float

    @property
    def mean(self) -> Float[Tensor, "groups d"]:
        """E[x] per position."""
        return self.total / self.positions

    def error(self, change: Float[Tensor, "out in *kernel"]) -> float:
        """E |dW x|^2 per example for a change dW of the weight."""
        groups, d, _ = self.gram.shape
        rows = change.reshape(groups, -1, d).double()
        return float((rows @ self.gram * rows).sum().clamp(min=0))


def moments(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, Moments]:
    """Moments of the inputs of those layers on all of `data`; raises `DoesNotFit` for a layer without a
    Gram matrix.

    The model runs in evaluation mode without gradients and is left as it was.
    """
    known = _memo(model, data)
    missing = [layer for layer in layers if layer not in known]
    for layer in missing:
        if not isinstance(model.get_submodule(layer), WEIGHTED):
            kind = type(model.get_submodule(layer)).__name__
            raise DoesNotFit(f"{layer}: a {kind} has no matrix of inputs; methods that need one leave it out")
    if missing:
        known.update(_collect(model, data, missing))
    return {layer: known[layer] for layer in layers}


@contextmanager
def watched(model: nn.Module, layers: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the block runs, `see(layer, x)` is called with the input of each call of those layers."""

    def watcher(layer: str) -> Callable[..., None]:
        return lambda _module, inputs: see(layer, inputs[0].detach())

    handles = [model.get_submodule(layer).register_forward_pre_hook(watcher(layer)) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()


def patches(layer: nn.Module, x: Tensor) -> Float[Tensor, "groups n d"]:
    """Every vector that the layer multiplies its weight with, one row each; n = examples x positions."""
    columns = _columns(layer, x)
    return columns.permute(1, 0, 3, 2).reshape(columns.shape[1], -1, columns.shape[2])


def _columns(layer: nn.Module, x: Tensor) -> Float[Tensor, "b groups d n"]:
    """The same vectors as columns, example by example, in the order in which they are cheapest to have."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T[None, None]
    if x.ndim == len(layer.kernel_size) + 1:
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv3d):  # F.unfold knows images alone: a one-hot filter per place does the same
        count = size[0] * size[1] * size[2]
        filters = torch.eye(count, dtype=x.dtype, device=x.device).reshape(count, 1, *size)
        filters = filters.repeat(layer.in_channels, 1, 1, 1, 1)
        columns = F.conv3d(x, filters, stride=stride, dilation=dilation, groups=layer.in_channels).flatten(2)
    elif isinstance(layer, nn.Conv1d):
        columns = F.unfold(x[:, :, None], (1, *size), (1, *dilation), 0, (1, *stride))
    else:
        columns = F.unfold(x, size, dilation, 0, stride)
    return columns.reshape(len(x), layer.groups, -1, columns.shape[-1])


def _collect(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    last: list[tuple[Tensor, object, Moments]] = []  # query, key and value read one tensor: counted once

    def see(layer: str, x: Tensor) -> None:
        module = model.get_submodule(layer)
        given, now = x, _state(x)
        if isinstance(module, nn.Linear) and last and last[0][1] == now:
            new = last[0][2]
            found[layer] = _sum(found[layer], new) if layer in found else new
            return
        x = x.float() if x.element_size() < 4 else x  # sums of half precision overflow
        if not isinstance(module, nn.Linear):
            x = x if x.ndim == module.weight.ndim else x[None]
        columns = _columns(module, x)
        positions = float(columns.shape[0] * columns.shape[3])
        flat = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
        flat = flat.reshape(-1, flat.shape[-1])
        size = flat.abs()
        new = Moments(
            gram=_gram(columns),
            total=columns.sum(3).double().sum(0),
            magnitude=size.sum(0).double() / len(flat) * positions,
            largest=size.amax(0).double(),
            low=float(x.min()),
            high=float(x.max()),
            positions=positions,
        )
        found[layer] = _sum(found[layer], new) if layer in found else new
        last[:] = [(given, now, new)] if isinstance(module, nn.Linear) else []

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with watched(model, layers, see):
        for x, _ in steps(data, "Watching layer inputs", total=-(-len(data) // data.batch)):
            model(x.to(device))
    for layer in layers:
        if layer not in found:
            raise DoesNotFit(f"{layer}: the layer is never called on the calibration data; leave it out")
    return {layer: _mean(found[layer], len(data)) for layer in layers}


def _state(x: Tensor) -> object:
    """What says that a tensor is still the same piece of memory with the same values."""
    return x.data_ptr(), x._version, x.shape, x.stride(), x.dtype


def _gram(columns: Float[Tensor, "b groups d n"]) -> Float[Tensor, "groups d d"]:
    """The sum of x x^T over examples and positions; few examples at a time where the products are large."""
    groups, d = columns.shape[1:3]
    some = columns.split(max(AT_ONCE // (groups * d * d), 1))
    return torch.stack([_with_itself(part).sum(0, dtype=torch.float64) for part in some]).sum(0)


def _with_itself(part: Float[Tensor, "b groups d n"]) -> Float[Tensor, "b groups d d"]:
    """x x^T; of large ones the part above the diagonal is mirrored, which saves three products in eight."""
    d = part.shape[-2]
    if d < MIRRORED:
        return part @ part.mT
    product = part.new_empty(*part.shape[:-1], d)
    for rows in torch.arange(d).tensor_split(4):
        first, stop = int(rows[0]), int(rows[-1]) + 1
        below = part[..., first:stop, :] @ part[..., :stop, :].mT
        product[..., first:stop, :stop] = below
        product[..., :first, first:stop] = below[..., :first].mT
    return product


def _sum(a: Moments, b: Moments) -> Moments:
    return Moments(
        a.gram + b.gram,
        a.total + b.total,
        a.magnitude + b.magnitude,
        torch.maximum(a.largest, b.largest),
        min(a.low, b.low),
        max(a.high, b.high),
        a.positions + b.positions,
    )


def _mean(m: Moments, examples: int) -> Moments:
    return Moments(
        m.gram / examples,
        m.total / examples,
        m.magnitude / m.positions,
        m.largest,
        m.low,
        m.high,
        m.positions / examples,
    )


def _memo(model: nn.Module, data: Data) -> dict[str, Moments]:
    """Where moments of this very model on this data are kept; emptied when any of its tensors has changed."""
    state = [(t.data_ptr(), t._version) for t in [*model.parameters(), *model.buffers()]]
    kept = data.memo.get("moments")
    if kept is None or kept[0]() is not model or kept[1] != state:
        kept = data.memo["moments"] = (weakref.ref(model), state, {})
    return kept[2]
