"""Chance under control: torch's own random state inside a training, and networks that begin anew."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from netweight.core.errors import DoesNotFit


@contextlib.contextmanager
def own_chance(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own random state is that of the seed inside, and what it was before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def restarted(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with new random weights, as its layers draw them.

    Raises `DoesNotFit` for a layer that has parameters and no `reset_parameters`.
    """
    fresh = copy.deepcopy(model)
    with own_chance(seed, next((p.device for p in model.parameters()), torch.device("cpu"))):
        for name, module in fresh.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif any(True for _ in module.parameters(recurse=False)):
                raise DoesNotFit(
                    f"{name}: a {type(module).__name__} cannot begin anew; train without --fresh"
                )
    return fresh
