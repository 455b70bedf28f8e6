"""A mark of some bits in the weights of one layer, put there while the network is trained.

Paper: Uchida et al., "Embedding Watermarks into Deep Neural Networks", ICMR 2017, arXiv:1701.04082.

With w the layer's weight averaged over its outputs, a secret X and bits b
(`inspection.ownership.weight_mark`, which reads them),

    L = cross-entropy + lambda * mean_j BCE(sigmoid(X_j w), b_j).

Differs from the paper: lambda 1, for short training (0.01 there, for 200 epochs: the gradient of the mark is
the same in every step, so what counts is lambda times steps). T <= M bits, which any weights can show; the
paper tries more. The losses that are reported are of the task alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Task
from netweight.inspection.ownership.weight_mark import Key, averaged, drawn, projected, read, weight
from netweight.training import trained
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled


@dataclass(frozen=True)
class WeightMark:
    """layer: that carries the mark, "" for the one of the most averaged weights. bits: T. strength: lambda.

    key: the seed that secret matrix and bits are drawn by; keep it to yourself.
    """

    layer: str = ""
    bits: int = 48
    strength: float = 1.0
    key: int = 0

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise BadInput(f"bits={self.bits}: a mark has at least one bit")
        if not 0 < self.strength < float("inf"):
            raise BadInput(f"strength={self.strength}: the weight of the mark's loss is a number above 0")


def weight_mark(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: WeightMark = WeightMark(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The model, trained on with the mark in it.

    Notes: `layer`, `bit error rate` and `p` of its own mark, `commitment` of the key, and the standard
    deviation of its weights before and after (a mark that widens them can be seen). Raises `DoesNotFit` for a
    layer of fewer averaged weights than bits.
    """
    data = labelled(task)
    layer, key = key_of(model, settings)
    net = copy.deepcopy(model)

    def mark(run: Running, at: Moment) -> None:
        own = run.model.get_submodule(layer).weight
        (gradient,) = torch.autograd.grad(settings.strength * loss_of(own, key), own)
        assert isinstance(own, Tensor) and own.grad is not None
        own.grad += gradient.to(own.grad)

    losses = train(
        net, data, trained.loss, how, hooks=Hooks(before=mark), keep=about(keep, "weight-mark", settings)
    )
    found = read(net, layer, key)
    spread = [float(weight(each, layer).std()) for each in (model, net)]
    notes = {
        "layer": layer, "bit error rate": found.rate, "p": found.p, "commitment": key.commitment(),
        "standard deviation of weights": spread,
    }  # fmt: skip
    return Trained(net, losses=losses, notes=notes)


def key_of(model: nn.Module, settings: WeightMark) -> tuple[str, Key]:
    """(the layer, the key) of these settings: what the owner reads a suspect with."""
    names = weighted(model)
    if not names:
        raise DoesNotFit(f"{type(model).__name__}: it has no Linear or Conv layer to carry a mark")
    layer = settings.layer or max(names, key=lambda name: len(averaged(weight(model, name))))
    room = len(averaged(weight(model, layer)))
    if settings.bits > room:
        raise DoesNotFit(f"{layer}: {settings.bits} bits do not fit into {room} averaged weights; give fewer")
    return layer, drawn(room, settings.bits, settings.key)


def loss_of(weight: Tensor, key: Key) -> Tensor:
    """mean_j BCE(sigmoid(X_j w), b_j), in nats."""
    scores = projected(weight, key.X)
    return F.binary_cross_entropy_with_logits(scores, key.bits.to(scores))
