"""Magnitude pruning: of the weights of a layer the smallest go.

Paper: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv:1506.02626.

For a weight w of n values and sparsity s,

    m_i = 1  iff  |w_i| is among the n - round(s n) largest of |w|;        w' = m * w.

Among equals the lower index is kept. A kept weight costs its own bits, and every weight one bit of the mask.

Differs from the paper: the number of zeros is given and not a threshold; retraining is left to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.compressed import Change
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.packed import Sparse


@dataclass(frozen=True)
class Magnitude:
    """Settings of `magnitude`. sparsity: the share of zeros in each layer, at least 0 and below 1."""

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"need 0 <= sparsity < 1, got sparsity={self.sparsity}")


def magnitude(model: nn.Module, task: Task, layers: Sequence[str], settings: Magnitude) -> Change:
    """Prune Linear, Conv, transposed Conv and Embedding weights. Looks at no data.

    Raises `DoesNotFit` for another kind of layer.
    """
    weights, left = weights_to_pack(model, layers)
    packed = {layer: Sparse.of(w, largest(w, settings.sparsity)) for layer, w in weights.items()}
    return Change(packed, left=left)


def largest(weight: Float[Tensor, "*shape"], sparsity: float) -> Bool[Tensor, "*shape"]:
    """m: True where a weight is kept."""
    order = weight.abs().reshape(-1).argsort(descending=True, stable=True)
    kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[order[: weight.numel() - round(sparsity * weight.numel())]] = True
    return kept.reshape(weight.shape)
