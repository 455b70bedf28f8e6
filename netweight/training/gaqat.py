"""GAQAT: weights of few bits that work on a domain they never saw, with step sizes that two losses pull at.

Paper: Jiang, Meng, Tang, Yu, Li, Wang and Zhu, "GAQAT: Gradient-adaptive Quantization-aware Training for
Domain Generalization", 2024, arXiv:2412.05551; on SAGM (`training.sam`) and LSQ (`nn.quantizer.Learnt`).

L(w, s) is the loss of the rounded network, w its weights, s the steps of its roundings: one of the weight and
one of the input of every layer but the first and the last. SAGM goes to w' = w + (rho / |g| - alpha) g with
g = dL/dw, before rounding, so that each s has two gradients, of the task and of flatness,

    g_task = dL/ds at (w, s),        g_smooth = dL/ds at (w', s),        s is moved by g_task + g_smooth.

They disagree often. The disorder of g_1 .. g_K is the share of its turns (`disorder`),

    delta = (number of t < K with sign g_t != sign g_{t+1}) / (K - 1):

0.5 where g is noise around an optimum, small where g pushes one way all the time and g_smooth holds it. Every
K steps of training, each s whose g_task had delta < r over the last K is moved by g_smooth alone for the next
K. g_task is watched all the same, so that it may count again. Weights always move by both gradients.

Examples of all domains have the same share of each step (`data.domains.in_equal_shares`).

Differs from the paper: there is no code; the rule is put together from the abstract and the public reviews,
K = 40 and r = 0.3 are ours, for some hundred steps. The gradient sum is not halved (see
`training.sam`). Training begins with the network as it is given, not with random weights. Norms and biases
count as weights w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Task
from netweight.data.domains import domains_of, in_equal_shares
from netweight.nn.quantized import Roundings, attach, begin, finished, inner_layers, quantized
from netweight.nn.quantizer import Learnt, Levels
from netweight.nn.switchable import look
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Moment, Training, train
from netweight.training.sam import add, all_weights, both, check
from netweight.training.trained import Trained, about, labelled, loss


@dataclass(frozen=True)
class GAQAT:
    """Settings of `gaqat`.

    bits: of weights and inputs, 2 to 8. window: steps K between two decisions. below: the disorder r under
    which g_task is left out; 0 is SAGM with LSQ. rho, alpha: of SAGM. move_steps: whether w' has other steps
    s too. faster: how many times the rate the steps s have. layers: those that are rounded; none for all but
    the first and the last.
    """

    bits: int = 4
    window: int = 40
    below: float = 0.3
    rho: float = 0.05
    alpha: float = 1e-3
    move_steps: bool = False
    faster: float = 10.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self.rho, self.alpha)
        if not 2 <= self.bits <= 8:
            raise BadInput(f"bits={self.bits}: weights and inputs take from 2 to 8 bits")
        if self.window < 2:
            raise BadInput(f"window={self.window}: turns are counted over 2 steps or more")
        if not (self.below >= 0 and self.faster > 0):
            raise BadInput(
                f"below={self.below}, faster={self.faster}: a share of turns from 0 on, and a factor above 0"
            )


def gaqat(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: GAQAT = GAQAT(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model trained with rounded weights and inputs, which are packed.

    A step has `how.batch` examples, the same share from each domain (`Data.domain`). Notes: for each step s
    how its gradients went (`Watch.notes`). Raises `DoesNotFit` for data without class numbers or without
    domains, and for a network without inner layers to round.
    """
    data = labelled(task)
    order = in_equal_shares(domains_of(data, "gaqat"), how.batch)
    first = data.x[order(torch.Generator().manual_seed(how.seed))[0]]
    network = rounded(model, first, settings)
    watch = Watch([*steps_of(network)], settings.window).to(next(model.parameters()).device)
    hooks = Hooks(groups(settings), order, selective(watch, settings), state=watch)
    losses = train(network, data, loss, how, hooks=hooks, keep=about(keep, "gaqat", settings))
    plain, change = finished(network)
    return Trained(plain, change, losses, watch.notes())


# The rounded network --------------------------------------------------------------------------------------


def rounded(model: nn.Module, x: Tensor, settings: GAQAT) -> nn.Module:
    """A copy of the model with LSQ on weight and input of its layers, steps begun from the batch x.

    Inputs that are never below 0 in x take levels from 0 on.
    """
    layers = settings.layers or tuple(inner_layers(model))
    for name in layers:
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, WEIGHTED):
            what = "there is no such layer" if layer is None else f"a {type(layer).__name__} is not rounded"
            raise DoesNotFit(f"{name}: {what} by gaqat; give names of Linear or Conv layers")
    if not layers:
        raise DoesNotFit(
            f"{type(model).__name__}: it has no Linear or Conv layer between its first and its last; name "
            "those that are to be rounded as layers"
        )
    x = x.to(next(model.parameters()).device)
    seen = look(model, layers, x).inputs

    def rule(name: str, _: nn.Module) -> Roundings | None:
        if name not in layers:
            return None
        below = seen.get(name)
        levels = Levels.signed if below is None or below[1] else Levels.unsigned
        return Roundings(Learnt(Levels.signed(settings.bits)), Learnt(levels(settings.bits)))

    network = attach(model, rule).to(x.device)
    begin(network, x)
    return network


def steps_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """The steps s by layer and by what they round."""
    found = {}
    for name, layer in quantized(network).items():
        for what, rounding in (("weight", layer.weight_rounding), ("input", layer.input_rounding)):
            if isinstance(rounding, Learnt):
                found[f"{name} {what}"] = rounding.step
    return found


def weights_of(network: nn.Module) -> list[nn.Parameter]:
    """w: every parameter that is trained and is no step of a rounding."""
    apart = {id(p) for p in steps_of(network).values()}
    return [p for p in all_weights(network) if id(p) not in apart]


def groups(settings: GAQAT) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """The optimizer's groups: w, and the steps s with a faster rate and no weight decay."""

    def of(network: nn.Module) -> list[dict[str, Any]]:
        steps = [*steps_of(network).values()]
        return [
            {"params": weights_of(network)},
            {"params": steps, "factor": settings.faster, "weight_decay": 0.0},
        ]

    return of


# Two gradients for each step of a rounding ----------------------------------------------------------------


def disorder(gradients: Float[Tensor, "k ..."]) -> Float[Tensor, ...]:
    """The share of neighbours along the first axis that differ in sign; 0 counts as a sign of its own."""
    sign = gradients.sign()
    return (sign[1:] != sign[:-1]).double().mean(0)


def selective(watch: Watch, settings: GAQAT) -> Callable[[Running, Callable[[], Tensor], Moment], Tensor]:
    """`Hooks.passes`: SAGM, with g_task left out where `watch` says so."""

    def passes(run: Running, once: Callable[[], Tensor], at: Moment) -> Tensor:
        steps = steps_of(run.model)
        moved = all_weights(run.model) if settings.move_steps else weights_of(run.model)
        found, first = both(run, once, moved, settings.rho, settings.alpha)
        none = torch.zeros_like(found, dtype=torch.float32)
        task = [first.get(p, none) for p in steps.values()]
        smooth = [none if p.grad is None else p.grad for p in steps.values()]
        frozen = watch.frozen.clone()
        watch.see(torch.stack(task), torch.stack(smooth), run.scaler.get_scale())
        if (at.step + 1) % settings.window == 0:
            watch.decide(settings.below)
        kept = {p: torch.where(frozen[i], 0.0, first[p]) for i, p in enumerate(steps.values()) if p in first}
        add({**first, **kept})
        return found

    return passes


class Watch(nn.Module):
    """What is known of the gradients of n steps s; buffers, so that checkpoints hold them.

    frozen: whose g_task is left out now. signs: of g_task in this window, `k n`. pull: the sums of g_task and
    g_smooth in this window, `2 n`. The others are counts and sums over the whole training.
    """

    frozen: Tensor
    signs: Tensor
    pull: Tensor
    size: Tensor
    against: Tensor
    held: Tensor
    thawed: Tensor
    opposed: Tensor
    last: Tensor
    seen: Tensor
    windows: Tensor

    def __init__(self, names: list[str], window: int) -> None:
        super().__init__()
        self.names, n = names, len(names)
        for name, shape, kind in (
            ("frozen", (n,), torch.bool), ("signs", (window, n), torch.int8), ("pull", (2, n), torch.float64),
            ("size", (2, n), torch.float64), ("against", (n,), torch.int64), ("held", (n,), torch.int64),
            ("thawed", (n,), torch.int64), ("opposed", (n,), torch.int64), ("last", (n,), torch.float64),
            ("seen", (), torch.int64), ("windows", (), torch.int64),
        ):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape, dtype=kind))

    @torch.no_grad()
    def see(self, task: Float[Tensor, " n"], smooth: Float[Tensor, " n"], scale: float = 1.0) -> None:
        """The two gradients of one step of training, `scale` times as large as they are."""
        task, smooth = ((g.double() / scale).nan_to_num(0, 0, 0) for g in (task, smooth))
        self.signs[self.seen % len(self.signs)] = task.sign().to(torch.int8)
        self.pull += torch.stack([task, smooth])
        self.size += torch.stack([task, smooth]).abs()
        self.against += task.sign() != smooth.sign()
        self.held += self.frozen
        self.seen += 1

    @torch.no_grad()
    def decide(self, below: float) -> None:
        """The window is over: freeze those whose disorder is less than `below`, and no others."""
        self.last.copy_(disorder(self.signs.double()))
        frozen = self.last < below
        self.thawed += self.frozen & ~frozen
        self.opposed += self.pull[0] * self.pull[1] < 0
        self.frozen.copy_(frozen)
        self.pull.zero_()
        self.windows += 1

    def notes(self) -> Mapping[str, Any]:
        """Means over all steps s, and for each of them: mean |g_task| and |g_smooth|, the share of training
        steps on which their signs differ, of windows whose sums have opposite signs, of training steps
        without g_task, how often g_task came back, and the disorder of the last window."""
        steps, windows = max(1, int(self.seen)), max(1, int(self.windows))
        columns = {
            "task": self.size[0] / steps,
            "smooth": self.size[1] / steps,
            "conflict": self.against / steps,
            "opposed": self.opposed / windows,
            "frozen": self.held / steps,
            "thawed": self.thawed,
            "disorder": self.last,
        }
        each = {
            name: {column: values[i].item() for column, values in columns.items()}
            for i, name in enumerate(self.names)
        }
        means = {name: columns[name].double().mean().item() for name in ("conflict", "opposed", "frozen")}
        return {**means, "thawed": int(self.thawed.sum()), "windows": int(self.windows), "steps": each}
