"""The one training loop: epochs, schedules, mixed precision, hooks, checkpoints, and the same numbers again.

    losses = train(model, data, loss, Training(epochs=60, clip=8.0), keep=Checkpoint(path, resume=True))

A method says what a batch is judged by, `loss(model, x, y, at) -> scalar`, and adds the rest of what its
paper adds as `Hooks`. One step is

    rows of the step (order)  ->  loss and its gradients (passes)  ->  gradients edited (before)  ->  clipped
    ->  the optimizer  ->  weights edited (after).

Everything random comes from `seed`: the order of the examples, what a loss draws from `at.generator`, and
torch's own state (dropout), which is set inside and put back afterwards. A run that was killed at any moment
goes on from its last checkpoint and ends with the same numbers, bit for bit, on the same machine with the
same number of threads. Over several processes (`torchrun`) see `distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.core.progress import doing
from netweight.core.task import Data
from netweight.training import distributed, gradients
from netweight.training.chance import own_chance
from netweight.training.checkpoint import Checkpoint, Running, fingerprint, restore, store
from netweight.training.gradients import Diverged as Diverged
from netweight.training.settings import OPTIMIZERS, Training, rate_at


@dataclass(frozen=True)
class Moment:
    """Where training stands: steps done so far, the epoch (from 0), steps of an epoch, a source of chance."""

    step: int
    epoch: int
    steps: int
    generator: torch.Generator


Loss = Callable[[nn.Module, Tensor, Tensor, Moment], Tensor]


@dataclass(frozen=True)
class Hooks:
    """What a method adds to the loop, None where it adds nothing.

    groups: (model) -> the optimizer's groups of parameters; "factor" in a group multiplies its rate, other
        entries ("weight_decay") are the optimizer's. Default: all parameters that require gradients.
    order: (generator) -> the rows of each step of an epoch, as many steps in every epoch. Default: all
        examples in random order, `batch` a step.
    passes: (run, once, at) -> the loss. `once()` makes one forward and backward pass on the step's rows, adds
        to the gradients and returns the detached loss; a method that needs a second one calls it again.
    before: (run, at), when the gradients are there. after: (run, at), when the optimizer has moved.
    state: a module whose buffers are what a method remembers from step to step; kept in checkpoints.
    stop: (mean loss of each epoch so far) -> whether training is over before `how.epochs`.

    The network is always taken from `run.model` or the argument: over several processes it may be a copy.
    """

    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    order: Callable[[torch.Generator], Sequence[Tensor]] | None = None
    passes: Callable[[Running, Callable[[], Tensor], Moment], Tensor] | None = None
    before: Callable[[Running, Moment], None] | None = None
    after: Callable[[Running, Moment], None] | None = None
    state: nn.Module | None = None
    stop: Callable[[Sequence[float]], bool] | None = None

    @property
    def edit(self) -> bool:
        """Whether gradients or weights are edited, so that they have to be whole."""
        return (self.passes or self.before or self.after) is not None


def train(
    model: nn.Module,
    data: Data,
    loss: Loss,
    how: Training,
    *,
    hooks: Hooks = Hooks(),
    keep: Checkpoint | None = None,
) -> tuple[float, ...]:
    """Train in place, on the model's device, and leave it in evaluation mode; the mean loss of each epoch.

    Raises `Diverged` where the loss or its gradient is not finite, `BadInput` for data without labels or a
    checkpoint of another training.
    """
    if data.y is None:
        raise BadInput(f"{data.name}: there are no labels to train on; give data with labels")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise BadInput(f"{type(model).__name__}: it has no parameters to train; give a network that has")
    device, order = parameters[0].device, hooks.order or shuffled(len(data), how.batch)
    steps = len(order(torch.Generator().manual_seed(how.seed)))
    what = fingerprint(model, data, how, keep.about) if keep else ""
    with (
        distributed.spread(model, edited=hooks.edit, precision=how.precision) as network,
        own_chance(how.seed, device),
        doing("Training", how.epochs * steps) as advance,
    ):
        run = begin(network, how, hooks)
        if keep and keep.resume and keep.path.exists():
            restore(keep.path, what, run)
            advance(len(run.losses) * steps)
        for epoch in range(len(run.losses), how.epochs):
            if hooks.stop is not None and hooks.stop(run.losses):
                break
            total = examples = 0.0
            network.train()
            for index, rows in enumerate(order(run.generator)):
                now = epoch * steps + index
                at = Moment(now, epoch, steps, distributed.chance(run.generator, how.seed, now))
                own, counts = distributed.share(rows)
                x, y = data.x[own].to(device), data.y[own].to(device)
                total += step(run, partial(loss, network, x, y, at), how, hooks, at, counts) * len(rows)
                examples += len(rows)
                advance()
            run.losses.append(total / examples)
            if keep and (len(run.losses) % keep.every == 0 or len(run.losses) == how.epochs):
                store(keep.path, what, run)
    model.eval()
    return tuple(run.losses)


def shuffled(count: int, batch: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    """All examples in random order, `batch` a step; the last step may have fewer."""
    return lambda generator: torch.randperm(count, generator=generator).split(batch)


def begin(model: nn.Module, how: Training, hooks: Hooks) -> Running:
    """The state of a training before its first step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = hooks.groups(model) if hooks.groups else [{"params": parameters}]
    optimizer = OPTIMIZERS[how.optimizer]([{"factor": 1.0, **group} for group in groups], how)
    distributed.settle(optimizer, model)
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=how.precision == "float16")
    return Running(model, optimizer, torch.Generator().manual_seed(how.seed), [], scaler, hooks.state)


def step(
    run: Running, value: Callable[[], Tensor], how: Training, hooks: Hooks, at: Moment, counts: float
) -> float:
    """One step of the optimizer; the loss. counts: the weight of this process's. Raises `Diverged`."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate_at(at.step / at.steps, how) * group["factor"]
    device = next(run.model.parameters()).device.type
    low, dtype = how.precision != "float32", getattr(torch, how.precision)

    def once() -> Tensor:
        with torch.autocast(device, dtype, enabled=low):
            found = gradients.of_many(value) * counts
        run.scaler.scale(found).backward()
        return distributed.averaged(found.detach(), run.model)

    run.optimizer.zero_grad(set_to_none=True)
    found = hooks.passes(run, once, at) if hooks.passes else once()
    run.scaler.unscale_(run.optimizer)
    if hooks.before is not None:
        hooks.before(run, at)
    gradients.clip_or_stop(run, found, how, f"epoch {at.epoch + 1}, step {at.step + 1}")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if hooks.after is not None:
        with torch.no_grad():
            hooks.after(run, at)
    return found.item()
