"""Exact rewrites whose numbers are learnt: where a block may be rewritten, and with what it starts.

    AtSite    producer -> readers      s, or a whole A behind a norm; a shift d
    AtValue   value -> output          A by head; a shift d
    AtQuery   query, key               A by head, or P and R where positions rotate them

Each gives its rewrites (`core.affine`, `core.rewrite.Scale`) as they stand, through which gradients reach its
tensors. s_j and the diagonals of A start at max |x_j|^alpha / max |W_:j|^(1 - alpha), those of query and key
at 1, d at the middle of x_j's range (Ma et al., AffineQuant, ICLR 2024, arXiv:2403.12544).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.affine import Band, Facing, Mixing, Shift, Turn, rotary
from netweight.core.attention import Attention, attention
from netweight.core.compressed import weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.moments import watched
from netweight.core.rewrite import Scale
from netweight.core.sites import Site, column_ranges, sites
from netweight.core.task import Data

LEAST = 1e-2  # of s and of a diagonal entry
MOMENTUM = 0.99  # of the moving average that d starts from
Made = Shift | Scale | Turn | Mixing | Facing


@dataclass(frozen=True)
class Channels:
    """What a layer's inputs look like: largest |x_j|, and the moving average of the middle of x_j's range."""

    largest: Float[Tensor, " in"]
    middle: Float[Tensor, " in"]


def channels(model: nn.Module, layers: Sequence[str], data: Data) -> dict[str, Channels]:
    """Of the inputs of those layers, over all batches."""
    found: dict[str, Channels] = {}

    def see(layer: str, x: Tensor) -> None:
        linear = isinstance(model.get_submodule(layer), nn.Linear)
        flat = (x if linear else x.movedim(-model.get_submodule(layer).weight.ndim + 1, -1)).flatten(0, -2)
        low, high = flat.amin(0), flat.amax(0)
        largest, middle = torch.maximum(high, -low), (high + low) / 2
        if layer in found:
            largest = torch.maximum(largest, found[layer].largest)
            middle = MOMENTUM * found[layer].middle + (1 - MOMENTUM) * middle
        found[layer] = Channels(largest, middle)

    device = next(model.parameters()).device
    with watched(model, layers, see):
        for x, _ in data:
            model(x.to(device))
    return found


@dataclass(frozen=True)
class AtSite:
    """A producer and its readers: s, or a matrix A behind a norm; and d, None for no shift."""

    site: Site
    size: Tensor
    shift: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """What is learnt."""
        return [self.size] if self.shift is None else [self.size, self.shift]

    def rewrites(self, band: Band) -> list[Shift | Scale | Turn]:
        """As they stand under the mask; gradients reach `tensors`."""
        producer, consumers = self.site.producer, self.site.consumers
        shift = [] if self.shift is None else [Shift(producer, consumers, self.shift)]
        if self.size.ndim == 1:
            return [*shift, Scale(producer, consumers, self.size)]
        return [*shift, Turn(producer, consumers, band.of(self.size))]


@dataclass(frozen=True)
class AtValue:
    """Value and output of attention: A by head, and d of the values, None for no shift."""

    value: str
    output: str
    size: Float[Tensor, "heads d d"]
    shift: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """What is learnt."""
        return [self.size] if self.shift is None else [self.size, self.shift]

    def rewrites(self, band: Band) -> list[Shift | Mixing]:
        """As they stand under the mask; gradients reach `tensors`."""
        shift = [] if self.shift is None else [Shift(self.value, (self.output,), self.shift)]
        return [*shift, Mixing(self.value, self.output, band.of(self.size))]


@dataclass(frozen=True)
class AtQuery:
    """Query and key: A by head; or, where positions rotate, the P and R of `core.affine.rotary`."""

    query: str
    key: str
    size: Float[Tensor, "heads ..."]
    turn: Float[Tensor, "heads half"] | None

    @property
    def tensors(self) -> list[Tensor]:
        """What is learnt."""
        return [self.size] if self.turn is None else [self.size, self.turn]

    def rewrites(self, band: Band) -> list[Facing]:
        """As they stand under the mask; gradients reach `tensors`."""
        if self.turn is None:
            return [Facing(self.query, self.key, band.of(self.size))]
        half = self.size.shape[-1]
        open_yet = band.width(2 * half) > half
        A = rotary(self.size, self.turn * (band.stability if open_yet else 0.0))
        return [Facing(self.query, self.key, A)]


Place = AtSite | AtValue | AtQuery


@dataclass(frozen=True)
class Where:
    """A block of a network, the layers of it that are rounded, and what their inputs look like."""

    net: nn.Module
    block: str
    layers: Sequence[str]
    seen: Mapping[str, Channels]


def places(where: Where, data: Data, *, alpha: float, whole: bool) -> list[Place]:
    """Where the block is rewritten: all readers are in `layers`, so that each rewrite helps what is rounded.

    whole: a matrix behind each norm. In a block that is not known by name, only scales at the sites of its
    graph, on which `data` is run.
    """
    net, known = where.net, attention(where.net, where.block)
    found: list[Place] = []
    for site in reachable(net, data, where.block):
        if not set(site.consumers) <= set(where.layers) or known and not site.norm(net):
            continue
        s = start(where, site.consumers, alpha)
        shift = middle(where, site.producer, site.consumers) if known else None
        found.append(AtSite(site, torch.diag(s) if known and whole else s, shift))
    return found + (in_attention(where, known, alpha) if known else [])


def in_attention(where: Where, known: Attention, alpha: float) -> list[Place]:
    """Value and output, query and key."""
    found: list[Place] = []
    value, key = (weight_of(where.net, name) for name in (known.value, known.key))
    if known.output in where.layers:
        s = start(where, (known.output,), alpha).reshape(len(value) // known.width, -1, known.width)
        shared = s.log().mean(1).exp()  # of the query heads that read one head
        shift = middle(where, known.value, (known.output,))
        found.append(AtValue(known.value, known.output, torch.diag_embed(shared), shift))
    if known.bilinear and {known.query, known.key} <= set(where.layers):
        ones = key.new_ones(len(key) // known.width, known.width)
        half = ones[:, ::2]
        size, turn = (half.clone(), 0 * half) if known.rotary else (torch.diag_embed(ones), None)
        found.append(AtQuery(known.query, known.key, size, turn))
    return found


def reachable(net: nn.Module, data: Data, block: str) -> list[Site]:
    """The sites in the block; none where the network cannot be captured."""
    try:
        found = sites(net, data)
    except DoesNotFit:
        return []
    return [site for site in found if not block or site.producer.startswith(f"{block}.")]


def start(where: Where, consumers: Sequence[str], alpha: float) -> Float[Tensor, " in"]:
    """s_j = max |x_j|^alpha / max |W_:j|^(1 - alpha), at least `LEAST`."""
    largest = where.seen[consumers[0]].largest
    columns = torch.stack([column_ranges(where.net, name) for name in consumers]).amax(0)
    return (largest.pow(alpha) / columns.clamp(min=1e-5).pow(1 - alpha)).clamp(min=LEAST)


def middle(where: Where, producer: str, consumers: Sequence[str]) -> Float[Tensor, " channels"] | None:
    """Where d starts; None where a bias is missing, or where query heads share what would be shifted."""
    if any(getattr(where.net.get_submodule(name), "bias", None) is None for name in (producer, *consumers)):
        return None
    found = where.seen[consumers[0]].middle
    return found.clone() if len(found) == len(weight_of(where.net, producer)) else None


@torch.no_grad()
def keep_away_from_zero(at: Sequence[Place]) -> None:
    """Entries of diagonals at least `LEAST` in size, those of s also positive; in place."""
    for place in at:
        if isinstance(place, AtSite) and place.size.ndim == 1:
            place.size.clamp_(min=LEAST)
            continue
        rotates = isinstance(place, AtQuery) and place.turn is not None
        diagonal = place.size if rotates else place.size.diagonal(dim1=-2, dim2=-1)
        sign = torch.where(diagonal < 0, -1.0, 1.0)
        diagonal.copy_(sign * diagonal.abs().clamp(min=LEAST))


def detached(rewrite: Made) -> Made:
    """The rewrite without the history of its tensors."""
    tensors = {k: v.detach().clone() for k, v in vars(rewrite).items() if isinstance(v, Tensor)}
    return dataclasses.replace(rewrite, **tensors)
