"""k-means: the weights of a layer share a small table of values.

Paper: Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
Huffman Coding", ICLR 2016, arXiv:1510.00149, section 3.

    w'_ij = C[m_ij],    C, m = arg min sum over i, j of (w_ij - C[m_ij])^2,    |C| = 2^b.

Stored are b bits a weight, the 2^b entries of C and a scale.

Differs from the paper: nothing is pruned, fine-tuned or Huffman coded; C is the optimum (found by dynamic
programming, nearly so for large layers) and not a local one from linear starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from netweight.core.compressed import Change
from netweight.core.task import Task
from netweight.nn.codebook import Codebook, kept
from netweight.nn.layers import weights_to_pack


@dataclass(frozen=True)
class KMeans:
    """Settings of `kmeans`. bits: of a code, 1 to 8; a table has 2^bits entries."""

    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"need 1 <= bits <= 8, got bits={self.bits}")


def kmeans(model: nn.Module, task: Task, layers: Sequence[str], settings: KMeans) -> Change:
    """A table for each layer, embeddings among them; looks at no data.

    A layer of which the table is as large as what it saves is left as it is.
    """
    weights, left = weights_to_pack(model, layers)
    packed, larger = kept({n: Codebook.nearest(w, settings.bits) for n, w in weights.items()}, weights)
    return Change(packed, left={**left, **larger})
