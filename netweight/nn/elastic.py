"""Inputs of one or two bits whose step is learnt, and as they are stored afterwards.

Paper: Liu et al., "Binary and Ternary Natural Language Generation", ACL 2023, arXiv:2306.01841, section 2.2
("elastic" as in Liu et al., "BiT", NeurIPS 2022, arXiv:2205.13016). One step a for all numbers:

    two bits, signed      a clip(round(x / a), -1, 1)
    two bits, unsigned    a clip(round((x - m) / a), 0, 2) + m,      m the smallest x
    one bit, signed       a sign(x),  a at 0
    one bit, unsigned     a clip(round(x / a), 0, 1)

Gradients, with g the one that arrives, N numbers, p the largest level and u what is rounded:

    to x    g where -1 <= u <= 1 (signed), 0 <= u <= p (unsigned), else 0
    to a    1 / sqrt(N p) * sum of g * (round(u) - u inside, the end's level outside);
            one bit, signed: 1 / sqrt(N) * sum of g sign(x)

a starts at 2 mean |x| (two bits, signed), mean |x| (one bit, signed: the least squared error) or
4 mean |x| / sqrt(2^bits - 1) (unsigned) of the first x.

Differs from the paper: signs start at mean |x|, in the released code at twice that, which makes the scores
of an attention four times as large. In the reproduction (W1A1, seed 10) 250 steps reach a perplexity of 4.8
from here, 400 steps at the same rate 14.9 from there. In evaluation mode m is a mean over batches kept from
training, since the smallest of a batch would let one example change another's result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.nn.quantizer import LEAST, Levels, rounded, scaled_gradient, straight

MOMENTUM = 0.1  # of the running smallest number


def levels_of(bits: int, *, signed: bool) -> Levels:
    """The levels of that many bits, as in the module's head; raises `BadInput` for more than two."""
    if bits not in (1, 2):
        raise BadInput(f"bits={bits}: elastic inputs take 1 or 2 bits")
    if signed:
        return Levels.mid_rise(1) if bits == 1 else Levels.ternary()
    return Levels(0, bits)


class Elastic(nn.Module):
    """Rounds to levels of a learnt step; bits is 1 or 2. The first call sets where it starts (`begin`)."""

    step: Float[Tensor, ""]
    floor: Float[Tensor, ""]
    ready: Tensor

    def __init__(self, bits: int, *, signed: bool = True) -> None:
        super().__init__()
        self.levels, self.signed, self.shifts = (
            levels_of(bits, signed=signed),
            signed,
            bits == 2 and not signed,
        )
        self.start = float(bits) if signed else 4 / math.sqrt(2**bits - 1)
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("floor", torch.zeros(()))
        self.register_buffer("ready", torch.tensor(False))

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """Set step and smallest number from these."""
        self.step.copy_((self.start * x.detach().abs().float().mean()).clamp(min=LEAST))
        if self.shifts:
            self.floor.copy_(x.min())
        self.ready.fill_(True)

    def size(self) -> Float[Tensor, ""]:
        """a, at least `LEAST`."""
        return self.step.clamp(min=LEAST)

    def forward(self, x: Tensor) -> Tensor:
        """x on the levels."""
        if not self.ready:
            self.begin(x)
        a = self.size()
        if not self.training:
            return fixed(x, a * (2 if self.levels.half else 1), self.floor, self.levels)
        factor = 1 / math.sqrt(x.numel() * max(self.levels.high, 1))
        if self.levels.half:
            return signs(x, a, factor)
        if not self.shifts:
            return rounded(x, a, self.levels, factor)
        lowest = x.detach().min()
        self.floor.lerp_(lowest.float(), MOMENTUM)
        return rounded(x - lowest, a, self.levels, factor) + lowest

    def stored(self) -> ElasticRounding:
        """As it is stored, with the same values in evaluation mode."""
        step, levels = self.size().detach() * (2 if self.levels.half else 1), self.levels
        return ElasticRounding(step.clone(), self.floor.clone(), levels.low, levels.high, levels.half)


def signs(x: Tensor, a: Tensor, factor: float) -> Tensor:
    """a sign(x), a at 0; gradients as in the module's head, that of a times `factor`."""
    sign = torch.where(x >= 0, 1.0, -1.0).to(x)
    inside = x.clamp(-a.detach(), a.detach())
    return sign * scaled_gradient(a, factor) + (inside - inside.detach())


def fixed(x: Tensor, step: Tensor, floor: Tensor, levels: Levels) -> Tensor:
    """x on the levels (k + h) step + floor, h as in `Levels`; a straight-through gradient to x."""
    u = ((x - floor) / step - levels.offset).clamp(levels.low, levels.high)
    return (straight(u, u.round()) + levels.offset) * step + floor


@dataclass(frozen=True)
class ElasticRounding:
    """Inputs on the levels (k + h) step + floor, k from low to high, h 1/2 where `half`, else 0."""

    step: Float[Tensor, ""]
    floor: Float[Tensor, ""]
    low: int
    high: int
    half: bool

    def __post_init__(self) -> None:
        if not (self.low < self.high and bool(self.step > 0) and bool(self.step.isfinite())):
            raise ValueError(f"levels from {self.low} to {self.high} with a step of {float(self.step):g}")
        if not bool(self.floor.isfinite()):
            raise ValueError(f"levels from {float(self.floor)} on")

    def module(self) -> nn.Module:
        """The rounding as a layer."""
        return Fixed(self)


class Fixed(nn.Module):
    """Rounds to fixed levels."""

    def __init__(self, how: ElasticRounding) -> None:
        super().__init__()
        self.levels = Levels(how.low, how.high, how.half)
        self.register_buffer("step", how.step, persistent=False)
        self.register_buffer("floor", how.floor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x on the levels."""
        return fixed(x, self.step, self.floor, self.levels)
