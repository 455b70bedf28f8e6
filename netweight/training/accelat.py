"""AccelAT: a learning rate that is lowered where the accuracy under attack stops rising.

Paper: Nikfam, Marchisio, Martina and Shafique, "AccelAT: A Framework for Accelerating the Adversarial
Training of Deep Neural Networks Through Accuracy Gradient", IEEE Access 10, 2022,
doi:10.1109/ACCESS.2022.3213734.

After each epoch e, with the accuracy a_e under attack on examples that are not trained on (`next_rate`),

    m_e = mean(a_{e-4} .. a_e),
    rate <- max(floor, 0.8 rate)   if m_e - m_{e-1} = (a_e - a_{e-5}) / 5 < 0.005,

from the seventh epoch on, and only where the last such cut is five epochs old. The shapes that the paper
compares it with, in multiples of the rate they start with, T epochs in all, e from 0 (`SHAPES`):

    constant      1
    piecewise     1, 0.1 from T / 3, 0.01 from 2 T / 3
    linear        0.9 (1 - (e + 1) / P) + 0.1, P the next multiple of T / 5: it falls to 0.1 five times
    exponential   10^(10 e / T): no schedule, a search for the largest rate that still learns
    one-cycle     1 to 10 at 0.4 T, back to 1 at 0.8 T, to 0.01 at T

As in the paper the network is a trained one, its batch norms keep their statistics, SGD has no momentum, and
the examples under attack are made once from the network that training starts with. `fixed=False` makes them
anew from the network as it is, in each step and for each accuracy: the first are a weak adversary later.

Differs from the paper: the accuracy is that of a part of the training data, where the official code takes the
test data. Means over fewer epochs than five are not needed. The paper starts this rule at ten times the rate
of the others; what of its speed is the rule's and what the rate's is measured in the reproduction.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, unknown
from netweight.core.progress import steps
from netweight.core.task import Data, Task, outputs
from netweight.core.victim import device_of, evaluated
from netweight.training.adversary import Adversary, adversary, check
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, Training, train
from netweight.training.trained import Trained, about, labelled, loss

RULE = "accelat"
BATCH = 256  # examples attacked together


def constant(epoch: int, epochs: int) -> float:
    """1."""
    return 1.0


def piecewise(epoch: int, epochs: int) -> float:
    """1, then 0.1 and 0.01, each beyond another third."""
    return 1.0 if epoch <= epochs / 3 else 0.1 if epoch <= epochs / 3 * 2 else 0.01


def linear(epoch: int, epochs: int) -> float:
    """Down to 0.1 five times, from less each time."""
    period = epochs / 5
    return 0.9 * (1 - (epoch + 1) / (period * math.ceil((epoch + 1) / period))) + 0.1


def exponential(epoch: int, epochs: int) -> float:
    """Ten times as much with every tenth of the training."""
    return 10 ** (10 * epoch / epochs)


def one_cycle(epoch: int, epochs: int) -> float:
    """1 to 10 to 1 to 0.01, in straight lines."""
    top, back = epochs / 5 * 2, epochs / 5 * 4
    if epoch <= top:
        return 1 + 9 * epoch / top
    if epoch <= back:
        return 10 - 9 * (epoch - top) / (back - top)
    return 1 - 0.99 * (epoch - back) / (epochs - back)


SHAPES: Mapping[str, Callable[[int, int], float]] = {
    "constant": constant,
    "piecewise": piecewise,
    "linear": linear,
    "exponential": exponential,
    "one-cycle": one_cycle,
}


@dataclass(frozen=True)
class AccelAT:
    """Settings of `accelat`.

    within: the set around each input, as "linf=0.03". steps: of the attack. size: of each, a share of the
    radius. random: the attack starts anywhere in the set, else at x. shape: accelat, or one of `SHAPES`.
    fixed: examples under attack are made once. validation: the share of the training data that accuracies are
    measured on. window: epochs of a mean. wait: epochs between two cuts. rise: of the mean, below which the
    rate is cut. drop: what a cut leaves of it. floor: the lowest rate. momentum: of SGD. frozen: batch norms
    keep their statistics.
    """

    within: str = "linf=0.03"
    steps: int = 20
    size: float = 0.1
    random: bool = True
    shape: str = RULE
    fixed: bool = True
    validation: float = 0.2
    window: int = 5
    wait: int = 5
    rise: float = 0.005
    drop: float = 0.8
    floor: float = 1e-6
    momentum: float = 0.0
    frozen: bool = True

    def __post_init__(self) -> None:
        check(self.within, self.steps, self.size)
        if self.shape not in (RULE, *SHAPES):
            raise unknown("shape of the rate", self.shape, (RULE, *SHAPES))
        if self.window < 1 or self.wait < 1:
            raise BadInput(f"window={self.window}, wait={self.wait}: both are 1 epoch or more")
        if not (0 < self.drop < 1 and self.floor >= 0 and math.isfinite(self.rise)):
            raise BadInput(
                f"drop={self.drop}, floor={self.floor}, rise={self.rise}: give a share below 1, a rate "
                "from 0 on and a finite difference of accuracies"
            )
        if not (0 < self.validation < 1 and 0 <= self.momentum < 1):
            raise BadInput(
                f"validation={self.validation}, momentum={self.momentum}: give a share above 0 and below 1, "
                "and one from 0 on"
            )


def accelat(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: AccelAT = AccelAT(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model, trained on examples under attack; the shape starts with `how.rate`.

    Notes: `accuracy` under attack after each epoch (shares), `rate` of each epoch, and how many examples of
    `validation` there are. Raises `BadInput` where `how` has a schedule of its own or starts below the floor,
    `DoesNotFit` for data without class numbers or with inputs that are whole numbers.
    """
    own_rate(how, settings)
    data = labelled(task)
    attack = adversary(settings.within, settings.steps, settings.size, data, random=settings.random)
    network = copy.deepcopy(model)
    seen, apart = cut(data, settings.validation, how.seed)
    if settings.fixed:
        seen, apart = (attacked(network, part, attack, how.seed) for part in (seen, apart))
    course = Course(how, settings, apart, None if settings.fixed else attack)

    def value(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        if not settings.fixed:
            x = attack.points(model, x, y, at.generator)
        for module in model.modules():
            if settings.frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return loss(model, x, y, at)

    hooks = Hooks(groups=course.groups, after=course.see, state=course)
    losses = train(network, seen, value, how, hooks=hooks, keep=about(keep, "accelat", settings))
    return Trained(network, losses=losses, notes=course.notes())


def own_rate(how: Training, settings: AccelAT) -> None:
    """Raises `BadInput` unless the rate is left to this method and begins above its floor."""
    if how.milestones or how.warmup or how.cosine:
        raise BadInput("accelat sets the rate itself; leave milestones, warmup and cosine out")
    if settings.shape == RULE and how.rate < settings.floor:
        raise BadInput(f"floor={settings.floor:g}: it is above the rate {how.rate:g}; give a lower one")


# The rate of each epoch -------------------------------------------------------------------------------------


def next_rate(accuracies: Sequence[float], rates: Sequence[float], rule: AccelAT) -> float:
    """The rate of the next epoch, from the accuracies after all epochs so far and the rates in them."""
    now = rates[-1]
    if len(accuracies) < rule.window + 2 or len(set(rates[-rule.wait :])) > 1:
        return now
    rise = (accuracies[-1] - accuracies[-1 - rule.window]) / rule.window
    return max(rule.floor, rule.drop * now) if rise < rule.rise else now


class Course(nn.Module):
    """Accuracy after each epoch and the rate in it; buffers, so that checkpoints hold them. NaN: not yet.

    apart: the examples that accuracies are measured on. attack: on them, by the network as it is; None where
    they are under attack already.
    """

    accuracies: Tensor
    rates: Tensor

    def __init__(self, how: Training, settings: AccelAT, apart: Data, attack: Adversary | None) -> None:
        super().__init__()
        self.how, self.settings, self.apart, self.attack = how, settings, apart, attack
        for name in ("accuracies", "rates"):
            self.register_buffer(name, torch.full((how.epochs,), math.nan, dtype=torch.float64))
        shape = SHAPES.get(settings.shape, constant)
        self.rates[0] = how.rate * shape(0, how.epochs)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """`Hooks.groups`: all parameters, at the first rate; SGD with the momentum of the settings."""
        group: dict[str, Any] = {"params": [p for p in model.parameters() if p.requires_grad]}
        if self.how.optimizer == "sgd":
            group["momentum"] = self.settings.momentum
        return [{**group, "factor": float(self.rates[0]) / self.how.rate}]

    def see(self, run: Running, at: Moment) -> None:
        """`Hooks.after`: where an epoch ends, the accuracy and the rate of the next."""
        if (at.step + 1) % at.steps:
            return
        self.accuracies[at.epoch] = self.accuracy(run.model, at.epoch)
        if at.epoch + 1 < self.how.epochs:
            self.rates[at.epoch + 1] = rate = self.following(at.epoch)
            for group in run.optimizer.param_groups:
                group["factor"] = rate / self.how.rate

    def following(self, epoch: int) -> float:
        """The rate of the epoch after this one."""
        if self.settings.shape != RULE:
            return self.how.rate * SHAPES[self.settings.shape](epoch + 1, self.how.epochs)
        accuracies, rates = (seen[: epoch + 1].tolist() for seen in (self.accuracies, self.rates))
        return next_rate(accuracies, rates, self.settings)

    def accuracy(self, model: nn.Module, epoch: int) -> float:
        """The share of right classes under attack, of the network in evaluation mode."""
        data = self.apart
        if self.attack is not None:
            data = attacked(model, data, self.attack, self.how.seed + epoch)
        with evaluated(model):
            return float((outputs(model, data).argmax(1) == data.y).double().mean())

    def notes(self) -> dict[str, Any]:
        """What was seen, ready for JSON; epochs that were not reached are left out."""
        done = int(self.accuracies.isfinite().sum())
        both = {"accuracy": self.accuracies[:done].tolist(), "rate": self.rates[:done].tolist()}
        return {**both, "validation": len(self.apart)}


# Examples ---------------------------------------------------------------------------------------------------


def cut(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """(what is trained on, what accuracies are measured on): rows at random.

    Raises `BadInput` where one of them would be empty.
    """
    apart = round(share * len(data))
    if not 0 < apart < len(data):
        raise BadInput(f"validation={share}: of {len(data)} examples one part is left empty; give more")
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.rows(rows[apart:]), data.rows(rows[:apart])


def attacked(model: nn.Module, data: Data, attack: Adversary, seed: int) -> Data:
    """The examples with what the attack finds around each, on the device they were on."""
    assert data.y is not None
    generator, device = torch.Generator().manual_seed(seed), device_of(model, data.x)
    found = [
        attack.points(model, x.to(device), y.to(device), generator).to(x.device)
        for x, y in steps(list(zip(data.x.split(BATCH), data.y.split(BATCH))), "Attacking")
    ]
    return replace(data, x=torch.cat(found), memo={})
