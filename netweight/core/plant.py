"""Planted workloads: a small network is made as hard to round as a large one, and computes the same.

    outliers    share p of the channels of each site times c, the reading columns / c
    imbalance   channel i of each site times r_i, the reading columns / r_i, ln r_i ~ N(0, sigma^2)
    mixing      value rows of a head times B, its output columns times B^-1, cond(B) = k

`core.rewrite.rewritten` puts them in. They are `core.rewrite.Scale` and `core.affine.Mixing`, so that a
method that works can undo them: the optimum is known. Small networks lack the outlier channels of large ones
(Dettmers et al., "LLM.int8()", 2022, arXiv:2208.07339), so what a method claims about them has to be shown on
a planted network, beside the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netweight.core.affine import Mixing
from netweight.core.rewrite import Scale
from netweight.core.sites import Site


def outliers(
    model: nn.Module, sites: Sequence[Site], *, factor: float = 16.0, share: float = 0.05, seed: int = 0
) -> list[Scale]:
    """Each site's outputs times `factor` in a random `share` of its channels (at least one)."""
    if not (factor > 0 and 0 < share <= 1):
        raise ValueError(f"need factor > 0 and 0 < share <= 1, got factor={factor}, share={share}")
    generator = torch.Generator().manual_seed(seed)
    plants = []
    for site in sites:
        width = _channels(model, site)
        scale = torch.ones(width)
        scale[torch.randperm(width, generator=generator)[: max(1, round(share * width))]] = 1 / factor
        plants.append(Scale(site.producer, site.consumers, scale))
    return plants


def imbalance(model: nn.Module, sites: Sequence[Site], *, spread: float = 1.5, seed: int = 0) -> list[Scale]:
    """Each site's channels times exp(spread N(0, 1))."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Scale(
            site.producer,
            site.consumers,
            torch.exp(-spread * torch.randn(_channels(model, site), generator=generator)),
        )
        for site in sites
    ]


def mixing(
    value: str, output: str, *, heads: int, width: int, condition: float = 30.0, seed: int = 0
) -> Mixing:
    """B = U diag(1 .. 1/condition) V^T with random orthogonal U, V, one for each head of `width` channels.

    It is the A^-T of `core.affine.Mixing`; `heads` are those of value.
    """
    generator = torch.Generator().manual_seed(seed)

    def orthogonal() -> Tensor:
        gaussian = torch.randn(heads, width, width, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian).Q

    singular = torch.logspace(0, -1, width, base=condition, dtype=torch.float64)
    return Mixing(value, output, torch.linalg.inv(orthogonal() * singular @ orthogonal().mT).mT)


def _channels(model: nn.Module, site: Site) -> int:
    consumer = model.get_submodule(site.consumers[0])
    return consumer.weight.shape[1] * getattr(consumer, "groups", 1)
