"""N:M magnitude pruning: of every M consecutive inputs of a neuron, keep the N largest weights.

Paper: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378.

For one row w of a weight, and each group G of M consecutive inputs,

    m_j = 1  iff  |w_j| is among the N largest of {|w_k| : k in G},  j in G;        w' = m * w.

Groups run along the inputs, the axis a matrix product sums over. A kept weight costs its own bits
plus ceil(log2 M) for its place in the group: 2:4 at 16 bits stores 36 bits where dense stores 64.

Differs from the paper: no channel permutation before pruning, no retraining after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, Packed
from netweight.core.errors import DoesNotFit
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.nm_sparse import Pattern, mask, stored
from netweight.nn.packed import NM


@dataclass(frozen=True)
class NMMagnitude:
    """Settings of `nm_magnitude`.

    keep: weights kept per group, the paper's N (kept, not removed).
    of: weights per group, the paper's M, at most 256.
    """

    keep: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of <= 256:
            raise ValueError(f"need 1 <= keep < of <= 256, got keep={self.keep}, of={self.of}")


def nm_magnitude(model: nn.Module, task: Task, layers: Sequence[str], settings: NMMagnitude) -> Change:
    """Prune Linear and Conv layers to N:M. Looks at no data.

    Raises `DoesNotFit` for another kind of layer and where `of` does not divide the inputs.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    packed: dict[str, Packed] = {}
    for layer, weight in weights.items():
        inputs = weight.shape[1]
        if inputs % settings.of:
            raise DoesNotFit(f"{layer}: {inputs} inputs are not a multiple of {settings.of}")
        packed[layer] = encode(weight, settings.keep, settings.of)
    return Change(packed, left=left)


def encode(weight: Float[Tensor, "out in *kernel"], keep: int, of: int) -> NM:
    """w' as it is stored: the kept values and their places; of equals the lower place stays."""
    return stored(weight, mask(weight, Pattern(keep, of)), of)
