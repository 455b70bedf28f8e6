"""Calls of one module as they happen on calibration data: with what it was called, and what it gave.

A method that judges or trains a part of a network by itself replays them: `module(*args, **extra)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.task import Data

Call = tuple[tuple[Any, ...], Mapping[str, Any], Tensor]  # arguments and output of one call of a module


class _Enough(Exception):
    """The rest of the network need not run."""


@torch.no_grad()
def recorded(model: nn.Module, name: str, data: Data) -> list[Call]:
    """All calls of one module on the data ("" is the model); each pass over the network stops behind it."""
    calls: list[Call] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], extra: Mapping[str, Any], output: Any) -> None:
        calls.append((args, extra, first(output)))
        raise _Enough

    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    handle = model.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    model.eval()
    try:
        for x, _ in data:
            try:
                model(x.to(device))
            except _Enough:
                continue
    finally:
        for module, training in modes:
            module.training = training
        handle.remove()
    return calls


def first(output: Any) -> Tensor:
    """The output, or the first of several: what a decoder block passes on."""
    return output[0] if isinstance(output, tuple) else output
