"""One set of integer codes that is decoded at any bit width: the stored form, and the layer that trains it.

Huang et al., "Nearly Lossless Adaptive Bit Switching", 2025, arXiv:2502.01199, section 3.1. With h the
highest width, one step s for the whole weight and D = h - b,

    W_h = clip(round(W / s), -2^(h-1), 2^(h-1) - 1)
    W_b = clip((W_h + 2^(D-1)) >> D, -2^(b-1), 2^(b-1) - 1),        the weight at b bits is  W_b s 2^D.

Only W_h and s are stored. The first rounding is half to even as everywhere; the second, a division by a power
of two, is the shift that a processor has, which rounds halves up. Codes of whole numbers hit halves all the
time, so training does the same. `floor` leaves out 2^(D-1) (Jin et al., "AdaBits", CVPR 2020,
arXiv:1912.09666).

Gradients, with u = W / (s 2^D) and g the one that arrives (`double_rounded`):

    to W     g where -2^(b-1) <= u <= 2^(b-1) - 1, else 0
    to s     factor * 2^D * sum of g (W_b - u inside, W_b outside),

the derivative with both roundings passed straight through, times LSQ's factor (`nn.quantizer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from netweight.core import grid
from netweight.core.grid import storable
from netweight.nn.fake import StaticRounding
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import DTYPES, check_bytes, check_shape, dtype_name, stored
from netweight.nn.quantizer import LEAST, Levels, codes, straight

WIDTHS = range(2, 9)


def shifted(high: Tensor, by: int, bits: int, floor: bool = False) -> Tensor:
    """W_b of W_h, `by` = D bits less; integers are shifted, whole floats give the same numbers."""
    half = 0 if floor or by == 0 else 1 << (by - 1)
    if high.is_floating_point():
        low = ((high + half) / 2**by).floor_()
    else:
        low = (high.to(torch.int16) + half) >> by
    levels = Levels.signed(bits)
    return low.clamp_(levels.low, levels.high)


def double_rounded(
    weight: Tensor, step: Tensor, high: int, bits: int, floor: bool = False, factor: float = 1.0
) -> Tensor:
    """The weight at `bits` bits, gradients as in the module's head. step: of the `high` bits, a scalar."""
    return _DoubleRounded.apply(weight, step, high, bits, floor, factor)


class _DoubleRounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, high: int, bits: int, floor: bool, factor: float
    ) -> Tensor:
        levels, by = Levels.signed(bits), high - bits
        low = shifted(codes(weight, step, Levels.signed(high)), by, bits, floor)
        size = step * 2**by
        u = weight / size
        inside = (u >= levels.low) & (u <= levels.high)
        ctx.save_for_backward(torch.addcmul(low, u, inside.to(u.dtype), value=-1), inside)
        ctx.factor = factor * 2**by
        return low * size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        by_step, inside = ctx.saved_tensors
        (g,) = grads
        to_step = (g * by_step).sum() * ctx.factor if ctx.needs_input_grad[1] else None
        return g * inside, to_step, None, None, None, None


def size_of(step: Tensor) -> Tensor:
    """A learnt step as it is stored: its size, a number of float16 wherever that is possible.

    Gradients reach the parameter. A parameter that was carried below 0 counts by its size: held at the least
    step it would saturate every weight, and gradients of that size are what ALRS answers with a rate of 0.
    """
    size = step.abs()
    return straight(size, storable(size.detach().clamp(min=LEAST).reshape(1)).float().reshape(()))


@dataclass(frozen=True)
class DoubleRounded:
    """Codes W_h with one step, decoded at `width` bits.

    codes: W_h + 2^(h-1) in h bits each, see `grid.pack`. step: s, one number of float16 or float32. widths:
    those that were trained, highest (h) first. width: the one in use.
    """

    codes: UInt8[Tensor, " bytes"]
    step: Float[Tensor, " 1"]
    widths: tuple[int, ...]
    width: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    floor: bool = False

    def __post_init__(self) -> None:
        check_widths(self.widths, self.width)
        check_shape(self.shape, math.prod(self.shape), "codes")
        check_bytes(self.codes, math.prod(self.shape), self.widths[0])
        if not self.step.is_floating_point() or self.step.shape != (1,) or self.dtype not in DTYPES:
            raise ValueError(f"one step is needed, not {tuple(self.step.shape)} of {self.dtype}")

    @classmethod
    def of(
        cls, weight: Tensor, step: Tensor, widths: Sequence[int], width: int, floor: bool = False
    ) -> DoubleRounded:
        """The weight rounded with that step (of the highest width, a scalar)."""
        size = storable(step.detach().abs().clamp(min=LEAST).reshape(1))
        high = Levels.signed(widths[0])
        whole = codes(weight.float(), size.float(), high) - high.low
        packed = grid.pack(whole.to(torch.uint8), widths[0])
        return cls(packed, size, tuple(widths), width, tuple(weight.shape), dtype_name(weight), floor)

    def integers(self) -> Tensor:
        """W_b, int16 in the shape of the weight."""
        high = self.widths[0]
        whole = grid.unpack(self.codes, high, math.prod(self.shape)).to(torch.int16) - (1 << (high - 1))
        return shifted(whole, high - self.width, self.width, self.floor).reshape(self.shape)

    def decode(self) -> Tensor:
        """W_b s 2^D in the dtype of the weight."""
        size = self.step.float() * 2 ** (self.widths[0] - self.width)
        return (self.integers().float() * size).to(DTYPES[self.dtype])

    def bits(self) -> int:
        """Bits of codes and step, the same at every width."""
        return stored(self.codes, self.step)

    def project(self, weight: Tensor) -> DoubleRounded:
        """The weight with the same step."""
        return self.of(weight, self.step[0], self.widths, self.width, self.floor)

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


@dataclass(frozen=True)
class WidthRounding:
    """The input of a layer on a grid for each width. steps: one for each of `widths`. width: in use.

    signed: levels on both sides of 0, else from 0 on (what a ReLU gives).
    """

    steps: Float[Tensor, " widths"]
    widths: tuple[int, ...]
    width: int
    signed: bool = False

    def __post_init__(self) -> None:
        check_widths(self.widths, self.width)
        if self.steps.shape != (len(self.widths),):
            raise ValueError(f"{tuple(self.steps.shape)} steps are not one for each of {self.widths}")

    @property
    def bits(self) -> int:
        """Bits of an input."""
        return self.width

    def static(self) -> StaticRounding:
        """The rounding in use."""
        step = self.steps[self.widths.index(self.width)].float()
        zero = float(2 ** (self.width - 1) if self.signed else 0)
        return StaticRounding(step.clone(), torch.tensor(zero).to(step), self.width)

    def module(self) -> nn.Module:
        """The rounding in use as a layer."""
        return self.static().module()


def check_widths(widths: Sequence[int], width: int) -> None:
    """Raises ValueError unless these are widths of 2 to 8 bits, highest first, with `width` among them."""
    sane = widths and all(b in WIDTHS for b in widths) and list(widths) == sorted(set(widths), reverse=True)
    if not sane or width not in widths:
        raise ValueError(f"bits={width} of {tuple(widths)}: widths go from 8 down to 2, each once")
