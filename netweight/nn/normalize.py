"""Layer 0 of an image network: it takes pixels as they are and normalises them.

    y_c = (x_c - mean_c) / std_c

so that the radius of a perturbation is in the units of the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit


class Normalize(nn.Module):
    """(x - mean) / std for each channel; both are buffers and travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"need one positive std per mean, got mean={list(mean)}, std={list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The normalised images; raises `DoesNotFit` for another number of channels."""
        # one channel would be broadcast to three in silence
        if x.shape[-3] != len(self.mean):
            raise DoesNotFit(
                f"images of {x.shape[-3]} channels, but the network takes {len(self.mean)}; convert them"
            )
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """mean and std, shown in the module's name."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
