"""A converting autoencoder makes hard inputs easy, so that all of them take the path of the first early exit.

Paper: Mahmud, Kang, Desai, Lama and Prasad, "A Converting Autoencoder Toward Low-latency and Energy-efficient
DNN Inference at the Edge", 2024, arXiv:2403.07036; exits as in BranchyNet (`nn.early_exit`).

(1) The network gets an exit, a small branch behind its first part, and is trained on

        L = w_1 CE(exit) + w_2 CE(end),                  w = (1, 0.3) as in BranchyNet.

(2) An input is easy if the exit's entropy e < T and the exit is right, hard otherwise. T is the largest at
which leaving early costs no accuracy on examples held out. A class with fewer than five easy inputs takes its
right ones with the least entropy, then any with the least.
(3) An autoencoder a with code h is trained on inputs x of any kind, with as target t an easy input of the
same class, drawn at random anew each time:

        L = MSE(a(x), t) + 1e-8 |h|_1  (a mean over the batch).

With mu_c the mean easy input of class c, E|a(x) - t|^2 is least for

        a*(x) = sum_c P(c | x) mu_c,

so the autoencoder is a soft classifier that draws class means, and an input that might be of two classes
gives a blend (`best_output`).
(4) What is shipped is a, the part of the network up to the exit, and the exit. Its weights are kept, or tuned
on converted inputs while a stays.

Whether that is cheaper is not sure: `notes["macs"]` has the products of all paths. Time does not depend on
how many inputs are hard, where early exits get slower with each of them.

Differs from the paper: sizes of layers and thresholds, there for 28 x 28 pixels, are settings here; the
autoencoder ends in a sigmoid over the data's range (linear without one); the light classifier is tuned by
default (`tune` = 0 leaves it). The exit lies before the second part with weights unless one is named.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.compressed import Change
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import macs
from netweight.core.task import Data, Task, outputs
from netweight.models.converting import Convert
from netweight.nn.early_exit import (
    DOUBTS,
    EarlyExit,
    Together,
    all_scores,
    branch,
    early,
    largest_limit,
    leaves,
    parts,
    stages_of,
    work,
)
from netweight.training.chance import own_chance
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Loss, Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled, loss


@dataclass(frozen=True)
class CBNet:
    """Settings of `cbnet`; `Training` is that of the network with its exit.

    after: the part of the network behind which the exit lies, "" for the one before its second part with
    weights. width: channels of the branch. widths: hidden layers of the autoencoder, the last is the code.
    weights: of the losses of exit and end. threshold: T in nats, None to choose it. lost: accuracy that
    leaving early may cost where T is chosen. held: share of the examples held out for that. fewest: easy
    inputs of each class. penalty: on the code. epochs: of the autoencoder, None for as many as the network;
    rate: its (Adam's). tune: epochs in which the light classifier learns from converted inputs.
    """

    after: str = ""
    width: int = 16
    widths: tuple[int, ...] = (128, 64, 32)
    weights: tuple[float, ...] = (1.0, 0.3)
    threshold: float | None = None
    lost: float = 0.0
    held: float = 0.1
    fewest: int = 5
    penalty: float = 1e-8
    epochs: int | None = None
    rate: float = 1e-3
    tune: int = 5

    def __post_init__(self) -> None:
        if self.width < 1 or not self.widths or min(self.widths) < 1:
            raise BadInput(f"width={self.width}, widths={self.widths}: give layers of at least one neuron")
        if len(self.weights) != 2 or not all(0 < w < math.inf for w in self.weights):
            raise BadInput(f"weights={self.weights}: give two numbers above 0, for the exit and for the end")
        if self.threshold is not None and not self.threshold >= 0:
            raise BadInput(
                f"threshold={self.threshold}: an entropy is not below 0; give none to have it chosen"
            )
        if not (0 <= self.lost <= 1 and 0 < self.held < 1):
            raise BadInput(
                f"lost={self.lost}, held={self.held}: give shares, the one held out between 0 and 1"
            )
        if self.fewest < 1 or self.penalty < 0 or not self.rate > 0:
            raise BadInput(
                f"fewest={self.fewest}, penalty={self.penalty}, rate={self.rate}: give at least one easy "
                "input of a class, a penalty from 0 on and a rate above 0"
            )
        if self.tune < 0 or (self.epochs is not None and self.epochs < 1):
            raise BadInput(f"epochs={self.epochs}, tune={self.tune}: an autoencoder needs at least one epoch")


def cbnet(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: CBNet = CBNet(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """An autoencoder and a light classifier in place of a Sequential network, which is trained on first.

    Losses: those of the network with its exit, of the autoencoder, of tuning, one after the other. Notes:
    T, the share of easy training inputs, and by path the multiply-accumulates of one example. Raises
    `DoesNotFit` for data without class numbers, inputs that are no floats, and a network that is no
    Sequential.
    """
    data = classified(labelled(task))
    learn, held = apart(data, settings.held, how.seed)
    convert, keep = conversion(model, data, settings), about(keep, "cbnet", settings)
    net = with_exit(model, convert, how.seed)
    losses = train_exits(net, learn, how, settings, keep=keep and keep.part("exit"))
    choose_limit(net, held, settings)
    easy = easy_rows(net, learn, settings.fewest)

    small = converted(model, net, convert, how.seed)
    losses += train_autoencoder(
        small.autoencoder, learn, easy, how, settings, keep=keep and keep.part("autoencoder")
    )
    if settings.tune:
        losses += tune(small, learn, how, settings.tune, keep=keep and keep.part("tuned"))
    notes = {
        "threshold": float(net.limits[0]),
        "easy": len(easy) / len(learn),
        "macs": paths(net, small, data),
    }
    return Trained(small, Change({}, [convert]), losses, notes)


# Data -----------------------------------------------------------------------------------------------------


def classified(data: Data) -> Data:
    """The same; raises `DoesNotFit` unless every example is floats with one class number."""
    if not data.x.is_floating_point() or data.y is None or data.y.ndim != 1:
        raise DoesNotFit(
            f"{data.name}: an autoencoder makes inputs of floats with one class number each; text and "
            "targets of another kind do not fit"
        )
    return data


def apart(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """The examples to train on and those held out, drawn at random; raises `BadInput` where one is empty."""
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise BadInput(f"{data.name}: {len(data)} examples cannot be split by held={share}; give more")
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.rows(rows[count:]), data.rows(rows[:count])


# The network with an exit ---------------------------------------------------------------------------------


def conversion(model: nn.Module, data: Data, settings: CBNet) -> Convert:
    """What is done to the network, by its shapes on one example; raises `DoesNotFit` where it cannot be."""
    after = settings.after or early(model)
    one = data.take(1)
    found, features = outputs(model, one), outputs(stages_of(model, [after])[0], one)
    if found.ndim != 2 or int(data.y.max()) >= found.shape[-1]:
        raise DoesNotFit(
            f"{type(model).__name__}: it gives {tuple(found.shape[1:])} for an input of class up to "
            f"{int(data.y.max())}; give a network with one score for each class"
        )
    sizes = tuple(features.shape[1:]), found.shape[-1], settings.width, tuple(data.x.shape[1:])
    return Convert(after, *sizes, tuple(settings.widths), data.low, data.high)


def with_exit(model: nn.Module, convert: Convert, seed: int) -> EarlyExit:
    """A copy of the network with a branch of random weights, from which nobody leaves yet."""
    whole = copy.deepcopy(model)
    like = next(whole.parameters())
    with own_chance(seed, torch.device("cpu")):
        exit = branch(convert.features, convert.classes, convert.width).to(like)
    return EarlyExit(stages_of(whole, [convert.after]), [exit, nn.Identity()]).eval()


def train_exits(
    net: EarlyExit, data: Data, how: Training, settings: CBNet, *, keep: Checkpoint | None = None
) -> tuple[float, ...]:
    """Train in place on the weighted sum of the cross-entropies of all exits."""

    def joint(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        return sum(w * F.cross_entropy(z.float(), y) for w, z in zip(settings.weights, model(x), strict=True))

    return train(Together(net), data, joint, how, keep=keep)


def choose_limit(net: EarlyExit, held: Data, settings: CBNet) -> None:
    """Set T: the one given, or the largest that costs at most `lost` on examples held out."""
    scores = all_scores(net, held)
    net.limit(
        largest_limit(scores, held.y, settings.lost) if settings.threshold is None else settings.threshold
    )


def easy_rows(net: EarlyExit, data: Data, fewest: int) -> Int64[Tensor, " n"]:
    """The rows of easy inputs in order of class, at least `fewest` of each class that has as many.

    The rest of the rows is hard.
    """
    scores = all_scores(net, data)[0]
    right, measure = scores.argmax(-1) == data.y, DOUBTS[net.doubt]
    easy, rows = leaves(measure, scores, net.limits[0]) & right, []
    doubt = measure.of(scores)
    order = torch.where(right, doubt, doubt + measure.top(scores.shape[-1]) + 1).argsort(stable=True)
    for c in data.y.unique().tolist():
        own = order[data.y[order] == c]
        rows.append(own[: max(fewest, int(easy[own].sum()))])
    return torch.cat(rows)


# The autoencoder ------------------------------------------------------------------------------------------


def converted(model: nn.Module, net: EarlyExit, convert: Convert, seed: int) -> nn.Module:
    """The autoencoder, untrained, before a copy of the trained network up to its exit."""
    small = copy.deepcopy(model)
    with own_chance(seed, torch.device("cpu")):
        convert.apply(small)
    small.classifier.stem.load_state_dict(net.stages[0].state_dict())
    small.classifier.branch.load_state_dict(net.exits[0].state_dict())
    return small.eval()


class Coded(nn.Module):
    """An autoencoder that gives its output and its code."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(output, code)."""
        code = self.autoencoder.encoder(x)
        return self.autoencoder.decoder(code), code


def train_autoencoder(
    autoencoder: nn.Module,
    data: Data,
    easy: Int64[Tensor, " n"],
    how: Training,
    settings: CBNet,
    *,
    keep: Checkpoint | None = None,
) -> tuple[float, ...]:
    """Train in place: from any input of `data` to an easy one of the same class. easy: rows of `data`."""
    epochs = settings.epochs or how.epochs
    adam = replace(how, epochs=epochs, optimizer="adam", rate=settings.rate, decay=0.0, warmup=0.0)
    targets = data.rows(easy)
    return train(Coded(autoencoder), data, to_easy(targets.x, targets.y, settings.penalty), adam, keep=keep)


def to_easy(x: Tensor, y: Int64[Tensor, " n"], penalty: float) -> Loss:
    """MSE to a random one of these inputs x of the same class, and an L1 penalty on the code.

    y: classes of x, in order. Raises `DoesNotFit` for a class that has none.
    """
    counts = torch.bincount(y)
    starts = counts.cumsum(0) - counts

    def converting(model: nn.Module, given: Tensor, labels: Tensor, at: Moment) -> Tensor:
        wanted = labels.cpu()
        if int(wanted.max()) >= len(counts) or not bool(counts[wanted].all()):
            raise DoesNotFit(f"classes {wanted.unique().tolist()}: some have no easy input to convert to")
        chance = torch.rand(len(wanted), generator=at.generator, dtype=torch.float64)
        rows = starts[wanted] + (chance * counts[wanted]).long()
        output, code = model(given)
        return (
            F.mse_loss(output.float(), x[rows].to(output.device)) + penalty * code.float().abs().sum(1).mean()
        )

    return converting


def tune(
    small: nn.Module, data: Data, how: Training, epochs: int, *, keep: Checkpoint | None = None
) -> tuple[float, ...]:
    """Train the light classifier in place on converted inputs; the autoencoder stays."""
    small.autoencoder.requires_grad_(False)
    try:
        return train(small, data, loss, replace(how, epochs=epochs, warmup=0.0), keep=keep)
    finally:
        small.autoencoder.requires_grad_(True)


def best_output(
    posterior: Float[Tensor, "b classes"], means: Float[Tensor, "classes ..."]
) -> Float[Tensor, "b ..."]:
    """a*(x) = sum_c P(c | x) mu_c: what squared error to random inputs of the same class asks for."""
    return torch.tensordot(posterior, means, 1)


def paths(net: EarlyExit, small: nn.Module, data: Data) -> dict[str, int]:
    """Multiply-accumulates of one example: whole network, exit alone, to the end past the exit, converted."""
    x = data.x[:1].to(next(net.parameters()).device)
    counts = parts(net, x)
    exit, past = work(counts)
    whole = sum(stage for stage, _ in counts) + counts[-1][1]
    before = macs(small.autoencoder, x)
    return {
        "whole network": whole,
        "exit": exit,
        "past the exit": past,
        "autoencoder": before,
        "converted": before + exit,
    }
