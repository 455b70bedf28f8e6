"""`Permute`: the neurons between two layers in another order; the function stays the same.

    rows of the producers, channels of the norms between    o[0], o[1], ..
    columns of every layer that reads them                  o[0], o[1], ..

Exact for whatever acts on each channel alone between them. A residual stream, a grouped convolution or the
heads of an attention tie channels together, so that `orderable` does not name them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED
from netweight.core.errors import DoesNotFit
from netweight.core.sites import BLOCKS, foldable, sites
from netweight.core.task import Data

FEEDFORWARD = (  # producers and consumers in the decoder blocks of `core.sites`
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("fc1",), "fc2"),
)
CHANNELS = ("weight", "bias", "running_mean", "running_var")  # of a norm


@dataclass(frozen=True)
class Permute:
    """Channel i becomes channel o[i] of before.

    producers: Linear or Conv layers whose outputs meet channel by channel. norms: batch norms between.
    consumers: all layers that read them. order: o, every channel once.
    """

    producers: tuple[str, ...]
    norms: tuple[str, ...]
    consumers: tuple[str, ...]
    order: Int[Tensor, " channels"]

    def __post_init__(self) -> None:
        channels = torch.arange(self.order.numel())
        if self.order.is_floating_point() or not torch.equal(self.order.cpu().long().sort().values, channels):
            raise ValueError(f"{', '.join(self.producers)}: an order names every channel once")

    def apply(self, model: nn.Module) -> None:
        """Permute in place; raises `DoesNotFit` where channels do not agree or a convolution has groups."""
        for name in (*self.producers, *self.consumers):
            layer = model.get_submodule(name)
            if not isinstance(layer, WEIGHTED) or getattr(layer, "groups", 1) != 1:
                raise DoesNotFit(f"{name}: the channels of a {type(layer).__name__} cannot be put in order")
        for name in (*self.producers, *self.norms):
            _take(model, name, 0, self.order, CHANNELS)
        for name in self.consumers:
            _take(model, name, 1, self.order, ("weight",))


@dataclass(frozen=True)
class Between:
    """Neurons that may be put in any order: what `Permute` needs but the order."""

    producers: tuple[str, ...]
    norms: tuple[str, ...]
    consumers: tuple[str, ...]

    def permuted(self, order: Int[Tensor, " channels"]) -> Permute:
        """The rewrite that puts them in that order."""
        return Permute(self.producers, self.norms, self.consumers, order)


def orderable(model: nn.Module, data: Data) -> list[Between]:
    """All such places: those of `core.sites` that follow a layer, and feed-forward parts of decoder blocks.

    Raises `DoesNotFit` for a model that is captured neither by name nor as one graph.
    """
    blocks = [(name, block) for name, block in model.named_modules() if type(block).__name__ in BLOCKS]
    found: list[Between] = []
    for name, block in blocks:
        prefix = f"{name}." if name else ""
        for producers, consumer in FEEDFORWARD:
            if all(isinstance(_find(block, part), nn.Linear) for part in (*producers, consumer)):
                found.append(Between(tuple(prefix + part for part in producers), (), (prefix + consumer,)))
    if not blocks:
        norms_there = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        behind = {norm: layer for layer, norm in foldable(model, data)} if norms_there else {}
        for site in sites(model, data):
            producer = behind.get(site.producer, site.producer)
            norms = (site.producer,) if site.producer in behind else ()
            found.append(Between((producer,), norms, site.consumers))
    return [place for place in found if _free(model, place)]


def _free(model: nn.Module, place: Between) -> bool:
    """Whether all ends are layers whose channels are not tied into groups."""
    ends = [model.get_submodule(name) for name in (*place.producers, *place.consumers)]
    return all(isinstance(end, WEIGHTED) and getattr(end, "groups", 1) == 1 for end in ends)


def _find(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _take(model: nn.Module, name: str, axis: int, order: Tensor, parts: tuple[str, ...]) -> None:
    """The module's tensors in another order along one axis."""
    module = model.get_submodule(name)
    with torch.no_grad():
        for part in parts:
            value = getattr(module, part, None)
            if value is None:
                continue
            if value.shape[axis] != len(order):
                raise DoesNotFit(f"{name}: {value.shape[axis]} channels cannot take an order of {len(order)}")
            taken = value.index_select(axis, order.to(value.device).long())
            setattr(module, part, nn.Parameter(taken) if isinstance(value, nn.Parameter) else taken)
