"""Power norms in place of others, and power norms folded into what reads them. Rewrites (`core.compressed`).

    InsertPowerNorm     layer, RMS or batch norm    becomes  power norm with its gain and shift (not exact)
    FoldPowerNorm       norm -> Linear              becomes  layer scale -> Linear'             (exact)

Paper: Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020, arXiv:2003.07845.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.compressed import replace
from netweight.core.errors import DoesNotFit, unknown
from netweight.core.graph import capture
from netweight.nn.power_norm import PowerNorm


@dataclass(frozen=True)
class InsertPowerNorm:
    """Power norms in place of other norms, with their gain and shift.

    What is a power norm already stays: on a network that was trained with them it changes nothing, on the
    bare architecture of a folder it makes the places for what the folder holds.
    """

    norms: tuple[str, ...]
    kind: str
    groups: int
    warmup: int
    forward_decay: float
    backward_decay: float

    def apply(self, model: nn.Module) -> None:
        """Replace in place; raises `DoesNotFit` for what is no norm over one axis."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for name in self.norms:
            norm = model.get_submodule(name)
            if not isinstance(norm, PowerNorm):
                replace(model, name, self.like(norm, name).to(device))

    def like(self, norm: nn.Module, name: str) -> PowerNorm:
        """A power norm of the same features, with the same gain and shift."""
        features, axis = place_of(norm, name)
        new = PowerNorm(
            features,
            kind=self.kind,
            groups=self.groups if axis == -1 else 0,
            warmup=self.warmup,
            forward_decay=self.forward_decay,
            backward_decay=self.backward_decay,
            axis=axis,
        )
        with torch.no_grad():
            for own in ("weight", "bias"):
                value = getattr(norm, own, None)
                if value is not None:
                    getattr(new, own).copy_(value)
        return new.train(norm.training)


def place_of(norm: nn.Module, name: str) -> tuple[int, int]:
    """How many features a norm has, and their axis; raises `DoesNotFit` where it is of another kind."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return norm.num_features, 1
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and len(norm.normalized_shape) == 1:
        return norm.normalized_shape[0], -1
    weight = getattr(norm, "weight", None)
    if type(norm).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.ndim == 1:
        return len(weight), -1  # of a Transformers model
    raise DoesNotFit(f"{name}: a {type(norm).__name__} is no norm over one axis; leave it out")


def norms_of(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The norms to replace, in the order of the network: those named, else all."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise unknown("norm", name, [n for n in modules if n])
        place_of(modules[name], name)
    found = [n for n, module in modules.items() if n in names or not names and n and is_norm(module)]
    if not found:
        raise DoesNotFit(f"{type(model).__name__}: it has no norm to replace; give a network that has")
    return tuple(found)


def is_norm(module: nn.Module) -> bool:
    """Whether it can be replaced."""
    try:
        return bool(place_of(module, ""))
    except DoesNotFit:
        return False


@dataclass(frozen=True)
class FoldPowerNorm:
    """Exact: W' = W diag(gamma / psi), b' = b + W beta in every reader; of the norm, layer scale is left."""

    norm: str
    readers: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        """Fold in place; raises `DoesNotFit` for readers that are not Linear, or another norm."""
        norm = model.get_submodule(self.norm)
        if not isinstance(norm, PowerNorm):
            raise DoesNotFit(f"{self.norm}: a {type(norm).__name__} is no power norm; fold nothing")
        with torch.no_grad():
            factor, shift = (part.double() for part in norm.affine())
            for name in self.readers:
                layer = model.get_submodule(name)
                if not isinstance(layer, nn.Linear) or layer.in_features != norm.features:
                    raise DoesNotFit(f"{name}: a norm of {norm.features} features folds into no such layer")
                weight = layer.weight.double()
                bias = weight @ shift + (0 if layer.bias is None else layer.bias.double())
                layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
                layer.weight = nn.Parameter((weight * factor).to(layer.weight.dtype))
        replace(model, self.norm, norm.scale)


def folds(model: nn.Module, x: Tensor) -> list[FoldPowerNorm]:
    """Every power norm that Linear layers alone read, each of which is called once; x: some inputs."""
    graph = capture(model, x)
    read: dict[str, list[str]] = {}  # of a node: who reads it
    for node in graph.nodes:
        for name in set(node.inputs):
            read.setdefault(name, []).append(node.name)
    nodes = {node.name: node for node in graph.nodes}
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, PowerNorm):
            continue
        inside = {n.name for n in graph.nodes if n.layer == name or n.layer.startswith(f"{name}.")}
        beyond = [r for n in inside for r in read.get(n, []) if r not in inside]
        last = {n for n in inside if any(r not in inside for r in read.get(n, []))}
        layers = tuple(sorted({nodes[r].layer for r in beyond}))
        if len(last) == 1 and not inside & set(graph.outputs) and _linear(model, graph.nodes, beyond, layers):
            found.append(FoldPowerNorm(name, layers))
    return found


def _linear(model: nn.Module, nodes: Sequence[Any], beyond: list[str], layers: tuple[str, ...]) -> bool:
    """Whether those nodes are Linear layers of the model, each called once and with a weight of its own."""
    called = [n for n in nodes if n.layer in layers]
    weights = [n.inputs[1] for n in nodes if n.op == "aten.linear"]
    return all(
        n.op == "aten.linear" and n.name in beyond and weights.count(n.inputs[1]) == 1
        and isinstance(model.get_submodule(n.layer), nn.Linear)
        for n in called
    )  # fmt: skip
