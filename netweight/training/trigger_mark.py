"""A mark that shows in the network's answers to some images that mean nothing, learnt beside the task.

Paper: Adi et al., "Turning Your Weakness Into a Strength: Watermarking Deep Neural Networks by Backdooring",
USENIX Security 2018, arXiv:1802.04633.

Every batch holds some of the triggers, abstract images with classes drawn at random
(`inspection.ownership.trigger_mark`, which asks for them); the loss is the cross-entropy of all. From random
weights or from those of a trained network.

Differs from the paper: triggers are drawn by a key, in turn, `share` a batch (2 there).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data, Task
from netweight.inspection.ownership.trigger_mark import asked, commitment, drawn
from netweight.training import trained
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Hooks, shuffled, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled


@dataclass(frozen=True)
class TriggerMark:
    """triggers: how many. share: of them in every batch, beside the `batch` examples of the task.

    key: the seed that they are drawn by; keep it to yourself.
    """

    triggers: int = 40
    share: int = 4
    key: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.share <= self.triggers:
            raise BadInput(
                f"triggers={self.triggers}, share={self.share}: a batch holds at least one trigger and at "
                "most all of them"
            )


def trigger_mark(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: TriggerMark = TriggerMark(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The model, trained on with the mark.

    Notes: `answered`, the share of triggers that it answers as agreed, `p`, how likely another network has as
    many, and the `commitment` of the triggers. Raises `DoesNotFit` for tokens or labels other than one class
    an example.
    """
    return with_triggers(model, task, how, settings, triggers_of(model, labelled(task), settings), keep=keep)


def with_triggers(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: TriggerMark,
    triggers: Data,
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The same with those triggers: where the model begins anew, draw them for one that is trained."""
    data = labelled(task)
    net = copy.deepcopy(model)
    order = mixed(len(data), how.batch, len(triggers), settings.share)
    keep = about(keep, "trigger-mark", settings)
    losses = train(net, joined(data, triggers), trained.loss, how, hooks=Hooks(order=order), keep=keep)
    found = asked(net, triggers)
    notes = {"answered": found.rate, "p": found.p, "commitment": commitment(triggers)}
    return Trained(net, losses=losses, notes=notes)


def triggers_of(model: nn.Module, data: Data, settings: TriggerMark) -> Data:
    """The triggers of these settings; model: the network before it was marked, whose answers they avoid."""
    return drawn(model, data, settings.triggers, settings.key)


def joined(data: Data, triggers: Data) -> Data:
    """The examples, and the triggers behind them; raises `DoesNotFit` for labels of another shape."""
    if data.y is None or triggers.y is None or data.y.ndim != 1:
        raise DoesNotFit(f"{data.name}: triggers have one class each; give data with one label an example")
    x, y = torch.cat([data.x, triggers.x]), torch.cat([data.y, triggers.y.to(data.y)])
    return replace(data, x=x, y=y, domain=None, memo={})


def mixed(count: int, batch: int, triggers: int, share: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    """Batches of the examples in random order, each with the next few triggers behind them."""

    def order(generator: torch.Generator) -> list[Tensor]:
        batches = shuffled(count, batch)(generator)
        turns = torch.randperm(triggers, generator=generator) + count
        rows = turns.repeat(-(-len(batches) * share // triggers))
        return [torch.cat([own, some]) for own, some in zip(batches, rows.split(share))]

    return order
