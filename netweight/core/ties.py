"""Layers that have to be treated alike: which those are, and plans that keep to it.

Layers that read the same tensor share the quantizer of that tensor. A set of tied layers is one choice: its
options are those that all of its layers have, with summed costs and distortions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from netweight.core.errors import DoesNotFit
from netweight.core.moments import watched
from netweight.core.plan import Budget, Option, Plan, allocate

BETWEEN = "\n"  # between the names of tied layers; no name of a module holds one


def in_order(model: nn.Module, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """What each layer reads for x, layers in the order of their first call; the model stays as it is."""
    seen: dict[str, Tensor] = {}
    with watched(model, layers, lambda layer, value: seen.setdefault(layer, value)):
        model(x.to(next((p.device for p in model.parameters()), x.device)))
    return seen


def readers(inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The layers that read one and the same tensor, where these are two or more."""
    places: dict[Any, list[str]] = {}
    for layer, x in inputs.items():
        places.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(layer)
    return [tuple(layers) for layers in places.values() if len(layers) > 1]


def allocate_tied(
    options: Sequence[Option], budget: Budget, ties: Sequence[Sequence[str]], *, fixed: float = 0.0
) -> Plan:
    """`allocate` with the same method and settings for all layers of a tie.

    Layers of a tie that have no options are passed over. Raises `DoesNotFit` where tied layers have no option
    in common, and what `allocate` raises.
    """
    by_layer: dict[str, list[Option]] = {}
    for option in options:
        by_layer.setdefault(option.layer, []).append(option)
    sets = [tuple(layer for layer in tie if layer in by_layer) for tie in ties]
    of = {layer: tie for tie in sets for layer in tie}
    joint: list[Option] = []
    for layer in by_layer:
        tie = of.get(layer, (layer,))
        if layer == tie[0]:
            joint += together([by_layer[name] for name in tie])
    plan = allocate(joint, budget, fixed=fixed)
    choices = {
        layer: next(option for option in by_layer[layer] if _same(option, choice))
        for name, choice in plan.choices.items()
        for layer in name.split(BETWEEN)
    }
    return Plan({layer: choices[layer] for layer in by_layer}, fixed)


def together(groups: Sequence[Sequence[Option]]) -> list[Option]:
    """The options that all layers have, as options of one layer."""
    found = []
    for option in groups[0]:
        alike = [[other for other in group if _same(option, other)][:1] for group in groups]
        if all(alike):
            every = [one for (one,) in alike]
            costs = {name: sum(one.cost[name] for one in every) for name in option.cost}
            name = BETWEEN.join(one.layer for one in every)
            distortion = sum(one.distortion for one in every)
            found.append(Option(name, option.method, option.settings, costs, distortion))
    if not found:
        names = ", ".join(group[0].layer for group in groups)
        raise DoesNotFit(f"{names}: these layers are tied and have no option in common; give them one")
    return found


def _same(a: Option, b: Option) -> bool:
    return a.method == b.method and dict(a.settings) == dict(b.settings)
