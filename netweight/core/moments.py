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
STRIPS = 8  # of rows; more of them save less and less
AT_ONCE = 2**12  # vectors of several examples in one product: sums in float32 stay short


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
    need_inputs(model, missing)
    if missing:
        known.update(_collect(model, data, missing))
    return {layer: known[layer] for layer in layers}


def are_known(model: nn.Module, data: Data, layers: Sequence[str]) -> bool:
    """Whether `moments` of all these layers are there already."""
    return all(layer in _memo(model, data) for layer in layers)


def need_inputs(model: nn.Module, layers: Sequence[str]) -> None:
    """Raises `DoesNotFit` for a layer that has no Gram matrix."""
    for layer in layers:
        if not isinstance(model.get_submodule(layer), WEIGHTED):
            kind = type(model.get_submodule(layer)).__name__
            raise DoesNotFit(f"{layer}: a {kind} has no matrix of inputs; methods that need one leave it out")


def second_moment(layer: nn.Module, inputs: Sequence[Tensor]) -> Float[Tensor, "groups d d"]:
    """The sum over examples and positions of x x^T, for some inputs of one layer, in the precision in which
    the products are: float32 for inputs of 32 bits and less."""
    total: Tensor | None = None
    for x in inputs:
        columns = _columns(layer, _at_least_single(x))
        if total is None:
            total = columns.new_zeros(columns.shape[1], columns.shape[2], columns.shape[2])
        _add_products(total, columns)
    assert total is not None
    return total


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
        given, now = x, same(x)
        if isinstance(module, nn.Linear) and last and last[0][1] == now:
            new = last[0][2]
            found[layer] = _sum(found[layer], new) if layer in found else new
            return
        x = _at_least_single(x)
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
    return {layer: _mean(found.pop(layer), len(data)) for layer in layers}  # never all of them twice


def _at_least_single(x: Tensor) -> Tensor:
    """In float32 at least: sums of half precision overflow."""
    return x.float() if x.element_size() < 4 else x


def same(x: Tensor) -> object:
    """What says that a tensor is still the same piece of memory with the same values."""
    return x.data_ptr(), x._version, x.shape, x.stride(), x.dtype


def _gram(columns: Float[Tensor, "b groups d n"]) -> Float[Tensor, "groups d d"]:
    """The sum of x x^T over examples and positions, in float64."""
    groups, d = columns.shape[1:3]
    total = columns.new_zeros(groups, d, d, dtype=torch.float64)
    _add_products(total, columns)
    return total


def _add_products(total: Float[Tensor, "groups d d"], columns: Float[Tensor, "b groups d n"]) -> None:
    """Add the sum of x x^T, some examples side by side in one product. Of large ones the part above the
    diagonal is mirrored, which saves near half of the product, and no whole one lies in memory."""
    groups, d, n = columns.shape[1:]
    for part in columns.split(max(AT_ONCE // n, 1)):
        x = part[0] if len(part) == 1 else part.movedim(0, 2).reshape(groups, d, -1)
        if d < MIRRORED:
            total += x @ x.mT
            continue
        for rows in torch.arange(d).tensor_split(STRIPS):
            first, stop = int(rows[0]), int(rows[-1]) + 1
            below = x[:, first:stop] @ x[:, :stop].mT
            total[:, first:stop, :stop] += below
            total[:, :first, first:stop] += below[..., :first].mT


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
