"""Flips: at most k bits of a memory of codes, or k edges of an undirected graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Num, UInt8
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.core.exact import UNIT, highest, spelled


def _few(gain: Float[Tensor, "*rows n"], k: int) -> Bool[Tensor, "*rows n"]:
    """True at the k largest gains of each row that are above 0; ties go to the lower place."""
    places = gain.argsort(dim=-1, descending=True, stable=True)[..., : max(k, 0)]
    return torch.zeros_like(gain, dtype=torch.bool).scatter(-1, places, True) & (gain > 0)


def _flip_support(
    a: Float[Tensor, "b k n"], base: Num[Tensor, "b n"], gain: Float[Tensor, "b k m"], k: int
) -> Tensor:
    """<a, x> and the k best gains of flips, which add up because no two flips touch."""
    best = torch.where(_few(gain, k), gain, 0.0).sum(-1)
    return highest(a.double() * base.double()[:, None], best * (1 + gain.shape[-1] * UNIT), a.dtype)


def _checked_flips(self: BitFlips | EdgeFlips) -> None:
    if self.k < 0:
        raise BadInput(
            f"{type(self).__name__.lower()}={self.k}: the number of flips is a whole number of at least 0"
        )


@dataclass(frozen=True)
class BitFlips:
    """Memory of uint8 codes: at most k bits of each example differ; a whole memory is one: `codes[None]`."""

    k: int
    __post_init__ = _checked_flips
    __str__ = spelled

    def project(self, s: UInt8[Tensor, "b *in"], x: UInt8[Tensor, "b *in"]) -> UInt8[Tensor, "b *in"]:
        """The k most significant of the bits in which s differs."""
        return x ^ _joined(_few(_bits(s ^ x).reshape(len(x), -1) * _worth(x), self.k), x)

    def sample(self, x: UInt8[Tensor, "b *in"], generator: torch.Generator) -> UInt8[Tensor, "b *in"]:
        """k different bits of each example, or all, flipped."""
        shape = (len(x), 8 * x[0].numel())
        order = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return x ^ _joined(_few(order.to(x.device) + 1, self.k), x)

    def contains(self, s: UInt8[Tensor, "b *in"], x: UInt8[Tensor, "b *in"]) -> Bool[Tensor, " b"]:
        """Counted on the bits."""
        return _bits(s ^ x).reshape(len(x), -1).sum(1) <= self.k

    def corners(self, x: UInt8[Tensor, "b *in"]) -> tuple[Tensor, Tensor]:
        """Each code alone: its k highest ones cleared, its k highest zeros set."""
        ones = _bits(x) * _worth(x[:0].new_zeros(1, 1))
        zeros = _bits(~x) * _worth(x[:0].new_zeros(1, 1))
        return x ^ _joined(_few(ones, self.k), x), x ^ _joined(_few(zeros, self.k), x)

    def support(self, a: Float[Tensor, "b k *in"], x: UInt8[Tensor, "b *in"]) -> Float[Tensor, "b k"]:
        """<a, x> and the k flips that raise it most."""
        flat, base = a.double().flatten(2), x.reshape(len(x), -1)
        ways = (1 - 2 * _bits(base)) * _worth(base[:, :1])
        gain = (flat[..., None] * ways[:, None]).flatten(2)
        return _flip_support(a.flatten(2), base, gain, self.k)


def _bits(x: UInt8[Tensor, "b *in"]) -> Float[Tensor, "b *in 8"]:
    """The bits of each code as 0 and 1, least significant first."""
    return ((x[..., None] >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1).double()


def _worth(x: UInt8[Tensor, "b *in"]) -> Float[Tensor, " bits"]:
    """1, 2, 4 ... 128, once for each code of an example."""
    return (2.0 ** torch.arange(8, dtype=torch.float64, device=x.device)).repeat(x[0].numel())


def _joined(bits: Bool[Tensor, "*any"], x: UInt8[Tensor, "b *in"]) -> UInt8[Tensor, "b *in"]:
    """Bits put together to codes in the shape of x."""
    weights = 2 ** torch.arange(8, device=x.device)
    return (bits.reshape(-1, 8) * weights).sum(1).to(torch.uint8).reshape(x.shape)


@dataclass(frozen=True)
class EdgeFlips:
    """Undirected graphs `b n n` of 0 and 1: at most k edges of each are added or taken away, no loops."""

    k: int
    __post_init__ = _checked_flips
    __str__ = spelled

    def project(self, s: Num[Tensor, "b n n"], x: Num[Tensor, "b n n"]) -> Num[Tensor, "b n n"]:
        """The k edges that s moved furthest, of those it moved by more than a half."""
        moved = (s.double() - x.double()) * (1 - 2 * x.double())
        return self._flipped(x, _few(_upper(moved + moved.mT) / 2 - 0.5, self.k))

    def sample(self, x: Num[Tensor, "b n n"], generator: torch.Generator) -> Num[Tensor, "b n n"]:
        """k different edges of each graph, or all, flipped."""
        shape = _upper(x).shape
        order = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return self._flipped(x, _few(order.to(x.device) + 1, self.k))

    def contains(self, s: Num[Tensor, "b n n"], x: Num[Tensor, "b n n"]) -> Bool[Tensor, " b"]:
        """Still undirected, of 0 and 1, with the same loops, and at most k edges differ."""
        form = ((s == 0) | (s == 1)) & (s == s.mT)
        loops = (s.diagonal(dim1=1, dim2=2) == x.diagonal(dim1=1, dim2=2)).all(1)
        return form.flatten(1).all(1) & loops & ((_upper(s) != _upper(x)).sum(1) <= self.k)

    def corners(self, x: Num[Tensor, "b n n"]) -> tuple[Tensor, Tensor]:
        """0 and 1 for every edge, loops as they are; x itself for k = 0."""
        loop = torch.eye(x.shape[1], dtype=torch.bool, device=x.device) | (self.k == 0)
        return torch.where(loop, x, torch.zeros_like(x)), torch.where(loop, x, torch.ones_like(x))

    def support(self, a: Float[Tensor, "b k n n"], x: Num[Tensor, "b n n"]) -> Float[Tensor, "b k"]:
        """<a, x> and the k flips that raise it most."""
        gain = _upper(a.double() + a.double().mT) * (1 - 2 * _upper(x).double())[:, None]
        return _flip_support(a.flatten(2), x.flatten(1), gain, self.k)

    def _flipped(self, x: Tensor, edges: Bool[Tensor, "b pairs"]) -> Tensor:
        """x with those edges flipped; raises where x is no undirected graph."""
        if not (((x == 0) | (x == 1)) & (x == x.mT)).all():
            raise BadInput(
                "edgeflips: the graph is no symmetric matrix of 0 and 1; give its undirected adjacency"
            )
        both = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        row, column = torch.triu_indices(*x.shape[1:], offset=1, device=x.device)
        both[:, row, column] = edges
        return torch.where(both | both.mT, 1 - x, x)


def _upper(x: Num[Tensor, "*b n n"]) -> Num[Tensor, "*b pairs"]:
    """Each undirected pair once."""
    row, column = torch.triu_indices(*x.shape[-2:], offset=1, device=x.device)
    return x[..., row, column]
