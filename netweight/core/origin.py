"""Where a network comes from, so that a folder of packed weights can be made a network again.

A loader marks what it loads (`mark`); `Compressed.save` stores the mark, and `build` makes the same
architecture again, with weights that are about to be overwritten. Only what is listed here is ever
imported: a folder from outside cannot name code to run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netweight.core.errors import BadInput, unknown

if TYPE_CHECKING:
    from torch import nn

BUILDERS = {  # kind: the function that makes the architecture from (target, files)
    "built-in": "netweight.models.load:skeleton",
    "onnx": "netweight.models.onnx_reader:skeleton",
    "huggingface": "netweight.models.huggingface:skeleton",
    "graph": "netweight.models.graph_block:skeleton",
    "refined graph": "netweight.models.gcn:skeleton",
}


@dataclass(frozen=True)
class Origin:
    """kind: a key of `BUILDERS`, or "factory" (known only by name). target: the name under that kind.

    files: what has to travel with the weights (an ONNX graph without its weights, a config), by file name.
    """

    kind: str
    target: str
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def named(path: str) -> Callable[..., Any]:
    """The function that "package.module:name" names; used with paths of our own tables only."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def mark(model: nn.Module, origin: Origin) -> nn.Module:
    """Note on the model where it comes from; copies of the model keep the note."""
    model.netweight_origin = origin
    return model


def origin_of(model: nn.Module) -> Origin | None:
    """Where the model comes from, if a loader of ours made it."""
    origin = getattr(model, "netweight_origin", None)
    return origin if isinstance(origin, Origin) else None


def build(origin: Origin | None) -> nn.Module:
    """The architecture again, with arbitrary weights; raises `BadInput` where only its owner can build it."""
    if origin is None or origin.kind == "factory":
        whose = f"{origin.target} " if origin else "code that netweight does not know "
        raise BadInput(
            f"the network was built by {whose}and its folder holds weights only; give the original too "
            "(--like MODEL, or load(folder, like=model))"
        )
    if origin.kind not in BUILDERS:
        raise unknown("kind of network", origin.kind, BUILDERS)
    return named(BUILDERS[origin.kind])(origin.target, origin.files)
