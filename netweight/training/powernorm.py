"""PowerNorm in place of the norms of a network, which is then trained.

Paper: Shen et al., "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020, arXiv:2003.07845.

Each layer, RMS or batch norm (or those named) becomes a `nn.power_norm.PowerNorm` with the gain and shift
that it had; the loss is the cross-entropy. While the rate rises (or for `warmup` steps) it is PN-V, which
takes its statistics from the batch alone; then PN, with running statistics and an estimated gradient. Batch
norms have their features on axis 1 and get no layer scale.

In evaluation mode it is one factor and one shift per feature: it is bounded and exported as it is, and
`nn.power_rewrites.folds` finds where it goes into the next Linear layers exactly. `core.sites` does not know
it as a producer (layer, RMS and batch norms are), so no scale of another method is folded into it.

Differs from the paper: batch norms may be replaced, too. The recipe around it is the caller's.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import Change
from netweight.core.errors import BadInput, unknown
from netweight.core.task import Task
from netweight.nn.power_norm import KINDS, padded
from netweight.nn.power_rewrites import InsertPowerNorm, norms_of
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled

SHARE = 0.1  # of all steps that are PN-V where the rate does not rise


@dataclass(frozen=True)
class PowerNorms:
    """kind: pn, or pn-v for the batch's statistics throughout. norms: names of those to replace, () for all.

    groups: of features in layer scale, 0 for none. warmup: steps of PN-V; None: those in which the rate
    rises, else a tenth. forward_decay, backward_decay: of the running statistics. padding: the token id that
    pads, whose places count for nothing (its targets as well).
    """

    kind: str = "pn"
    norms: tuple[str, ...] = ()
    groups: int = 1
    warmup: int | None = None
    forward_decay: float = 0.9
    backward_decay: float = 0.9
    padding: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of power norm", self.kind, KINDS)
        if self.groups < 0:
            raise BadInput(f"groups={self.groups}: give at least 1, or 0 for no layer scale")
        if self.warmup is not None and self.warmup < 1:
            raise BadInput(f"warmup={self.warmup}: at least one step takes its statistics from the batch")


def powernorm(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: PowerNorms = PowerNorms(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The model with power norms, trained from the weights that it has.

    Notes: `norms` replaced, and `warmup`, the steps of PN-V. Raises `DoesNotFit` for a network without norms
    or data without class numbers, `BadInput` for a name that is no norm.
    """
    data = labelled(task)
    warmup = settings.warmup or warmup_of(how, math.ceil(len(data) / how.batch))
    change = InsertPowerNorm(
        norms_of(model, settings.norms), settings.kind, settings.groups, warmup,
        settings.forward_decay, settings.backward_decay,
    )  # fmt: skip
    net = copy.deepcopy(model)
    change.apply(net)

    def loss(net: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        if settings.padding is None:
            return cross_entropy(net(x), y)
        kept = x != settings.padding
        with padded(net, kept):
            found = net(x)
        return cross_entropy(found, torch.where(kept, y, -100) if y.shape == kept.shape else y)

    losses = train(net, data, loss, how, keep=about(keep, "powernorm", settings))
    notes = {"norms": list(change.norms), "warmup": warmup}
    return Trained(net, Change({}, [change]), losses, notes)


def cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """Of class numbers `b` or `b t`, the mean over all that are not -100."""
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def warmup_of(how: Training, steps: int) -> int:
    """The steps of PN-V: those in which the rate rises, else a tenth of all; at least one."""
    return max(1, round((how.warmup or SHARE * how.epochs) * steps))
