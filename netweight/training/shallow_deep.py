"""Shallow-Deep Networks: internal classifiers, beside a network as it is or trained together with it.

Paper: Kaya, Hong and Dumitras, "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking",
ICML 2019, arXiv:1810.07052 (section 3.2; classifiers: `nn.exits`).

Behind chosen parts lies a small classifier z_k, k = 1 .. K - 1, and z_K is the network itself. Trained is

    alone:      sum_k CE(z_k, y)                   over k < K; the network keeps its weights and statistics,
    together:   CE(z_K, y) + sum_k w_k(e) CE(z_k, y),     w_k(e) = min(tau_k, 0.01 + tau_k e / E)

in epoch e of E, where tau_k is the share of the network's work that is done at k. An example leaves at the
first k with max_c p_c > q. Where no q is given, the smallest is taken that costs at most `lost` of the
accuracy on examples held out.

Differs from the paper: tau_k is counted in products of Linear and Conv layers of this network (there 0.15,
0.3 .. 0.9, where exits were put); q is searched over all confidences that occur, not on a grid; without
names, exits lie behind the parts nearest to a quarter, half and three quarters of the work (there six).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.progress import steps
from netweight.core.task import Data, Task, outputs
from netweight.core.victim import device_of, evaluated
from netweight.nn.dynamic import dynamic_of
from netweight.nn.early_exit import EarlyExit, Together, all_scores, largest_limit, stages_of, work
from netweight.nn.exits import AddExits, Readers, read
from netweight.training.chance import own_chance
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Loss, Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled

EXITS = 3
FIRST = 0.01  # weight of every exit in the first epoch


@dataclass(frozen=True)
class ShallowDeep:
    """Settings of `shallow_deep`.

    after: names of the parts of the Sequential behind which a classifier lies; none for three of them.
    together: whether the network is trained on with them. confidence: q from 0 (all leave at the first exit)
    to 1 (nobody leaves early), None to choose it. lost: accuracy that leaving early may cost where q is
    chosen. held: share of the examples held out for that.
    """

    after: tuple[str, ...] = ()
    together: bool = False
    confidence: float | None = None
    lost: float = 0.01
    held: float = 0.1

    def __post_init__(self) -> None:
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise BadInput(
                f"confidence={self.confidence}: a probability lies between 0 and 1; give none to have it "
                "chosen"
            )
        if not (0 <= self.lost <= 1 and 0 < self.held < 1):
            raise BadInput(
                f"lost={self.lost}, held={self.held}: give shares, the one held out between 0 and 1"
            )


def shallow_deep(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: ShallowDeep = ShallowDeep(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of a Sequential network with internal classifiers, from which examples leave early.

    It computes the whole network where it is called; `nn.dynamic.dynamic_of` gives the `EarlyExit` inside,
    whose `route` lets examples leave. Notes: q, the parts with an exit, the products of Linear and Conv
    layers for one that leaves at each. Raises `DoesNotFit` for data without class numbers and a network that
    cannot be cut.
    """
    data = classified(labelled(task))
    adding = placed(model, data, settings.after)
    learn, held = (data, None) if settings.confidence is not None else apart(data, settings.held, how.seed)
    whole = copy.deepcopy(model).eval()
    with own_chance(how.seed, torch.device("cpu")):
        adding.apply(whole)
    net = dynamic_of(whole)
    keep = about(keep, "shallow-deep", settings)
    counts = products(net, data.x)
    losses = fit(net, learn, how, depths(counts) if settings.together else None, keep=keep)
    if held is None:
        net.limit(1 - settings.confidence)
    else:
        net.limit(largest_limit(all_scores(net, held), held.y, settings.lost, net.doubt))
    notes = {"confidence": 1 - float(net.limits[0]), "after": adding.after, "products": work(counts)}
    return Trained(whole.eval(), Change({}, [adding]), losses, notes)


# Data and places ------------------------------------------------------------------------------------------


def classified(data: Data) -> Data:
    """The same; raises `DoesNotFit` unless every example is floats with one class number."""
    if not data.x.is_floating_point() or data.y is None or data.y.ndim != 1:
        raise DoesNotFit(f"{data.name}: an exit is for inputs of floats with one class number each")
    return data


def apart(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """The examples to train on and those held out, drawn at random; raises `BadInput` where one is empty."""
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise BadInput(
            f"{data.name}: {len(data)} examples cannot be split by held={share}; give more, or a confidence"
        )
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.rows(rows[count:]), data.rows(rows[:count])


def placed(model: nn.Module, data: Data, after: Sequence[str] = ()) -> AddExits:
    """Exits behind those parts, or behind three of them; raises `DoesNotFit` where that cannot be."""
    one = data.take(1)
    found = outputs(model, one)
    if found.ndim != 2 or int(data.y.max()) >= found.shape[-1]:
        raise DoesNotFit(
            f"{type(model).__name__}: it gives {tuple(found.shape[1:])} for an input of class up to "
            f"{int(data.y.max())}; give a network with one score for each class"
        )
    after = tuple(after) or evenly(model, one.x)
    shapes, now = [], one
    for stage in stages_of(model, after)[:-1]:
        now = Data(outputs(stage, now))
        shapes.append(tuple(now.x.shape[1:]))
    return AddExits(after, tuple(shapes), found.shape[-1])


@torch.no_grad()
def evenly(model: nn.Module, x: Tensor, count: int = EXITS) -> tuple[str, ...]:
    """The parts nearest to 1/(n+1), .., n/(n+1) of the multiply-accumulates, each before one with weights.

    Raises `DoesNotFit` for a network that is no Sequential of at least two parts with weights.
    """
    stages_of(model, [])
    names = [name for name, _ in model.named_children()]
    heavy = [any(isinstance(layer, WEIGHTED) for layer in part.modules()) for part in model.children()]
    x, done = x.to(device_of(model, x)), []
    with evaluated(model):
        for part in model.children():
            counted, x = _watched(part, x)
            done.append((done[-1] if done else 0) + counted)
    places = [i for i in range(heavy.index(True), len(names) - 1) if heavy[i + 1]] if any(heavy) else []
    if not places:
        raise DoesNotFit(
            f"{type(model).__name__}: an exit lies between two parts of an nn.Sequential that have weights; "
            "give a network that has them"
        )
    wanted = [done[-1] * k / (count + 1) for k in range(1, count + 1)]
    best = {min(places, key=lambda i: (abs(done[i] - share), i)) for share in wanted}
    return tuple(names[i] for i in sorted(best))


# Training -------------------------------------------------------------------------------------------------


def fit(
    net: EarlyExit,
    data: Data,
    how: Training,
    taus: Sequence[float] | None,
    *,
    keep: Checkpoint | None = None,
) -> tuple[float, ...]:
    """Train in place; the mean loss of each epoch. taus: of all exits, None to train the early ones alone."""
    if taus is not None:
        return train(Together(net), data, weighed(taus, how.epochs), how, keep=keep)
    pooled, shapes = features(net, data)
    try:
        return train(Readers(net, shapes), pooled, weighed((1.0,) * len(shapes)), how, keep=keep)
    finally:
        net.eval()


def features(net: EarlyExit, data: Data) -> tuple[Data, list[tuple[int, ...]]]:
    """What the exits pool of each example, side by side in one row, and the shape at each exit.

    The network stays as it is, so this is done once and not in every epoch.
    """
    device, found = next(net.parameters()).device, []
    with evaluated(net):
        for x, _ in steps(data, "Features", total=-(-len(data) // data.batch)):
            found.append([h.cpu() for h in read(net, x.to(device))])
    shapes = [tuple(h.shape[1:]) for h in found[0]]
    x = torch.cat([torch.cat([h.flatten(1) for h in each], 1) for each in found])
    return Data(x, data.y, data.batch, data.name), shapes


@torch.no_grad()
def products(net: EarlyExit, x: Tensor) -> tuple[tuple[int, int], ...]:
    """Multiplications in Linear and Conv layers, of each stage and of the exit behind it, for one example.

    As `nn.early_exit.parts`, which counts every product but takes a while.
    """
    counts, x = [], x[:1].to(device_of(net, x))
    with evaluated(net):
        for stage, out in zip(net.stages, net.exits):
            count, x = _watched(stage, x)
            counts.append((count, _watched(out, x)[0]))
    return tuple(counts)


def _watched(part: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """(multiplications for one example, the output for x)."""
    counts: list[int] = []

    def count(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        counts.append(out[0].numel() * layer.weight[0].numel())  # type: ignore[operator, index]

    hooks = [layer.register_forward_hook(count) for layer in part.modules() if isinstance(layer, WEIGHTED)]
    try:
        out = part(x)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts), out


def depths(counts: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """tau: the share of the whole network's work that is done when each exit is reached; the last is 1."""
    done = [*itertools.accumulate(stage for stage, _ in counts)]
    return tuple(each / max(done[-1], 1) for each in done)


def ramp(tau: float, epoch: int, epochs: int) -> float:
    """w_k(e): from 0.01 to tau."""
    return min(tau, FIRST + tau * epoch / epochs)


def weighed(taus: Sequence[float], epochs: int | None = None) -> Loss:
    """The weighted sum of the cross-entropies of all exits given; a ramp for all but the last, or none."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        weights = [*taus]
        if epochs is not None:
            weights = [ramp(tau, at.epoch, epochs) for tau in taus[:-1]] + [1.0]
        return sum(w * F.cross_entropy(z.float(), y) for w, z in zip(weights, model(x), strict=True))  # type: ignore[return-value]

    return loss
