"""What a written network gives in another runtime, beside what the network itself gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from netweight.core.compressed import Compressed

CLOSE = 1e-3  # of the largest output


@dataclass(frozen=True)
class Reopened:
    """The two compared.

    largest_difference: between outputs, in their units. same: whether that is at most 1e-3 of the largest
    output (at least 1). same_class: share of examples (tokens) whose largest output is the same.
    integer_weights: how many of the `packed_weights` stay codes in what was written.
    """

    examples: int
    largest_difference: float
    same: bool
    same_class: float
    integer_weights: int
    packed_weights: int


def wanted(small: Compressed, x: Tensor) -> Tensor:
    """The network's own outputs for x, float32 on the CPU."""
    device = next((t.device for t in (*small.model.parameters(), *small.model.buffers())), x.device)
    with torch.no_grad():
        return small.model.eval()(x.to(device)).float().cpu()


def reopened(small: Compressed, x: Tensor, found: Tensor, integer_weights: int) -> Reopened:
    """The outputs `found` in another runtime for x, beside those of the network."""
    expected = wanted(small, x)
    difference = float((found - expected).abs().max())
    return Reopened(
        examples=len(x),
        largest_difference=difference,
        same=math.isfinite(difference) and difference <= CLOSE * max(1.0, float(expected.abs().max())),
        same_class=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        integer_weights=integer_weights,
        packed_weights=len(small.packed),
    )
