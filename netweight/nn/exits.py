"""Internal classifiers, and the rewrite that puts them into a Sequential network.

Paper: Kaya, Hong and Dumitras, "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking",
ICML 2019, arXiv:1810.07052, section 3.1 and official code: behind a part with features h (`b c *places`),

    r = m maxpool(h) + (1 - m) meanpool(h),    m = sigmoid(w) learnt, w random at first,
    z = A flat(r) + b,

pools of ceil(side / 4) places without overlap where a side has more than 4 places, so at most 4 are left.

Differs from the paper: one to three axes of places, and none (vectors: A h + b).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.nn.early_exit import EarlyExit, stages_of

LEFT = 4  # places that are left of a side
LARGEST = 1 << 28  # weights of a classifier: a description from outside cannot take all memory
WHOLE = "dynamic"  # the only part of a network with exits
MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
MEAN = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class Mixed(nn.Module):
    """A learnt mix of the largest and the mean value of each window."""

    def __init__(self, windows: Sequence[int]) -> None:
        super().__init__()
        self.largest, self.mean = MAX[len(windows) - 1](windows), MEAN[len(windows) - 1](windows)
        self.share = nn.Parameter(torch.rand(1))

    def forward(self, h: Tensor) -> Tensor:
        """`b c *places` with places / windows."""
        return self.mix(self.both(h))

    def both(self, h: Tensor) -> Tensor:
        """The largest and the mean values, `b 2 c *places`."""
        return torch.stack([self.largest(h), self.mean(h)], 1)

    def mix(self, both: Tensor) -> Tensor:
        """What `both` gave, mixed."""
        share = self.share.sigmoid()
        return share * both[:, 0] + (1 - share) * both[:, 1]


def internal_classifier(features: Sequence[int], classes: int) -> nn.Sequential:
    """For features `channels *places` (one example's shape), with random weights.

    Raises `DoesNotFit` for more than three axes of places.
    """
    channels, *places = features
    if len(places) > 3:
        raise DoesNotFit(f"features of shape {tuple(features)}: an exit reads one to three axes of places")
    windows = tuple(math.ceil(side / LEFT) for side in places)
    reduced = channels * math.prod(side // window for side, window in zip(places, windows))
    mixed = [Mixed(windows)] if max(windows, default=1) > 1 else []
    return nn.Sequential(*mixed, nn.Flatten(), nn.Linear(reduced, classes))


class Readers(nn.Module):
    """The early exits of a network on what they pool, which does not change while they alone are trained.

    `read` makes the inputs; shapes: of one example at each exit.
    """

    def __init__(self, net: EarlyExit, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.exits, self.shapes = nn.ModuleList([*net.exits][:-1]), shapes

    def forward(self, x: Tensor) -> Tensor:
        """All logits but those of the network itself, `exits b classes`."""
        found = []
        each = x.split([math.prod(shape) for shape in self.shapes], 1)
        for out, h, shape in zip(self.exits, each, self.shapes):
            h, mixes = h.reshape(-1, *shape), isinstance(out[0], Mixed)
            found.append(out[1:](out[0].mix(h)) if mixes else out(h))
        return torch.stack(found)


@torch.no_grad()
def read(net: EarlyExit, x: Tensor) -> list[Tensor]:
    """What each early exit pools, `b *shape` each, of a network in evaluation mode."""
    found = []
    for stage, out in zip([*net.stages][:-1], net.exits):
        x = stage(x)
        found.append(out[0].both(x) if isinstance(out[0], Mixed) else x)
    return found


@dataclass(frozen=True)
class AddExits:
    """A Sequential network gets internal classifiers, and is run as `nn.early_exit.EarlyExit` from then on.

    after: names of the parts behind which they lie, in order. features: the shape of what each part gives for
    one example. classes: scores of each. A network that has exits already stays as it is; the whole network
    computes what it did.
    """

    after: tuple[str, ...]
    features: tuple[tuple[int, ...], ...]
    classes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(tuple(shape) for shape in self.features))
        sizes = [self.classes, *(side for shape in self.features for side in shape)]
        if not self.after or len(self.after) != len(self.features) or not all(map(_counts, sizes)):
            raise BadInput(f"{self}: give the features of each part with an exit, of at least one number")
        if max(shape[0] * LEFT ** len(shape[1:]) for shape in self.features) * self.classes > LARGEST:
            raise BadInput(f"{self}: a classifier would have more than {LARGEST} weights")

    def apply(self, model: nn.Module) -> None:
        """Add them in place, with random weights; raises `DoesNotFit` where the network cannot be cut."""
        if [name for name, _ in model.named_children()] == [WHOLE]:
            return
        stages = stages_of(model, self.after)
        like = next((p for p in model.parameters()), torch.empty(0))
        exits = [internal_classifier(shape, self.classes).to(like) for shape in self.features]
        for name, _ in [*model.named_children()]:
            delattr(model, name)
        model.add_module(WHOLE, EarlyExit(stages, [*exits, nn.Identity()], doubt="unsure").to(like.device))
        model.train(model.training)


def _counts(value: object) -> bool:
    return isinstance(value, int) and value >= 1
