"""Quantizers that are trained with: levels, where their step comes from, and what gradients pass.

With u = x / s - h, a value is rounded to the level (k + h) s,

    k = clip(round(u), low, high),        h = 0, or 1/2 where no level is 0 (`Levels.mid_rise`).

Gradients, with g the one that arrives (Esser et al., "Learned Step Size Quantization", ICLR 2020,
arXiv:1902.08153, equations 3 and 5; `Learnt`):

    to x     g inside low <= u <= high, 0 outside
    to s     factor * sum of g * (k - u inside, k + h outside),   factor = 1 / sqrt(numbers per step * high)

`FromMean` takes s = c mean |x| of each row and learns nothing: c = 2 / 2^(b-1) with mid-rise levels is StatsQ
(Liu et al., "Oscillation-free Quantization", ICML 2023, arXiv:2302.02210), c = 4/3 with {-1, 0, 1} and 2 with
mid-rise {-1/2, 1/2} are ternary and binary weights (Liu et al., "Binary and Ternary Natural Language
Generation", ACL 2023, arXiv:2306.01841). Its gradient to x is g everywhere.

Rounding is half to even; steps are numbers of float16, so that what is packed computes the same, bit for bit.
Steps below `LEAST` count as that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput
from netweight.core.grid import storable

LEAST = 1e-5


@dataclass(frozen=True)
class Levels:
    """The levels (k + h) s for whole k from `low` to `high`; h is 1/2 if `half`, else 0."""

    low: int
    high: int
    half: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise BadInput(f"levels from {self.low} to {self.high}: at least two are needed")

    @classmethod
    def signed(cls, bits: int) -> Levels:
        """-2^(b-1) .. 2^(b-1) - 1, with 0 among them; one bit is `mid_rise`."""
        return cls.mid_rise(1) if bits == 1 else cls(-(2 ** (_width(bits) - 1)), 2 ** (bits - 1) - 1)

    @classmethod
    def unsigned(cls, bits: int) -> Levels:
        """0 .. 2^b - 1."""
        return cls(0, 2 ** _width(bits) - 1)

    @classmethod
    def mid_rise(cls, bits: int) -> Levels:
        """-(2^b - 1)/2 .. (2^b - 1)/2 in whole steps, none of them 0; one bit is -1/2, 1/2."""
        return cls(-(2 ** (_width(bits) - 1)), 2 ** (bits - 1) - 1, half=True)

    @classmethod
    def ternary(cls) -> Levels:
        """-1, 0, 1."""
        return cls(-1, 1)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.high - self.low + 1

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return math.ceil(math.log2(self.count))

    @property
    def offset(self) -> float:
        """h."""
        return 0.5 if self.half else 0.0

    @property
    def largest(self) -> float:
        """The largest level in steps."""
        return self.high + self.offset


def _width(bits: int) -> int:
    if not 1 <= bits <= 16:
        raise BadInput(f"bits={bits}: a level takes from 1 to 16 bits")
    return bits


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value` (Bengio et al. 2013, arXiv:1308.3432)."""
    return rounded.detach() + (value - value.detach())


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """`value`, with `factor` times its gradient."""
    return straight(value * factor, value)


def codes(x: Tensor, step: Tensor, levels: Levels) -> Tensor:
    """k of each number, as floats; `step` broadcasts against x. No gradient."""
    return (x.detach() / step.detach() - levels.offset).round_().clamp_(levels.low, levels.high)


def rounded(x: Tensor, step: Tensor, levels: Levels, factor: float = 1.0) -> Tensor:
    """x on the levels, gradients to x and `step` as in the module's head."""
    return _Rounded.apply(x, step, levels, factor)


class _Rounded(torch.autograd.Function):
    """One function where single operators take a dozen passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, levels: Levels, factor: float) -> Tensor:
        """The values on the levels."""
        u = x / step
        if levels.half:
            u -= levels.offset
        k = u.clamp(levels.low, levels.high)
        inside = k == u
        k.round_()
        if levels.half:
            k += levels.offset
            u += levels.offset
        ctx.save_for_backward(torch.addcmul(k, u, inside.to(u.dtype), value=-1), inside)
        ctx.shape, ctx.factor = step.shape, factor
        return k.mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x and of the step."""
        by_step, inside = ctx.saved_tensors
        (g,) = grads
        to_step = None
        if ctx.needs_input_grad[1]:
            if math.prod(ctx.shape) == 1:
                to_step = torch.dot(g.reshape(-1), by_step.reshape(-1)).reshape(ctx.shape)
            else:
                to_step = (g * by_step).sum_to_size(ctx.shape)
            to_step = to_step * ctx.factor
        return g * inside, to_step, None, None


class Learnt(nn.Module):
    """Rounds to levels whose step is learnt, one for all numbers or one per place of `axis`.

    The step starts at `start` * 2 mean |x| / sqrt(high) of the first x it sees (`begin`, or its first call);
    until then it must not be given to an optimizer as something to keep. axis: counted from the end (-1) or
    the front; the step has one entry for each place there.
    """

    step: Float[Tensor, ...]
    ready: Tensor

    def __init__(
        self, levels: Levels, *, places: int = 1, axis: int | None = None, start: float = 1.0
    ) -> None:
        super().__init__()
        self.levels, self.axis, self.start = levels, axis, start
        self.step = nn.Parameter(torch.ones(places) if axis is not None else torch.ones(()))
        self.register_buffer("ready", torch.tensor(False))

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """Set the step from these numbers."""
        size = x.detach().abs().float()
        mean = size.mean() if self.axis is None else size.movedim(self.axis, 0).flatten(1).mean(1)
        if mean.shape != self.step.shape:
            raise BadInput(f"{len(self.step)} steps do not fit {tuple(x.shape)} along axis {self.axis}")
        self.step.copy_((2 * self.start * mean / math.sqrt(max(self.levels.largest, 1.0))).clamp(min=LEAST))
        self.ready.fill_(True)

    def size(self, x: Tensor) -> Tensor:
        """The step as it is stored, in the shape that broadcasts against x; gradients reach the parameter."""
        step = straight(
            self.step,
            storable(self.step.detach().clamp(min=LEAST).reshape(-1)).float().reshape(self.step.shape),
        )
        if self.axis is None:
            return step
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return step.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """x on the levels."""
        if not self.ready:
            self.begin(x)
        each = x.numel() / self.step.numel()
        factor = 1 / math.sqrt(each * max(self.levels.largest, 1.0))
        return rounded(x, self.size(x), self.levels, factor)


class FromMean(nn.Module):
    """Rounds each row (the first axis) to levels of the step c mean |x| of that row; nothing is learnt."""

    def __init__(self, levels: Levels, c: float) -> None:
        super().__init__()
        self.levels, self.c = levels, c

    @classmethod
    def stats(cls, bits: int) -> FromMean:
        """StatsQ: mid-rise levels from -2 mean |x| to 2 mean |x|."""
        return cls(Levels.mid_rise(bits), 2 / 2 ** (bits - 1))

    @classmethod
    def ternary(cls) -> FromMean:
        """-s, 0, s with s = 4/3 mean |x|."""
        return cls(Levels.ternary(), 4 / 3)

    @classmethod
    def binary(cls) -> FromMean:
        """-s, s with s = mean |x|."""
        return cls(Levels.mid_rise(1), 2.0)

    def size(self, x: Tensor) -> Tensor:
        """The step of each row as it is stored, in the shape that broadcasts against x."""
        mean = x.detach().abs().float().flatten(1).mean(1)
        step = storable((self.c * mean).clamp(min=LEAST)).float()
        return step.reshape(-1, *[1] * (x.ndim - 1))

    def forward(self, x: Tensor) -> Tensor:
        """x on the levels; the gradient passes as it is."""
        step = self.size(x)
        return straight(x, (codes(x, step, self.levels) + self.levels.offset) * step)


class FromLargest(nn.Module):
    """Rounds to levels of one step, max |x| / 2^(b - 1); nothing is learnt.

    So x / max |x| is a fixed-point number with b - 1 bits behind the point, of which -1 is the smallest and
    1 - 2^(1-b) the largest. The gradient passes as it is.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = Levels.signed(bits)

    def size(self, x: Tensor) -> Tensor:
        """The step as it is stored, one number."""
        largest = x.detach().abs().float().amax().reshape(1)
        return storable((largest / -self.levels.low).clamp(min=LEAST)).float().reshape([1] * x.ndim)

    def forward(self, x: Tensor) -> Tensor:
        """x on the levels; the gradient passes as it is."""
        step = self.size(x)
        return straight(x, codes(x, step, self.levels) * step)
