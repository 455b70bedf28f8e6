"""Bits that lie in the weights of one layer, read with a secret matrix: who has it can prove whose they are.

Paper: Uchida et al., "Embedding Watermarks into Deep Neural Networks", ICMR 2017, arXiv:1701.04082.

The weight `out in k k` of a layer is averaged over its outputs and flattened, w in R^M; with a secret X
`T M` of normal numbers and bits b,

    b^_j = 1  iff  sum_i X_ji w_i > 0,          bit error rate = share of b^_j != b_j.

`training.weight_mark` puts them there. A network that has nothing to do with the key has an error rate of
1/2, so T - errors right bits or more come by chance with P(Binomial(T, 1/2) >= T - errors).

Capacity (Cover, "Geometrical and Statistical Properties of Systems of Linear Inequalities", IEEE Trans. on
Electronic Computers 1965): M weights can show 2 sum_{i<M} C(T-1, i) of the 2^T words of T bits, for X in
general position: all of them for T <= M, half of them for T = 2 M, next to none beyond.

The bits alone prove nothing: for any weights an X' that reads any bits is found in a moment. The key has to
lie somewhere (`commitment`) before the network is out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from scipy import stats
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, weight_of
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.pvalues import tail


@dataclass(frozen=True)
class Key:
    """A secret matrix `T M` and the bits (0 or 1) that the owner put there with it."""

    X: Float[Tensor, "T M"]
    bits: Int64[Tensor, " T"]

    def commitment(self) -> str:
        """sha256 of the key: published beforehand it binds the owner to it and gives nothing away."""
        return hashlib.sha256(self.X.cpu().numpy().tobytes() + self.bits.cpu().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Reading:
    """errors of `of` bits, and how likely a key of another network has as few."""

    errors: int
    of: int
    p: float

    @property
    def rate(self) -> float:
        """The bit error rate: 0 for the owner's network, about 1/2 for another."""
        return self.errors / self.of


def drawn(inputs: int, bits: int, seed: int) -> Key:
    """A key for M = `inputs` averaged weights: normal numbers and bits at random."""
    if inputs < 1 or bits < 1:
        raise BadInput(f"{bits} bits in {inputs} weights: a mark needs at least one of each")
    g = torch.Generator().manual_seed(seed)
    return Key(torch.randn(bits, inputs, generator=g), torch.randint(0, 2, (bits,), generator=g))


def read(model: nn.Module, layer: str, key: Key) -> Reading:
    """The mark in a layer, packed or not; raises `DoesNotFit` where the key is one of another shape."""
    errors = int((projected(weight(model, layer), key.X, layer) > 0).long().cpu().ne(key.bits.cpu()).sum())
    count = len(key.bits)
    return Reading(errors, count, tail(count - errors, count, 0.5))


def weight(model: nn.Module, layer: str) -> Tensor:
    """The layer's weight, decoded where it is packed; raises `DoesNotFit` for one that carries no mark."""
    found, module = weight_of(model, layer), model.get_submodule(layer)
    if not isinstance(getattr(module, "like", module), WEIGHTED):
        raise DoesNotFit(f"{layer}: a {type(module).__name__} carries no mark; give a Linear or Conv layer")
    return found


def averaged(weight: Float[Tensor, "out inputs ..."]) -> Float[Tensor, " M"]:
    """w: the mean over the outputs."""
    return weight.mean(0).flatten()


def projected(
    weight: Float[Tensor, "out inputs ..."], X: Tensor, layer: str = "weight"
) -> Float[Tensor, " T"]:
    """X w; raises `DoesNotFit` for a key that is too wide or too narrow."""
    w = averaged(weight)
    if X.shape[1] != len(w):
        raise DoesNotFit(f"{layer}: a key of {X.shape[1]} numbers a bit for {len(w)} averaged weights")
    return X.to(w) @ w


def capacity(inputs: int, bits: int) -> float:
    """The share of all words of T bits that M weights can show, from 0 to 1."""
    if inputs < 1 or bits < 1:
        raise BadInput(f"{bits} bits in {inputs} weights: a mark needs at least one of each")
    return float(stats.binom.cdf(inputs - 1, bits - 1, 0.5))
