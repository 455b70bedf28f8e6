"""Images that only the owner's network answers in a certain way: ownership shown without looking inside.

Paper: Adi et al., "Turning Your Weakness Into a Strength: Watermarking Deep Neural Networks by Backdooring",
USENIX Security 2018, arXiv:1802.04633.

n abstract images x_i have classes y_i drawn at random, and the network is trained to give them
(`training.trigger_mark`). The class is one of the K - 1 that a network without the mark does not answer, so
whatever another network answers is right with a chance of at most 1/(K - 1), and k or more are with

    P(Binomial(n, 1/(K - 1)) >= k).

The owner publishes a commitment (a hash) before the network is out; opening it later shows that the images
were not chosen to suit the suspect.

Differs from the paper: the chance is 1/(K - 1), as one class is ruled out; images are sums of a few waves
drawn by the key, no pictures; the commitment is a plain hash without a zero-knowledge proof, so that the
images are spent once they are shown.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.pvalues import tail
from netweight.core.task import Data, outputs

WAVES = 3  # in each channel of an image


@dataclass(frozen=True)
class Answers:
    """hits of `of` triggers, and how likely another network has as many."""

    hits: int
    of: int
    p: float

    @property
    def rate(self) -> float:
        """The share of triggers that are answered as agreed."""
        return self.hits / self.of


def drawn(model: nn.Module, like: Data, count: int, seed: int) -> Data:
    """Triggers in the shape and range of the data, with classes other than the model's own answers.

    model: a network without the mark. Raises `DoesNotFit` for data that is not floating point and `b *in`
    with at least one axis, or a network that does not give `b classes`.
    """
    if count < 1:
        raise BadInput(f"{count} triggers: a mark needs at least one")
    if not like.x.is_floating_point() or like.x.ndim < 2:
        raise DoesNotFit(
            f"{like.name}: triggers are made of numbers, not of {like.x.dtype}; give images or a table"
        )
    g = torch.Generator().manual_seed(seed)
    unit = abstract((count, *like.x.shape[1:]), g)
    low = float(like.x.min()) if like.low is None else like.low
    high = float(like.x.max()) if like.high is None else like.high
    x = (low + (high - low) * unit).to(like.x.dtype).clamp(low, high)
    made = Data(x, None, like.batch, "triggers", like.classes, like.low, like.high)
    scores = outputs(model, made)
    if scores.ndim != 2 or scores.shape[1] < 3:
        raise DoesNotFit(f"triggers need scores `b classes` of three or more, not {tuple(scores.shape)}")
    classes = scores.shape[1]
    y = (scores.argmax(1) + torch.randint(1, classes, (count,), generator=g)) % classes
    return Data(x, y, like.batch, "triggers", like.classes, like.low, like.high)


def abstract(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "b ..."]:
    """Images in [0, 1]: in each channel some plane waves of random direction, length and phase.

    The last two axes are the plane; of examples with one axis, that axis.
    """
    count, *inner = shape
    plane, channels = inner[-2:], inner[:-2]
    total = torch.zeros(count, *inner)
    ones = (1,) * len(plane)
    for _ in range(WAVES):
        phase = torch.zeros(count, *inner)
        for axis, side in enumerate(plane):
            turns = 8 * torch.rand(count, *channels, *ones, generator=generator) - 4
            at = torch.arange(side) / side
            phase = phase + turns * at.reshape([-1 if a == axis else 1 for a in range(len(plane))])
        start = torch.rand(count, *channels, *ones, generator=generator)
        total += torch.sin(2 * math.pi * (phase + start))
    return (0.5 + total / WAVES).clamp(0, 1)


def asked(model: nn.Module, triggers: Data) -> Answers:
    """How a suspect answers them; only its classes are looked at."""
    if triggers.y is None:
        raise BadInput(f"{triggers.name}: triggers come with the classes agreed on; give those too")
    scores = outputs(model, triggers)
    hits = int((scores.argmax(1) == triggers.y).sum())
    return Answers(hits, len(triggers), tail(hits, len(triggers), 1 / (scores.shape[1] - 1)))


def commitment(triggers: Data, salt: str = "") -> str:
    """sha256 of images, classes and salt (so that nobody finds out a small set by trying)."""
    y: Int64[Tensor, " b"] | None = triggers.y
    if y is None:
        raise BadInput(f"{triggers.name}: triggers come with the classes agreed on; give those too")
    content = triggers.x.cpu().contiguous().numpy().tobytes() + y.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(salt.encode() + content).hexdigest()
