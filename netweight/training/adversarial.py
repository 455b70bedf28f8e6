"""Adversarial training: on the worst that an attack finds around each example.

Paper: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
arXiv:1706.06083.

    min over w of  mean_i  max over s in S(x_i) of  l(f_w(s), y_i),

the inner maximum by the steps of `training.adversary` on the network as it is at each step. One step of 1.25
times the radius from a random start is "fast" training (Wong, Rice and Kolter, ICLR 2020, arXiv:2001.03994).

Differs from the paper: the attack sees the network in evaluation mode (as TRADES does), the loss is taken in
training mode.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from netweight.core.task import Task
from netweight.training.adversary import adversary, check
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Moment, Training, train
from netweight.training.trained import Trained, about, labelled, loss


@dataclass(frozen=True)
class Adversarial:
    """Settings of `adversarial`.

    within: the set around each input, as "linf=0.03" or "l2=0.5". steps: of the attack, 0 for noise alone.
    size: of each step, a share of the radius. random: the attack starts anywhere in the set, else at x.
    """

    within: str = "linf=0.03"
    steps: int = 10
    size: float = 0.25
    random: bool = True

    def __post_init__(self) -> None:
        check(self.within, self.steps, self.size)


def adversarial(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: Adversarial = Adversarial(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model, trained on what the attack finds around each example.

    Raises `DoesNotFit` for data without class numbers or with inputs that are whole numbers, and for a set
    that does not lie around inputs.
    """
    data = labelled(task)
    attack = adversary(settings.within, settings.steps, settings.size, data, random=settings.random)
    network = copy.deepcopy(model)

    def found(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        return loss(model, attack.points(model, x, y, at.generator), y, at)

    return Trained(
        network, losses=train(network, data, found, how, keep=about(keep, "adversarial", settings))
    )
