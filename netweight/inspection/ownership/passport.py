"""What passports show: the owner's signature in the signs of the scales, and what forged ones are worth.

Paper: Fan, Ng and Chan, "Rethinking Deep Neural Network Ownership Verification: Embedding Passports to Defeat
Ambiguity Attacks", NeurIPS 2019, arXiv:1909.07082 (DeepIPR).

The sign of each gamma_c of a passport layer (`nn.passport`) is one bit of a signature, trained by
`training.passport`. A network that has nothing to do with passports and signature has half of them right; the
p-value is the tail of a binomial, as for the bits of a weight mark. Whoever has the weights and other
passports has other scales (`forged`), under which the network should not work.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.compressed import weight_of
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.pvalues import tail
from netweight.nn.passport import Passport, drawn


@dataclass(frozen=True)
class Signature:
    """errors of `of` signs, and how likely another network has as few."""

    errors: int
    of: int
    p: float

    @property
    def rate(self) -> float:
        """The share of wrong signs: 0 for the owner's network, about 1/2 for another."""
        return self.errors / self.of


def passports_of(model: nn.Module) -> dict[str, Float[Tensor, "M 2"]]:
    """By layer name, what the owner keeps; raises `DoesNotFit` for a network without passports."""
    found = {name: m.passports.clone() for name, m in model.named_modules() if isinstance(m, Passport)}
    if not found:
        raise DoesNotFit(f"{type(model).__name__}: it has no passports; train it with `passport`")
    return found


def signed(
    model: nn.Module, passports: Mapping[str, Tensor], signs: Mapping[str, Int64[Tensor, " out"]]
) -> Signature:
    """How many signs of gamma = W p agree with the signature (1 or -1 for each output).

    The suspect may have passport layers of that name, or plain layers: the owner brings the passports.
    """
    if not passports or passports.keys() != signs.keys():
        raise BadInput(f"passports of {sorted(passports)}, signs of {sorted(signs)}: give both by layer")
    errors = count = 0
    for name, p in passports.items():
        module = model.get_submodule(name)
        W = weight_of(model, f"{name}.layer" if isinstance(module, Passport) else name).flatten(1)
        if W.shape != (len(signs[name]), len(p)):
            raise DoesNotFit(f"{name}: a weight of {tuple(W.shape)} for a passport of {len(p)} numbers")
        gamma = (W @ p[:, 0].to(W)).cpu()
        errors += int((torch.sign(gamma) != signs[name].cpu()).sum())
        count += len(gamma)
    return Signature(errors, count, tail(count - errors, count, 0.5))


def forged(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the network with other passports, drawn by the seed."""
    passports_of(model)  # there are some
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, Passport):
            module.passports = drawn(len(module.passports), generator).to(module.passports)
    return copied
