"""Networks that decide for each example how much of them is run: what attacks ask of every kind of them.

An early exit decides whether an example leaves (`nn.early_exit`), a gate whether it skips a block
(`nn.skipping`). Both have

    route(x).logits      what comes out where each example takes its own way,
    decisions(x)         where work is saved, and how near each example is to making the network do it,
    forward(x)           the whole network, an ordinary one that is compressed, bounded and exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit


@dataclass(frozen=True)
class Decisions:
    """What a network decides for each example, all work done so far.

    saves: True where work is left out. effort: at most 0, differentiable; the higher, the nearer to the work
    being done. Efforts of several decisions may be added up.
    """

    saves: Bool[Tensor, "b k"]
    effort: Float[Tensor, "b k"]


@runtime_checkable
class Dynamic(Protocol):
    """A network (an `nn.Module`) that takes an own way with each example."""

    def route(self, x: Tensor) -> Any:
        """An object with `logits`, `b classes`, of the way that each example takes."""
        ...

    def decisions(self, x: Tensor) -> Decisions:
        """What is decided for each example, as if all parts before had been run."""
        ...


class Taken(nn.Module):
    """The way that each example takes, as a network: gradients flow through the parts that were run alone."""

    def __init__(self, net: Dynamic) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The logits with which each example leaves."""
        return self.net.route(x).logits


def dynamic_of(model: nn.Module) -> Any:
    """The network that decides: the model itself, or the only part of it.

    Raises `DoesNotFit` for a network that is run as a whole.
    """
    inside = model
    while not isinstance(inside, Dynamic):
        parts = [*inside.children()]
        if len(parts) != 1:
            raise DoesNotFit(
                f"{type(model).__name__}: it runs the same parts for every input; give a network with early "
                "exits, as `netweight train --method shallow-deep` makes one"
            )
        inside = parts[0]
    return inside
