"""A layer and its batch norm, whose scale and shift the layer's own weight makes of secret passports.

Paper: Fan, Ng and Chan, "Rethinking Deep Neural Network Ownership Verification: Embedding Passports to Defeat
Ambiguity Attacks", NeurIPS 2019, arXiv:1909.07082 (DeepIPR).

    y = gamma * norm(W x) + beta,     gamma = mean(W * P_gamma),     beta = mean(W * P_beta).

The mean over places of a convolution is the product with the mean patch of P, so that is what is kept: one
column p in R^M for gamma and one for beta, M the weights of an output: gamma = W p. Another passport gives
another scale, under which the rest of the network does not work.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, replace
from netweight.core.errors import DoesNotFit


class Passport(nn.Module):
    """The layer, then its norm with the scale and shift of the passports.

    passports: `M 2`, for gamma and for beta; a buffer, which travels with the weights.
    """

    passports: Tensor

    def __init__(self, layer: nn.Module, norm: Any, passports: Float[Tensor, "M 2"]) -> None:
        super().__init__()
        self.layer = layer
        self.norm = copy.deepcopy(norm)
        self.norm.weight = self.norm.bias = None
        self.norm.affine = False
        self.register_buffer("passports", passports)

    def affine(self) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
        """gamma and beta."""
        weight: Any = self.layer.weight
        gamma, beta = (weight.flatten(1) @ self.passports.to(weight.dtype)).T
        return gamma, beta

    def forward(self, x: Tensor) -> Tensor:
        """gamma norm(layer(x)) + beta; features are on axis 1."""
        y = self.norm(self.layer(x))
        gamma, beta = (each.reshape(-1, *[1] * (y.ndim - 2)) for each in self.affine())
        return y * gamma + beta


def drawn(inputs: int, generator: torch.Generator) -> Float[Tensor, "M 2"]:
    """Random passports: uniform in [-1, 1], the paper's random patterns."""
    return 2 * torch.rand(inputs, 2, generator=generator) - 1


@dataclass(frozen=True)
class InsertPassports:
    """Passports, drawn by a seed, in place of (layer, batch norm) pairs; a rewrite that is not exact.

    What has passports already keeps them: on the bare architecture of a folder it makes the places for what
    the folder holds.
    """

    layers: tuple[str, ...]
    norms: tuple[str, ...]
    seed: int

    def apply(self, model: nn.Module) -> None:
        """Replace in place; the norm becomes the identity. Raises `DoesNotFit` for other modules."""
        generator = torch.Generator().manual_seed(self.seed)
        for name, norm_name in zip(self.layers, self.norms, strict=True):
            layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
            if isinstance(layer, Passport):
                continue
            if not isinstance(layer, WEIGHTED) or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                raise DoesNotFit(
                    f"{name}, {norm_name}: a {type(layer).__name__} and a {type(norm).__name__} take no "
                    "passport; give a Linear or Conv layer and the batch norm behind it"
                )
            passports = drawn(layer.weight[0].numel(), generator).to(layer.weight)
            replace(model, name, Passport(layer, norm, passports).train(norm.training))
            replace(model, norm_name, nn.Identity())


def folded(model: nn.Module) -> nn.Module:
    """A copy with plain batch norms that have the same gamma and beta: the same function, no passports."""
    plain = copy.deepcopy(model)
    for name, module in [*plain.named_modules()]:
        if isinstance(module, Passport):
            gamma, beta = (nn.Parameter(each.detach().clone()) for each in module.affine())
            norm = module.norm
            norm.weight, norm.bias, norm.affine = gamma, beta, True
            replace(plain, name, nn.Sequential(module.layer, norm).train(module.training))
    return plain
