"""SkipNet: a residual network learns which of its blocks an input may skip.

Paper: Wang et al., "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018, arXiv:1711.09485
(gates and routing: `nn.skipping`).

With G_i in {0, 1} whether gated block i of n is run, network and gates are trained together on

    L = CE(z, y) + cost * mean_i G_i    (a mean over the batch),

every gate open at first, the gradient of G_i being that of its probability p_i.

Differs from the paper: straight-through gradients in both of its two steps (there a soft gate, then
reinforcement); blocks count alike, whatever they cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data, Task
from netweight.core.victim import device_of, evaluated
from netweight.nn.dynamic import dynamic_of
from netweight.nn.skipping import AddGates, Skipping
from netweight.training.chance import own_chance
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Loss, Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled


@dataclass(frozen=True)
class SkipNet:
    """Settings of `skipnet`.

    blocks: names of the parts of the Sequential that may be skipped; none for all that have weights and keep
    the shape of their input. cost: of running all of them, in nats. limit: the probability below which one is
    skipped.
    """

    blocks: tuple[str, ...] = ()
    cost: float = 0.1
    limit: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.cost < math.inf and 0 <= self.limit <= 1):
            raise BadInput(
                f"cost={self.cost}, limit={self.limit}: give a cost from 0 on and a probability as the limit"
            )


def skipnet(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: SkipNet = SkipNet(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of a Sequential network of residual blocks with gates, trained together.

    It runs every block where it is called; `nn.dynamic.dynamic_of` gives the `Skipping` inside, whose `route`
    skips. Notes: the blocks with a gate, and the share of training examples that run each. Raises
    `DoesNotFit` for data without class numbers and a network without such blocks.
    """
    data = labelled(task)
    adding = gated(model, data.x[:1], settings.blocks)
    whole = copy.deepcopy(model).eval()
    with own_chance(how.seed, torch.device("cpu")):
        adding.apply(whole)
    net = dynamic_of(whole)
    net.skip_below(settings.limit)
    losses = train(Soft(net), data, priced(settings.cost), how, keep=about(keep, "skipnet", settings))
    notes = {"blocks": adding.blocks, "run": ran(net, data)}
    return Trained(whole.eval(), Change({}, [adding]), losses, notes)


class Soft(nn.Module):
    """(logits, G) of a network that skips, as it is trained."""

    def __init__(self, net: Skipping) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Skipping.soft`."""
        return self.net.soft(x)


def priced(cost: float) -> Loss:
    """CE + cost * mean G."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        logits, shares = model(x)
        return F.cross_entropy(logits.float(), y) + cost * shares.float().mean()

    return loss


@torch.no_grad()
def gated(model: nn.Module, x: Tensor, blocks: Sequence[str] = ()) -> AddGates:
    """Gates before those parts, or before all that may be skipped.

    Raises `DoesNotFit` for a part that changes the shape of its input, and a network without any that fits.
    """
    if not isinstance(model, nn.Sequential):
        raise DoesNotFit(f"{type(model).__name__}: gates lie before the parts of an nn.Sequential; give one")
    fits, x = {}, x.to(device_of(model, x))
    with evaluated(model):
        for name, part in model.named_children():
            before, x = x, part(x)
            if x.shape == before.shape and any(isinstance(inner, WEIGHTED) for inner in part.modules()):
                fits[name] = x.shape[1]
    for name in blocks:
        if name not in fits:
            raise DoesNotFit(
                f"{name}: a block that can be skipped has weights and keeps the shape of its input; "
                f"those that can: {', '.join(fits) or 'none'}"
            )
    if not fits:
        raise DoesNotFit(f"{type(model).__name__}: no part with weights keeps the shape of its input")
    chosen = tuple(name for name in fits if name in blocks or not blocks)
    return AddGates(chosen, tuple(fits[name] for name in chosen))


@torch.no_grad()
def ran(net: Skipping, data: Data) -> tuple[float, ...]:
    """The share of examples that run each block with a gate."""
    with evaluated(net):
        found = torch.cat([net.route(x.to(device_of(net, x))).ran for x, _ in data])
    return tuple(found.double().mean(0).tolist())
