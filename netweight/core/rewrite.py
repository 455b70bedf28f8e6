"""Exact rewrites: the same function with friendlier weights. Each meets `core.compressed.Rewrite`.

    FoldBatchNorm   conv -> norm             becomes  conv', norm gone
    Scale           producer -> consumers    becomes  producer / s -> consumers * s     (per channel, s > 0)
    Unclip          ReLU6                    becomes  ReLU                              (exact below 6 alone)

`Scale` is exact where only linear or positively homogeneous maps (identity, ReLU, products with another
factor) lie between producer and consumers, and where nothing else reads the producer's output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Rewrite, replace
from netweight.core.errors import DoesNotFit


@dataclass(frozen=True)
class FoldBatchNorm:
    """W' = W g / sqrt(v + eps), b' = beta + (b - mu) g / sqrt(v + eps); the norm becomes the identity."""

    layer: str
    norm: str

    def apply(self, model: nn.Module) -> None:
        """Fold in place; raises `DoesNotFit` for a norm without running statistics."""
        layer, norm = model.get_submodule(self.layer), model.get_submodule(self.norm)
        if not isinstance(layer, WEIGHTED):
            raise DoesNotFit(f"{self.layer}: a norm cannot be folded into a {type(layer).__name__}")
        if getattr(norm, "running_var", None) is None:
            raise DoesNotFit(
                f"{self.norm}: a norm without running statistics cannot be folded into {self.layer}"
            )
        if len(norm.running_var) != len(layer.weight):
            raise DoesNotFit(
                f"{self.norm}: {len(norm.running_var)} channels, {self.layer} has {len(layer.weight)}"
            )
        with torch.no_grad():
            weight, mean, var = layer.weight, norm.running_mean.double(), norm.running_var.double()
            gain = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
            shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
            bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
            factor = gain / (var + norm.eps).sqrt()
            folded = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
            layer.weight = nn.Parameter(folded.to(weight.dtype))
            layer.bias = nn.Parameter(((bias - mean) * factor + shift).to(weight.dtype))
        replace(model, self.norm, nn.Identity())


@dataclass(frozen=True)
class Scale:
    """Output channels of the producer divided by s, input channels of the consumers times s.

    producer: a norm (gain and bias divided), or a Linear or Conv (rows and bias; its last len(s) rows, as
    in a joint projection). consumers: Linear or Conv layers that read it. scale: s, one positive number per
    channel.
    """

    producer: str
    consumers: tuple[str, ...]
    scale: Float[Tensor, " channels"]

    def __post_init__(self) -> None:
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise ValueError(f"{self.producer}: scales are positive and finite")

    def changed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same as an equation on parameters by full name; gradients reach them and s."""
        s, new = self.scale, {}
        for name in (f"{self.producer}.weight", f"{self.producer}.bias"):
            if name in values:
                value, rest = values[name], len(values[name]) - len(s)
                divided = value[rest:] / s.reshape(-1, *[1] * (value.ndim - 1))
                new[name] = torch.cat([value[:rest], divided]) if rest else divided
        for name in (f"{consumer}.weight" for consumer in self.consumers):
            weight = values[name]
            rows = weight.reshape(len(s) // weight.shape[1], -1, *weight.shape[1:])
            columns = s.reshape(len(rows), 1, -1, *[1] * (weight.ndim - 2))
            new[name] = (rows * columns).reshape(weight.shape)
        return new

    def apply(self, model: nn.Module) -> None:
        """Scale in place; raises `DoesNotFit` where channels do not agree."""
        producer = model.get_submodule(self.producer)
        if getattr(producer, "weight", None) is None:
            raise DoesNotFit(f"{self.producer}: a {type(producer).__name__} without a weight takes no scales")
        if len(producer.weight) < len(self.scale):
            raise DoesNotFit(
                f"{self.producer}: {len(producer.weight)} channels cannot take {len(self.scale)} scales"
            )
        with torch.no_grad():
            for name in ("weight", "bias"):
                value = getattr(producer, name, None)
                if value is not None:
                    divided = value.clone()
                    s = self.scale.to(value).reshape(-1, *[1] * (value.ndim - 1))
                    divided[-len(s) :] /= s
                    setattr(producer, name, nn.Parameter(divided))
            for name in self.consumers:
                scale_inputs(model.get_submodule(name), self.scale, name)


@dataclass(frozen=True)
class Unclip:
    """A ReLU6 becomes a ReLU, which can be scaled; exact where no input is above 6, so the methods that use
    it count it among what they cost."""

    activation: str

    def apply(self, model: nn.Module) -> None:
        """Replace in place; raises `DoesNotFit` for anything but a ReLU6."""
        module = model.get_submodule(self.activation)
        if not isinstance(module, nn.ReLU6):
            raise DoesNotFit(f"{self.activation}: a {type(module).__name__} is not a ReLU6")
        replace(model, self.activation, nn.ReLU())


def scale_inputs(layer: nn.Module, scale: Float[Tensor, " channels"], name: str = "layer") -> None:
    """Multiply the columns of a Linear or Conv (any groups) by s, in place."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    inputs = weight.shape[1] * groups
    if inputs != len(scale):
        raise DoesNotFit(f"{name}: {inputs} input channels cannot take {len(scale)} scales")
    s = scale.to(weight).reshape(groups, 1, -1)
    kernel = weight.shape[2:]
    with torch.no_grad():
        rows = weight.reshape(groups, -1, weight.shape[1], *kernel)
        scaled = rows * s.reshape(*s.shape, *[1] * len(kernel))
        layer.weight = nn.Parameter(scaled.reshape(weight.shape))


def rewritten(model: nn.Module, rewrites: Sequence[Rewrite]) -> nn.Module:
    """A copy of the model with the rewrites applied in order, in evaluation mode."""
    after = copy.deepcopy(model).eval()
    for rewrite in rewrites:
        rewrite.apply(after)
    return after


def residual(model: nn.Module, rewrites: Sequence[Rewrite], x: Tensor) -> float:
    """max |f - f'| in float64 over the outputs for x: a law says it is at most 1e-9."""
    before = copy.deepcopy(model).double().eval()
    after = rewritten(before, rewrites)
    with torch.no_grad():
        x = x.double() if x.is_floating_point() else x
        return float((before(x) - after(x)).abs().max())
