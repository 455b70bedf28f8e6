"""What every method of training is given and gives.

    method(model, task, how, settings, *, keep=None) -> Trained

model: stays as it is, a copy is trained. task: `task.train` is trained on, else `task.calibration`; the test
data is not looked at. how: epochs, batch, rate and seed, the same for every method. settings: a frozen
dataclass of what the paper adds. keep: where the state of an unfinished training lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import Change, Compressed, assemble
from netweight.core.errors import DoesNotFit
from netweight.core.plan import Plan
from netweight.core.task import Data, Task
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Moment


@dataclass(frozen=True)
class Trained:
    """A trained network: its float form, the Change that makes of it what is shipped, and what was seen.

    losses: the mean loss of each epoch. notes: numbers that the method reports, ready for JSON.
    """

    model: nn.Module
    change: Change = field(default_factory=lambda: Change({}))
    losses: tuple[float, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def network(self) -> Compressed:
        """What is shipped: saved, compared, verified and exported as any other."""
        return assemble(self.model, self.change, Plan({}))


def labelled(task: Task) -> Data:
    """The examples to train on, with class numbers; raises `DoesNotFit` where there are none."""
    found = task.train or task.calibration
    if found.y is None or found.y.is_floating_point():
        raise DoesNotFit(f"{found.name}: training needs examples with class numbers; give data with labels")
    return found


def about(keep: Checkpoint | None, method: str, settings: object) -> Checkpoint | None:
    """The checkpoint of this method with these settings: another method's is refused."""
    return keep and dataclasses.replace(keep, about=f"{keep.about} {method} {settings}")


def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
    """What most methods train on: the cross-entropy in float32, of logits `b classes` or `b t classes`."""
    return F.cross_entropy(model(x).float().flatten(0, -2), y.flatten())
