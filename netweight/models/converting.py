"""An autoencoder that makes an input easy, and the small classifier that reads what comes out.

    x  ->  autoencoder: Linear, ReLU, .. (the code), Linear, into [low, high]  ->  stem  ->  branch

Every input takes the same short path. `Convert` makes such a network out of an ordinary one, whose stem it
keeps; see `training.cbnet`, which trains it.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.nn.early_exit import branch, stages_of

LARGEST = 1 << 28  # weights of a layer: a description from outside cannot take all memory


class Between(nn.Module):
    """low + (high - low) sigmoid(x): values of valid inputs."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not low < high:
            raise BadInput(f"inputs from {low} to {high}: give data with low below high")
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """Within [low, high]."""
        return self.low + (self.high - self.low) * torch.sigmoid(x)

    def extra_repr(self) -> str:
        """low and high, shown in the module's name."""
        return f"low={self.low}, high={self.high}"


def autoencoder(
    shape: Sequence[int], widths: Sequence[int], low: float | None, high: float | None
) -> nn.Sequential:
    """Inputs `b *shape` to inputs of the same shape; two parts, "encoder" and "decoder", random weights.

    widths: of the hidden layers, the last of which is the code. Without a range the end is linear.
    """
    inputs = math.prod(shape)
    hidden = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise([inputs, *widths])]
    encoder = nn.Sequential(nn.Flatten(), *itertools.chain(*hidden))
    ranged = [] if low is None or high is None else [Between(low, high)]
    decoder = nn.Sequential(nn.Linear(widths[-1], inputs), *ranged, nn.Unflatten(1, tuple(shape)))
    return nn.Sequential(OrderedDict(encoder=encoder, decoder=decoder))


@dataclass(frozen=True)
class Convert:
    """A network becomes an autoencoder and a light classifier: its parts up to `after`, then a branch.

    after: name of a part of the Sequential. features: shape of what it gives for one example. classes, width:
    of the branch. shape: of one input. widths: hidden layers of the autoencoder. low, high: range of inputs.
    A network that is converted already stays as it is.
    """

    after: str
    features: tuple[int, ...]
    classes: int
    width: int
    shape: tuple[int, ...]
    widths: tuple[int, ...]
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        inputs, places = math.prod(self.shape), math.prod(self.features)
        sizes = (*self.features, self.classes, self.width, *self.shape, *self.widths)
        if not (self.widths and self.shape and self.features and min(sizes) >= 1):
            raise BadInput(f"{self}: an autoencoder and a branch have layers of at least one neuron")
        layers = [a * b for a, b in itertools.pairwise((inputs, *self.widths, inputs))]
        if max(*layers, places * self.width, self.width * self.classes) > LARGEST:
            raise BadInput(f"{self}: a layer would have more than {LARGEST} weights; give smaller widths")

    def apply(self, model: nn.Module) -> None:
        """Convert in place, new parts with random weights; raises `DoesNotFit` where it cannot be cut."""
        if [name for name, _ in model.named_children()] == ["autoencoder", "classifier"]:
            return
        stem = stages_of(model, [self.after])[0]
        like = next(model.parameters())
        new = autoencoder(self.shape, self.widths, self.low, self.high).to(like)
        exit = branch(self.features, self.classes, self.width).to(like)
        for name, _ in [*model.named_children()]:
            delattr(model, name)
        model.add_module("autoencoder", new)
        model.add_module("classifier", nn.Sequential(OrderedDict(stem=stem, branch=exit)))
        model.train(model.training)
