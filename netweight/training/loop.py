"""The one training loop: epochs, schedules, clipped gradients, checkpoints, and the same numbers again.

    losses = train(model, data, loss, Training(epochs=60, clip=8.0), keep=Checkpoint(path, resume=True))

A method says what a batch is judged by, `loss(model, x, y, at) -> scalar`; everything else is here. The rate
of epoch e of E (a fraction within it) is

    rate * min(1, e / warmup) * drop^(number of milestones <= e) * ((1 + cos(pi e / E)) / 2 if cosine).

Everything random comes from `seed`: the order of the examples, what a loss draws from `at.generator`, and
torch's own state (dropout), which is set inside and put back afterwards. A run that was killed at any moment
goes on from its last checkpoint and ends with the same numbers, bit for bit, on the same machine with the
same number of threads.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netweight.core.errors import BadInput, DoesNotFit, NetweightError, unknown
from netweight.core.progress import doing
from netweight.core.task import Data
from netweight.training.checkpoint import Checkpoint, Running, fingerprint, restore, store


class Diverged(NetweightError):
    """The loss or its gradient is not finite; the model holds the weights of the last good step."""


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    batch: examples a step, the last one of an epoch may have fewer. rate: the highest learning rate.
    optimizer: adam, adamw, or sgd with momentum 0.9. milestones: epochs (from 0) from which on the rate is
    `drop` times as high. warmup: epochs of a linear rise. decay: weight decay as the optimizer takes it.
    clip: the largest Euclidean norm of the gradient, None for no limit.
    """

    epochs: int
    batch: int = 64
    rate: float = 1e-3
    optimizer: str = "adam"
    milestones: tuple[int, ...] = ()
    drop: float = 0.1
    warmup: float = 0.0
    cosine: bool = False
    decay: float = 0.0
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise BadInput(f"epochs={self.epochs}, batch={self.batch}: training needs at least one of each")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise BadInput(f"rate={self.rate}: the learning rate is a number above 0; give for example 1e-3")
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"clip={self.clip}: the norm of a gradient is clipped above 0; give for example 8")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)


OPTIMIZERS: Mapping[str, Callable[[Iterable[nn.Parameter], Training], Optimizer]] = {
    "adam": lambda p, how: torch.optim.Adam(p, how.rate, weight_decay=how.decay),
    "adamw": lambda p, how: torch.optim.AdamW(p, how.rate, weight_decay=how.decay),
    "sgd": lambda p, how: torch.optim.SGD(p, how.rate, momentum=0.9, weight_decay=how.decay),
}


@dataclass(frozen=True)
class Moment:
    """Where training stands: steps done so far, the epoch (from 0), steps of an epoch, a source of chance."""

    step: int
    epoch: int
    steps: int
    generator: torch.Generator


Loss = Callable[[nn.Module, Tensor, Tensor, Moment], Tensor]


def train(
    model: nn.Module,
    data: Data,
    loss: Loss,
    how: Training,
    *,
    gradients: Callable[[nn.Module], None] | None = None,
    keep: Checkpoint | None = None,
) -> tuple[float, ...]:
    """Train in place, on the model's device, and leave it in evaluation mode; the mean loss of each epoch.

    gradients: may change the gradients of a step before they are clipped. Raises `Diverged` where the loss
    or its gradient is not finite, `BadInput` for data without labels or a checkpoint of another training.
    """
    if data.y is None:
        raise BadInput(f"{data.name}: there are no labels to train on; give data with labels")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise BadInput(f"{type(model).__name__}: it has no parameters to train; give a network that has")
    device, steps = parameters[0].device, -(-len(data) // how.batch)
    optimizer = OPTIMIZERS[how.optimizer](parameters, how)
    run = Running(model, optimizer, torch.Generator().manual_seed(how.seed), [])
    what = fingerprint(model, data, how, keep.about) if keep else ""
    with own_chance(how.seed, device), doing("Training", how.epochs * steps) as advance:
        if keep and keep.resume and keep.path.exists():
            restore(keep.path, what, run)
            advance(len(run.losses) * steps)
        for epoch in range(len(run.losses), how.epochs):
            total = 0.0
            order = torch.randperm(len(data), generator=run.generator)
            model.train()
            for index, rows in enumerate(order.split(how.batch)):
                at = Moment(epoch * steps + index, epoch, steps, run.generator)
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(at.step / steps, how)
                optimizer.zero_grad(set_to_none=True)
                value = loss(model, data.x[rows].to(device), data.y[rows].to(device), at)
                value.backward()
                if gradients is not None:
                    gradients(model)
                clip_or_stop(value, parameters, how, at)
                optimizer.step()
                total += value.item() * len(rows)
                advance()
            run.losses.append(total / len(data))
            if keep and (len(run.losses) % keep.every == 0 or len(run.losses) == how.epochs):
                store(keep.path, what, run)
    model.eval()
    return tuple(run.losses)


def rate_at(epoch: float, how: Training) -> float:
    """The learning rate after `epoch` epochs, a fraction within one."""
    rate = how.rate * how.drop ** sum(epoch >= milestone for milestone in how.milestones)
    if how.warmup:
        rate *= min(1.0, (epoch + 1e-3) / how.warmup)
    return rate * (1 + math.cos(math.pi * epoch / how.epochs)) / 2 if how.cosine else rate


def clip_or_stop(value: Tensor, parameters: list[nn.Parameter], how: Training, at: Moment) -> None:
    """Clip the gradients; raises `Diverged` where they or the loss are not finite."""
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if how.clip is None else how.clip)
    if not (math.isfinite(value.item()) and math.isfinite(norm.item())):
        raise Diverged(
            f"training diverged in epoch {at.epoch + 1}, step {at.step + 1}: the loss is {value.item():g}, "
            f"the norm of its gradient {norm.item():g}; lower the rate ({how.rate:g}) or clip the gradient"
        )


@contextlib.contextmanager
def own_chance(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own random state is that of the seed inside, and what it was before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def restarted(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with new random weights, as its layers draw them.

    Raises `DoesNotFit` for a layer that has parameters and no `reset_parameters`.
    """
    fresh = copy.deepcopy(model)
    with own_chance(seed, next((p.device for p in model.parameters()), torch.device("cpu"))):
        for name, module in fresh.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif any(True for _ in module.parameters(recurse=False)):
                raise DoesNotFit(
                    f"{name}: a {type(module).__name__} cannot begin anew; train without --fresh"
                )
    return fresh
