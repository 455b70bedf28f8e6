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

CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


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
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def patches(layer: nn.Module, x: Tensor) -> Float[Tensor, "groups n d"]:
    """Every vector that the layer multiplies its weight with, one row each; n = examples x positions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if x.ndim == len(layer.kernel_size) + 1:
        x = x[None]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0  # type:
        ignore[arg - type]
    channels, size = layer.in_channels, torch.Size(layer.kernel_size).numel()
    one_hot = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *layer.kernel_size)
    one_hot = one_hot.repeat(channels, *[1] * (one_hot.ndim - 1))
    convolve = next(function for kind, function in CONVOLVE.items() if isinstance(layer, kind))
    columns = convolve(
        x, one_hot, stride=layer.stride, padding=padding, dilation=layer.dilation, groups=channels
    )
    groups = layer.groups
    return columns.flatten(2).transpose(1, 2).reshape(-1, groups, columns.shape[1] // groups).transpose(0, 1)


def _collect(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def see(layer: str, x: Tensor) -> None:
        module = model.get_submodule(layer)
        rows = patches(module, x)
        flat = x.movedim(1, -1) if not isinstance(module, nn.Linear) and x.ndim > 2 else x
        flat = flat.reshape(-1, flat.shape[-1])
        size = flat.abs()
        new = Moments(
            gram=(rows.transpose(1, 2) @ rows).double(),
            total=rows.sum(1).double(),
            magnitude=size.sum(0).double() / len(flat) * rows.shape[1],
            largest=size.amax(0).double(),
            low=float(x.min()),
            high=float(x.max()),
            positions=float(rows.shape[1]),
        )
        found[layer] = _sum(found[layer], new) if layer in found else new

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with watched(model, layers, see):
        for x, _ in steps(data, "Watching layer inputs", total=-(-len(data) // data.batch)):
            model(x.to(device))
    for layer in layers:
        if layer not in found:
            raise DoesNotFit(f"{layer}: the layer is never called on the calibration data; leave it out")
    return {layer: _mean(found[layer], len(data)) for layer in layers}


def _sum(a: Moments, b: Moments) -> Moments:
    return Moments(
        a.gram.add_(b.gram),
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
