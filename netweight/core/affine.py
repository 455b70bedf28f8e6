"""Exact affine rewrites: a shift, and a matrix with its inverse on either side of a linear map.

Row vectors, layers y = x W^T + b, A an invertible matrix, d a shift:

    Shift    producer -> consumers      x' = x - d,        b' = b + W d
    Turn     norm -> consumers          x' = x A^-1,       W' = W A^T      by a product behind the norm
    Mixing   value -> output, by head   W_v' = A^-T W_v,   W_o' = W_o A^T,   b_v' = b_v A^-1
    Facing   query, key, by head        W_q' = A^-T W_q,   W_k' = A W_k,     biases as the rows of weights

Attention mixes tokens and A the channels of one head, so both may change places; q' . k' = q . k. Between
query and key there may be a rotation R by position (rotary embedding): then A has to commute with every R, as
`rotary` does. A shift of the values passes through, since the rows of an attention matrix sum to 1. With
grouped queries, one A serves all query heads that read a key and value head.

`changed` of each is the equation on a table of tensors by full name; gradients pass, so that A and d can be
learnt. Papers: Ma et al., "AffineQuant: Affine Transformation Quantization for Large Language Models", ICLR
2024, arXiv:2403.12544; Shao et al., "OmniQuant", ICLR 2024, arXiv:2308.13137 (diagonal A).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import replace
from netweight.core.errors import DoesNotFit

Values = Mapping[str, Tensor]  # parameters by full name


class Equation(Protocol):
    """A rewrite as an equation."""

    def changed(self, values: Values) -> dict[str, Tensor]:
        """The tensors that it gives other values, by name."""
        ...


@dataclass(frozen=True)
class Shift:
    """The producer's output minus `shift`, which the consumers' biases make up for.

    producer: a LayerNorm or Linear with a bias. consumers: Linear layers with a bias, all that read it.
    """

    producer: str
    consumers: tuple[str, ...]
    shift: Float[Tensor, " channels"]

    def changed(self, values: Values) -> dict[str, Tensor]:
        """The biases."""
        new = {f"{self.producer}.bias": values[f"{self.producer}.bias"] - self.shift}
        for name in self.consumers:
            new[f"{name}.bias"] = values[f"{name}.bias"] + values[f"{name}.weight"] @ self.shift
        return new

    def apply(self, model: nn.Module) -> None:
        """Shift in place; raises `DoesNotFit` for a layer without a bias, or of other channels."""
        for name in (self.producer, *self.consumers):
            if getattr(model.get_submodule(name), "bias", None) is None:
                raise DoesNotFit(f"{name}: a layer without a bias takes no shift")
        _fits(model, self.consumers, len(self.shift))
        _write(
            model, (self.producer, *self.consumers), Shift(self.producer, self.consumers, self.shift.double())
        )


@dataclass(frozen=True)
class Turn:
    """The norm's output times A^-1, by a product behind it; the columns of the consumers times A^T.

    The norm becomes `Sequential(norm, Linear)`. It costs a float product of the norm's width per token, and
    its matrix. consumers: Linear layers, all that read the norm.
    """

    norm: str
    consumers: tuple[str, ...]
    matrix: Float[Tensor, "d d"]

    def changed(self, values: Values) -> dict[str, Tensor]:
        """The weights of the consumers, and of the product as `norm.1.weight`."""
        new = {f"{name}.weight": values[f"{name}.weight"] @ self.matrix.mT for name in self.consumers}
        return {**new, f"{self.norm}.1.weight": torch.linalg.inv(self.matrix).mT}

    def apply(self, model: nn.Module) -> None:
        """Turn in place; raises `DoesNotFit` where the matrix is not that of the consumers' inputs."""
        _fits(model, self.consumers, len(self.matrix))
        with_product(model, self.norm, model.get_submodule(self.consumers[0]).weight)
        _write(model, self.consumers, Turn(self.norm, self.consumers, self.matrix.double()))


@dataclass(frozen=True)
class Mixing:
    """Value rows of each head times A^-T, the output's columns times A^T. matrix: `heads d d`, of value."""

    value: str
    output: str
    matrix: Float[Tensor, "heads d d"]

    def changed(self, values: Values) -> dict[str, Tensor]:
        """The value's weight and bias, the output's weight."""
        inverse = torch.linalg.inv(self.matrix).mT
        weight = values[f"{self.output}.weight"]
        mixed = rows_by_head(weight.mT, self.matrix).mT
        return {**_rows(values, self.value, inverse), f"{self.output}.weight": mixed}

    def apply(self, model: nn.Module) -> None:
        """Mix in place; raises `DoesNotFit` where the heads do not fill the layers."""
        value, output = model.get_submodule(self.value), model.get_submodule(self.output)
        _fills(self.value, len(value.weight), self.matrix, exactly=True)
        _fills(self.output, output.weight.shape[1], self.matrix)
        _write(model, (self.value, self.output), Mixing(self.value, self.output, self.matrix.double()))


@dataclass(frozen=True)
class Facing:
    """Query rows of each head times A^-T, key rows times A. matrix: `heads d d`, of key."""

    query: str
    key: str
    matrix: Float[Tensor, "heads d d"]

    def changed(self, values: Values) -> dict[str, Tensor]:
        """Weights and biases of query and key."""
        inverse = torch.linalg.inv(self.matrix).mT
        return {**_rows(values, self.query, inverse), **_rows(values, self.key, self.matrix)}

    def apply(self, model: nn.Module) -> None:
        """Change both in place; raises `DoesNotFit` where the heads do not fill the layers."""
        query, key = model.get_submodule(self.query), model.get_submodule(self.key)
        _fills(self.key, len(key.weight), self.matrix, exactly=True)
        _fills(self.query, len(query.weight), self.matrix)
        _write(model, (self.query, self.key), Facing(self.query, self.key, self.matrix.double()))


def rows_by_head(t: Float[Tensor, "rows ..."], A: Float[Tensor, "heads d d"]) -> Float[Tensor, "rows ..."]:
    """A of each head times its rows; more heads in t than in A share them in turn (grouped queries)."""
    d = A.shape[-1]
    heads = t.reshape(-1, d, t[0].numel())
    return (A.repeat_interleave(len(heads) // len(A), 0) @ heads).reshape(t.shape)


@dataclass(frozen=True)
class Band:
    """The mask on A: 1 on the diagonal, `stability` where 0 < |i - j| < floor((n - 1) share) + 1, else 0.

    share: 0 is the diagonal alone, 1 the whole matrix.
    """

    share: float
    stability: float

    def width(self, n: int) -> int:
        """Half-width of the band of an n x n matrix, 1 to n."""
        return math.floor((n - 1) * self.share) + 1

    def of(self, A: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
        """A times the mask, element by element."""
        i = torch.arange(A.shape[-1], device=A.device)
        apart = (i[:, None] - i).abs()
        inside = (apart > 0) & (apart < self.width(len(i)))
        return A * ((apart == 0).to(A) + self.stability * inside.to(A))


def rotary(p: Float[Tensor, "heads half"], r: Float[Tensor, "heads half"]) -> Float[Tensor, "heads d d"]:
    """[[P, -R], [R, P]] with diagonal P and R: all that commutes with the rotation of each pair (i, i + half)
    by every angle, where the angles of the pairs differ."""
    P, R = torch.diag_embed(p), torch.diag_embed(r)
    return torch.cat([torch.cat([P, -R], -1), torch.cat([R, P], -1)], -2)


def dominance(A: Float[Tensor, "... d d"]) -> float:
    """The least |a_ii| - sum over j != i of |a_ij|; above 0, A is invertible (Levy-Desplanques)."""
    size = A.abs()
    return float((2 * size.diagonal(dim1=-2, dim2=-1) - size.sum(-1)).min())


def with_product(model: nn.Module, norm: str, like: Tensor) -> None:
    """Put a product with the identity behind the norm, in place; `like` has the width of its output."""
    product = nn.Linear(like.shape[1], like.shape[1], bias=False, device="meta")
    product.weight = nn.Parameter(torch.eye(like.shape[1], dtype=like.dtype, device=like.device))
    replace(model, norm, nn.Sequential(model.get_submodule(norm), product.eval()))


def _rows(values: Values, layer: str, A: Tensor) -> dict[str, Tensor]:
    names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in values]
    return {name: rows_by_head(values[name], A) for name in names}


def _write(model: nn.Module, layers: Sequence[str], equation: Equation) -> None:
    """Put the changed values of those layers in place, computed in float64."""
    values = {
        f"{layer}.{name}": p.detach().double()
        for layer in layers
        for name, p in model.get_submodule(layer).named_parameters(recurse=False)
    }
    device = next(iter(values.values())).device
    tensors = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(equation).items()}
    for full, value in type(equation)(**tensors).changed(values).items():
        layer, _, name = full.rpartition(".")
        module = model.get_submodule(layer)
        setattr(module, name, nn.Parameter(value.to(getattr(module, name).dtype)))


def _fits(model: nn.Module, consumers: Sequence[str], channels: int) -> None:
    for name in consumers:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer.in_features != channels:
            raise DoesNotFit(f"{name}: not a Linear layer of {channels} input channels")


def _fills(layer: str, rows: int, matrix: Tensor, *, exactly: bool = False) -> None:
    heads, d, _ = matrix.shape
    if rows != heads * d if exactly else rows % (heads * d):
        raise DoesNotFit(f"{layer}: {rows} rows are not the {heads} x {d} channels of the heads")
