"""A network that works with the owner's passports alone, and carries a signature in its scales.

Paper: Fan, Ng and Chan, "Rethinking Deep Neural Network Ownership Verification: Embedding Passports to Defeat
Ambiguity Attacks", NeurIPS 2019, arXiv:1909.07082 (DeepIPR).

The batch norms behind some layers take scale and shift from passports (`nn.passport`: gamma = W p). With
s_c = +-1 the bits of the owner's name (repeated, then one sign a channel),

    L = cross-entropy + lambda sum_c max(margin - gamma_c s_c, 0).

Differs from the paper: passports are random patterns (one of its kinds); this is its first scheme, in which
the network is passed on with its passports (what is saved holds them); the losses that are reported are of
the task alone. Starts best from random weights: scales that a trained network had are lost.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.compressed import Change
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.sites import foldable
from netweight.core.task import Task
from netweight.inspection.ownership.passport import passports_of, signed
from netweight.nn.passport import InsertPassports, Passport
from netweight.training import trained
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled


@dataclass(frozen=True)
class Passports:
    """layers: that get passports, () for all with a batch norm behind. owner: the name that is signed with.

    margin: that each scale keeps from 0. strength: lambda. key: the seed of the passports.
    """

    layers: tuple[str, ...] = ()
    owner: str = "netweight"
    margin: float = 0.1
    strength: float = 0.1
    key: int = 0

    def __post_init__(self) -> None:
        if not self.owner:
            raise BadInput("owner='': a signature is made of a name; give one")
        if not (self.margin > 0 and self.strength > 0):
            raise BadInput(f"margin={self.margin}, strength={self.strength}: both are numbers above 0")


def passport(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: Passports = Passports(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The model with passports, trained.

    Notes: `layers`, the share of `wrong signs` and its `p`. Raises `DoesNotFit` for a network without a batch
    norm behind a layer, `unknown` names as `BadInput`.
    """
    data = labelled(task)
    change = insertion(model, task, settings)
    net = copy.deepcopy(model)
    change.apply(net)
    signs = signature(net, settings.owner)

    def mark(run: Running, at: Moment) -> None:
        for name, wanted in signs.items():
            place = run.model.get_submodule(name)
            assert isinstance(place, Passport)
            own = place.layer.weight
            lost = settings.strength * sign_loss(place.affine()[0], wanted, settings.margin)
            (gradient,) = torch.autograd.grad(lost, own)
            own.grad += gradient.to(own.grad)

    losses = train(
        net, data, trained.loss, how, hooks=Hooks(before=mark), keep=about(keep, "passport", settings)
    )
    found = signed(net, passports_of(net), signs)
    notes = {"layers": list(change.layers), "wrong signs": found.rate, "p": found.p}
    return Trained(net, Change({}, [change]), losses, notes)


def insertion(model: nn.Module, task: Task, settings: Passports) -> InsertPassports:
    """Where passports go: the pairs named, else all layers with a batch norm of their own behind them."""
    pairs = dict(foldable(model, task.calibration))
    if not pairs:
        raise DoesNotFit(f"{type(model).__name__}: no layer has a batch norm behind it to take passports")
    for name in settings.layers:
        if name not in pairs:
            raise unknown("layer with a batch norm behind it", name, pairs)
    layers = tuple(name for name in pairs if name in settings.layers or not settings.layers)
    return InsertPassports(layers, tuple(pairs[name] for name in layers), settings.key)


def signature(model: nn.Module, owner: str) -> dict[str, Int64[Tensor, " out"]]:
    """By passport layer, +1 or -1 for each output: the bits of the name in UTF-8, over and over."""
    bits = [2 * (byte >> place & 1) - 1 for byte in owner.encode() for place in range(7, -1, -1)]
    found, start = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, Passport):
            count = len(module.affine()[0])
            found[name] = torch.tensor([bits[(start + c) % len(bits)] for c in range(count)])
            start += count
    return found


def sign_loss(gamma: Float[Tensor, " out"], s: Int64[Tensor, " out"], margin: float) -> Tensor:
    """sum_c max(margin - gamma_c s_c, 0)."""
    return F.relu(margin - gamma * s.to(gamma)).sum()
