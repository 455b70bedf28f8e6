"""Networks with early exits: which example leaves where, and what that costs.

Papers: Teerapittayanon, McDanel and Kung, "BranchyNet: Fast Inference via Early Exiting from Deep Neural
Networks", ICPR 2016, arXiv:1709.01686; Kaya, Hong and Dumitras, "Shallow-Deep Networks: Understanding and
Mitigating Network Overthinking", ICML 2019, arXiv:1810.07052.

With stages s_1 .. s_K and an exit g_k behind each,

    h_k = s_k(h_{k-1}),    z_k = g_k(h_k),    p = softmax(z_k),

    doubt d_k:  entropy  -sum_c p_c log p_c, from 0 to log C (BranchyNet),
                unsure   1 - max_c p_c (Shallow-Deep).

An example leaves at the first k with d_k < T_k; whoever is left leaves at the last exit. So T = 0 is the
whole network, and T at the top of the measure lets everybody leave. A batch is routed: only those who stay
go on. `decisions` says the same in the words of `nn.dynamic`, which attacks speak.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.graph import macs
from netweight.core.task import Data
from netweight.nn.dynamic import Decisions

CANDIDATES = 512  # thresholds that are tried at most


def entropy(logits: Float[Tensor, "b classes"]) -> Float[Tensor, " b"]:
    """-sum p log p in nats, within 0 and log C."""
    log_p = logits.float().log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1)).clamp(0, math.log(logits.shape[-1]))


def unsure(logits: Float[Tensor, "b classes"]) -> Float[Tensor, " b"]:
    """1 - max p, from 0 to 1 - 1/C."""
    return 1 - logits.float().softmax(-1).amax(-1)


@dataclass(frozen=True)
class Doubt:
    """How sure an exit is, 0 for quite. of: logits to one number each. top: the most there is, by classes."""

    of: Callable[[Tensor], Tensor]
    top: Callable[[int], float]


DOUBTS: Mapping[str, Doubt] = {
    "entropy": Doubt(entropy, math.log),
    "unsure": Doubt(unsure, lambda classes: 1 - 1 / classes),
}


@dataclass(frozen=True)
class Routed:
    """What early exits gave: logits `b classes`, and the exit `b` at which each left (from 0)."""

    logits: Float[Tensor, "b classes"]
    exit: Int64[Tensor, " b"]


class EarlyExit(nn.Module):
    """stages and as many exits, the last of which nobody passes; `limits` holds T_k for all but the last.

    The module itself gives the logits of the last exit, an ordinary network; `route` lets examples leave.
    """

    limits: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        exits: Sequence[nn.Module],
        limits: float | Sequence[float] = 0.0,
        doubt: str = "entropy",
    ) -> None:
        """limits: one for every exit but the last, or one for all of them."""
        super().__init__()
        if not stages or len(stages) != len(exits):
            raise BadInput(f"{len(stages)} stages and {len(exits)} exits: give one exit behind each stage")
        if doubt not in DOUBTS:
            raise unknown("measure of doubt", doubt, DOUBTS)
        self.stages, self.exits, self.doubt = nn.ModuleList(stages), nn.ModuleList(exits), doubt
        self.register_buffer("limits", torch.zeros(len(stages) - 1, dtype=torch.float64))
        self.limit(limits)

    def limit(self, limits: float | Sequence[float]) -> None:
        """Leave below these doubts from now on: one for every exit but the last, or one for all."""
        each = [limits] * len(self.limits) if isinstance(limits, int | float) else list(limits)
        if len(each) != len(self.limits) or not all(t >= 0 for t in each):
            raise BadInput(
                f"limits {each}: give {len(self.limits)} numbers from 0 on, one for each early exit"
            )
        self.limits.copy_(torch.tensor(each, dtype=torch.float64))

    @property
    def beside(self) -> list[nn.Module]:
        """The exits that `forward` does not run; see `core.compressed.weighted`."""
        return [*self.exits][:-1]

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the last exit."""
        for stage in self.stages:
            x = stage(x)
        return self.exits[-1](x)

    def scores(self, x: Tensor) -> list[Tensor]:
        """The logits of every exit for all examples."""
        found = []
        for stage, out in zip(self.stages, self.exits):
            x = stage(x)
            found.append(out(x))
        return found

    def route(self, x: Tensor) -> Routed:
        """Logits of the exit at which each example leaves; a stage sees only those who are left."""
        logits, places = self.exits[0](x := self.stages[0](x)), torch.zeros(len(x), dtype=torch.int64)
        places, here = places.to(x.device), torch.arange(len(x), device=x.device)
        now = logits
        for k, (stage, out) in enumerate(zip([*self.stages][1:], [*self.exits][1:])):
            stay = ~leaves(DOUBTS[self.doubt], now, self.limits[k])
            if not bool(stay.any()):
                break
            x, here = (x, here) if bool(stay.all()) else (x[stay], here[stay])
            now = out(x := stage(x))
            logits = now if len(here) == len(logits) else logits.index_copy(0, here, now)
            places[here] = k + 1
        return Routed(logits, places)

    def decisions(self, x: Tensor) -> Decisions:
        """One for each early exit: work is saved where an example that came as far would leave.

        effort: log C + mean_c log p_c, from 0 (all classes alike) downwards: minus the cross-entropy of the
        uniform distribution, as in DeepSloth; its slope does not vanish where an exit is sure.
        """
        scores, measure = self.scores(x)[:-1], DOUBTS[self.doubt]
        if not scores:
            nothing = x.new_zeros(len(x), 0)
            return Decisions(nothing.bool(), nothing)
        saves = [leaves(measure, z.detach(), limit) for z, limit in zip(scores, self.limits)]
        effort = [math.log(z.shape[-1]) + z.float().log_softmax(-1).mean(-1) for z in scores]
        return Decisions(torch.stack(saves, 1), torch.stack(effort, 1))

    def fewer(self, kept: Sequence[int]) -> EarlyExit:
        """The network with those of its early exits alone (from 0, ascending); modules are its own."""
        if sorted({*kept}) != [*kept] or not {*kept} <= {*range(len(self.limits))}:
            raise BadInput(f"exits {[*kept]}: give some of 0 to {len(self.limits) - 1}, each once, in order")
        ends = [*kept, len(self.stages) - 1]
        between = zip([0, *(k + 1 for k in kept)], ends)
        stages = [nn.Sequential(*[*self.stages][a : b + 1]) for a, b in between]
        limits = [float(self.limits[k]) for k in kept]
        return EarlyExit(stages, [self.exits[k] for k in ends], limits, self.doubt).train(self.training)

    def until(self, k: int) -> nn.Sequential:
        """The network that ends at exit k (from 0); its modules are this network's own."""
        return nn.Sequential(*[*self.stages][: k + 1], self.exits[k])


class Together(nn.Module):
    """A network with exits that gives the logits of all of them, `exits b classes`."""

    def __init__(self, net: EarlyExit) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """All logits."""
        return torch.stack(self.net.scores(x))


def leaves(doubt: Doubt, logits: Float[Tensor, "b classes"], limit: float | Tensor) -> Bool[Tensor, " b"]:
    """Who leaves: d < T, and everybody where T is at the top of the measure."""
    limit = float(limit)
    found = doubt.of(logits)
    return (found < limit) | (limit >= doubt.top(logits.shape[-1]))


def first_exits(
    scores: Sequence[Float[Tensor, "b classes"]], limits: Sequence[float] | Tensor, doubt: str = "entropy"
) -> Int64[Tensor, " b"]:
    """Where each example would leave, by the logits of all exits."""
    gone = [leaves(DOUBTS[doubt], z, limit) for z, limit in zip(scores, limits)]
    return (
        torch.stack([*gone, torch.ones(len(scores[0]), dtype=torch.bool, device=scores[0].device)])
        .int()
        .argmax(0)
    )


def at_exits(
    scores: Sequence[Float[Tensor, "b classes"]], exits: Int64[Tensor, " b"]
) -> Float[Tensor, "b classes"]:
    """The logits of the exit of each example."""
    return torch.stack([*scores])[exits, torch.arange(len(exits), device=exits.device)]


@torch.no_grad()
def all_scores(net: EarlyExit, data: Data) -> list[Tensor]:
    """The logits of every exit for all examples, in evaluation mode, on the CPU; the mode is restored."""
    device, mode = next(net.parameters()).device, net.training
    net.eval()
    try:
        found = [[z.cpu() for z in net.scores(x.to(device))] for x, _ in data]
    finally:
        net.train(mode)
    return [torch.cat(each) for each in zip(*found)]


def largest_limit(
    scores: Sequence[Float[Tensor, "b classes"]], y: Int64[Tensor, " b"], lost: float, doubt: str = "entropy"
) -> float:
    """The largest T, the same for all exits, at which early leaving costs at most the share `lost`.

    Of the accuracy of the last exit on these examples, which should be such that training has not seen. Tried
    are 0, the top, and up to `CANDIDATES` doubts of these examples.
    """
    measure, last = DOUBTS[doubt], (scores[-1].argmax(-1) == y).double().mean()
    seen = torch.cat([measure.of(z) for z in scores[:-1]]).unique()
    some = seen[torch.linspace(0, len(seen) - 1, min(len(seen), CANDIDATES)).round().long()].tolist()
    for limit in (measure.top(scores[0].shape[-1]), *reversed(some)):
        found = at_exits(scores, first_exits(scores, [limit] * (len(scores) - 1), doubt))
        if (found.argmax(-1) == y).double().mean() >= last - lost - 1e-12:
            return float(limit)
    return 0.0


@torch.no_grad()
def parts(net: EarlyExit, x: Tensor) -> tuple[tuple[int, int], ...]:
    """Multiply-accumulates of each stage and of the exit behind it, for one example of x."""
    counts, x = [], x[:1]
    for stage, out in zip(net.stages, net.exits):
        before, x = x, stage(x)
        counts.append((macs(stage, before), 0 if isinstance(out, nn.Identity) else macs(out, x)))
    return tuple(counts)


def work(counts: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Multiply-accumulates of one that leaves at each exit, of `parts`: its stages and all exits it saw."""
    return tuple(itertools.accumulate(stage + out for stage, out in counts))


# Exits for a network that has none ------------------------------------------------------------------------


def stages_of(model: nn.Module, after: Sequence[str]) -> list[nn.Sequential]:
    """A Sequential cut behind those of its parts, in order; modules are shared with the model.

    Raises `DoesNotFit` for a network of another kind, and for a part it has not or that is its last.
    """
    if not isinstance(model, nn.Sequential):
        raise DoesNotFit(
            f"{type(model).__name__}: exits lie between the parts of an nn.Sequential; give such a network"
        )
    names = [name for name, _ in model.named_children()]
    for name in after:
        if name not in names[:-1]:
            raise DoesNotFit(
                f"{name}: no exit can lie behind it; the parts with one behind them: {names[:-1]}"
            )
    places = [names.index(name) + 1 for name in after]
    if sorted(set(places)) != places:
        raise BadInput(f"exits behind {list(after)}: give each part once, in the order of the network")
    return [model[a:b] for a, b in zip([0, *places], [*places, len(names)])]


def early(model: nn.Module) -> str:
    """The part of a Sequential behind which its first exit lies: before its second part with weights.

    Norms do not count as parts with weights. Raises `DoesNotFit` where there are no two.
    """
    heavy = [
        index
        for index, part in enumerate(model.children())
        if any(isinstance(layer, (*WEIGHTED, nn.Embedding)) for layer in part.modules())
    ]
    if not isinstance(model, nn.Sequential) or len(heavy) < 2:
        raise DoesNotFit(
            f"{type(model).__name__}: an early exit lies between two parts of an nn.Sequential that have "
            "weights; give a network that has them"
        )
    return [name for name, _ in model.named_children()][heavy[1] - 1]


def branch(features: Sequence[int], classes: int, width: int) -> nn.Sequential:
    """A small classifier of features `channels *places` (one example's shape), with random weights.

    A convolution of 3 places to `width` channels, ReLU, maximum over 2, Linear; for `channels` alone a
    Linear. Raises `DoesNotFit` for more than three axes of places.
    """
    channels, *places = features
    if not places:
        return nn.Sequential(nn.Linear(channels, classes))
    if len(places) > 3:
        raise DoesNotFit(f"features of shape {tuple(features)}: an exit reads one to three axes of places")
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(places) - 1]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[len(places) - 1]
    pooled = min(places) > 1
    left = math.prod(side // 2 if pooled else side for side in places)
    return nn.Sequential(
        convolution(channels, width, 3, padding=1),
        nn.ReLU(),
        *([pool(2)] if pooled else []),
        nn.Flatten(),
        nn.Linear(width * left, classes),
    )
