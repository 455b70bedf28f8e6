"""Blocks of a network, found on its modules.

A block is the outermost module below the network itself that holds two or more of the layers and stands in a
row of others: it lies in a Sequential or ModuleList, or its class occurs more than once. So the blocks of
residual networks and transformers are found by their shape, not by name; a layer in none of them is a block
of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

ROWS = (nn.Sequential, nn.ModuleList)


def blocks(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Block name -> those of `layers` that it holds; every layer in exactly one, blocks in module order."""
    kinds = Counter(type(module) for module in model.modules())
    found: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = tuple(layer for layer in layers if layer.startswith(f"{name}."))
        if not name or isinstance(module, ROWS) or len(inside) < 2 or inside[0] in owner:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, ROWS) or kinds[type(module)] > 1:
            found[name] = inside
            owner.update(dict.fromkeys(inside, name))
    found.update({layer: (layer,) for layer in layers if layer not in owner})
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}
