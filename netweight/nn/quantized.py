"""Layers of a network rounded while it is trained, and the same network packed afterwards.

attach(model, rule)        rule(name, layer) -> Roundings or None: each such layer becomes a `Quantized`
begin(model, x)            one batch, so that every learnt step has its start
... train ...
plain, change = finished(model)      the float network, and the Change that gives what was trained
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, ActivationRounding, Change, Packed, replace
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, in_groups, storable
from netweight.nn.buckets import InBuckets, OnPoints
from netweight.nn.codebook import Codebook
from netweight.nn.elastic import Elastic, ElasticRounding
from netweight.nn.fake import Dynamic, DynamicRounding, StaticRounding
from netweight.nn.layers import run
from netweight.nn.packed import Affine
from netweight.nn.quantizer import FromLargest, FromMean, Learnt, codes
from netweight.nn.shifted import PlacedRounding, Shifted

TREATED = (*WEIGHTED, nn.Embedding)


@dataclass(frozen=True)
class Roundings:
    """What rounds the weight and the input of a layer, None for nothing."""

    weight: Learnt | FromMean | FromLargest | InBuckets | OnPoints | None = None
    input: Learnt | Shifted | Elastic | Dynamic | None = None


Rule = Callable[[str, nn.Module], Roundings | None]


class Quantized(nn.Module):
    """`like` with weight and input rounded on each call; its own weight is what is trained."""

    def __init__(self, like: nn.Module, how: Roundings) -> None:
        super().__init__()
        if not isinstance(like, TREATED):
            raise DoesNotFit(f"a {type(like).__name__} is not trained with rounded weights; leave it out")
        self.like = like
        self.weight_rounding, self.input_rounding = how.weight, how.input

    @property
    def weight(self) -> Tensor:
        """The weight as it is rounded now."""
        return self.like.weight if self.weight_rounding is None else self.weight_rounding(self.like.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        return getattr(self.like, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """What the rounded layer gives for x."""
        return run(self.like, x if self.input_rounding is None else self.input_rounding(x), self.weight)


def attach(model: nn.Module, rule: Rule) -> nn.Module:
    """A copy of the model in which each layer that the rule names is a `Quantized`."""
    model = copy.deepcopy(model)
    for name, layer in [*model.named_modules()]:
        how = rule(name, layer) if isinstance(layer, TREATED) else None
        if how is not None:
            replace(model, name, Quantized(layer, how))
    return model


def inner_layers(model: nn.Module) -> list[str]:
    """All Linear and Conv layers but the first and the last, which are customarily left as they are."""
    return [name for name, layer in model.named_modules() if isinstance(layer, WEIGHTED)][1:-1]


@torch.no_grad()
def begin(model: nn.Module, x: Tensor) -> None:
    """Run one batch in evaluation mode, so that every learnt step has its start."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    model(x)
    for module, training in modes:
        module.training = training


def quantized(model: nn.Module) -> dict[str, Quantized]:
    """The rounded layers by the name they have in the float network."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Quantized)}


def finished(model: nn.Module) -> tuple[nn.Module, Change]:
    """The float network in evaluation mode, and the Change that makes of it what was trained, bit for bit.

    Raises `DoesNotFit` where an input is rounded to levels that are not all numbers of some bits.
    """
    plain = copy.deepcopy(model).eval()
    packed: dict[str, Packed] = {}
    activations: dict[str, ActivationRounding] = {}
    for name, layer in quantized(plain).items():
        if layer.weight_rounding is not None:
            packed[name] = pack(layer.like.weight.detach(), layer.weight_rounding)
        if layer.input_rounding is not None:
            activations[name] = static(layer.input_rounding, name)
        replace(plain, name, layer.like)
    return plain.requires_grad_(False), Change(packed, activations=activations)


@torch.no_grad()
def pack(weight: Tensor, rounding: Learnt | FromMean | FromLargest | InBuckets | OnPoints) -> Packed:
    """The rounded weight as it is stored: codes on a grid where 0 is a level, else places in a table."""
    if isinstance(rounding, InBuckets | OnPoints):
        return rounding.stored(weight)
    levels, step = rounding.levels, rounding.size(weight)
    found, rows = codes(weight, step, levels) - levels.low, step.numel() > 1
    if not levels.half and levels.low <= 0 and levels.bits <= 8:
        grid = Grid(max(levels.bits, 2), symmetric=False, group=0 if rows else -1)
        zero = torch.full((step.numel(),), -levels.low, dtype=torch.uint8, device=weight.device)
        flat = in_groups(found.to(torch.uint8), grid.group)
        return Affine.of(flat, storable(step.reshape(-1)), zero, weight, grid)
    table = torch.arange(levels.low, levels.high + 1, device=weight.device) + levels.offset
    group_of = torch.arange(len(weight), device=weight.device) * rows
    return Codebook.of(found.long().flatten(1), table[None].float(), step.reshape(-1), group_of, weight)


def static(
    rounding: Learnt | Shifted | Elastic | Dynamic, name: str
) -> StaticRounding | PlacedRounding | ElasticRounding | DynamicRounding:
    """The rounding of an input once its steps are fixed."""
    if isinstance(rounding, Shifted | Elastic | Dynamic):
        return rounding.stored()
    levels = rounding.levels
    if levels.half or rounding.axis is not None or levels.count != 2**levels.bits or levels.low > 0:
        raise DoesNotFit(
            f"{name}: inputs on the levels {levels} have no stored form; keep the network as it is"
        )
    step = rounding.size(rounding.step).detach()
    return StaticRounding(step.clone(), torch.tensor(float(-levels.low)).to(step), levels.bits)
