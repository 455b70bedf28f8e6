"""Activations rounded with a step for each place (token) and a learnt shift before and after.

    y = s_p (clip(round((x + a) / s_p - h), low, high) + h) + b,        levels as in `nn.quantizer`

One step s_p for each place, shared over the batch and the features of that place; a and b are learnt, one
number per feature, zero at first. Places are a token (`b t d`, axis -2), a token of each head (`b t h d`,
steps `t h`), or a feature (axis -1). `Shifted` is trained, `PlacedRounding` is what is stored of it.

Paper: Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv:2302.02210, whose activations are rounded by LSQ (Esser et al. 2020, arXiv:1902.08153) in this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import DoesNotFit
from netweight.nn.quantizer import Learnt, Levels


@dataclass(frozen=True)
class PlacedRounding:
    """An activation on the grids of its places, as it is stored.

    step, before, after: what s, a and b are; each broadcasts against the activation without its batch.
    low, high, half: the levels (`nn.quantizer.Levels`).
    """

    step: Float[Tensor, ...]
    before: Float[Tensor, ...]
    after: Float[Tensor, ...]
    low: int
    high: int
    half: bool = False

    def __post_init__(self) -> None:
        parts = (self.step, self.before, self.after)
        if not all(part.is_floating_point() and part.isfinite().all() for part in parts):
            raise ValueError("steps and shifts are finite numbers")
        if not ((self.step > 0).all() and self.low < self.high):
            raise ValueError(f"steps are above 0, and {self.low} is below {self.high}")

    @property
    def levels(self) -> Levels:
        """The levels."""
        return Levels(self.low, self.high, self.half)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.levels.bits

    def module(self) -> nn.Module:
        """The rounding as a layer."""
        return Placed(self)


class Placed(nn.Module):
    """Rounds to the grids of the places."""

    step: Tensor
    before: Tensor
    after: Tensor

    def __init__(self, rounding: PlacedRounding) -> None:
        super().__init__()
        self.levels = rounding.levels
        for name in ("step", "before", "after"):
            self.register_buffer(name, getattr(rounding, name).clone(), persistent=False)

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """x on the grids; gradients pass straight through inside the range."""
        offset = self.levels.offset
        inside = ((x + self.before) / self.step - offset).clamp(self.levels.low, self.levels.high)
        level, free = (inside.round() + offset) * self.step, inside * self.step
        return level.detach() + (free - free.detach()) + self.after  # the middle term is 0


class Shifted(nn.Module):
    """Rounds as `Placed` does, with steps and shifts that are learnt.

    steps: how many places there are, along one axis or along several that end at `axis`. features: the shape
    of both shifts, None for none.
    """

    def __init__(
        self, levels: Levels, steps: Sequence[int], axis: int = -2, features: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        count = int(torch.tensor(steps).prod())
        self.rounding, self.steps, self.axis = Learnt(levels, places=count, axis=axis), tuple(steps), axis
        self.before = self.after = None
        if features is not None:
            self.before, self.after = (nn.Parameter(torch.zeros(tuple(features))) for _ in range(2))

    @property
    def levels(self) -> Levels:
        """The levels."""
        return self.rounding.levels

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """x on the levels of its places. Raises `DoesNotFit` for another number of places."""
        first = self.axis - len(self.steps) + 1
        here = tuple(x.shape[x.ndim + first : x.ndim + self.axis + 1])
        if here != self.steps:
            raise DoesNotFit(f"steps were learnt for {self.steps} places, here are {here}; give such inputs")
        x = x if self.before is None else x + self.before
        y = self.rounding(x.flatten(first, self.axis)).reshape(x.shape)
        return y if self.after is None else y + self.after

    @torch.no_grad()
    def stored(self) -> PlacedRounding:
        """What is kept of it."""
        flat = self.rounding.size(torch.ones((), device=self.rounding.step.device).expand([1] * 8))
        step = flat.reshape(*self.steps, *[1] * (-1 - self.axis)).clone()
        none = torch.zeros((), device=step.device)
        before, after = (
            none if each is None else each.detach().clone() for each in (self.before, self.after)
        )
        return PlacedRounding(step, before, after, self.levels.low, self.levels.high, self.levels.half)
