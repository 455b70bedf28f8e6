"""Numbers with a point at a fixed place, and the names of what weights are rounded to.

A number of a.b bits has a bits before the point (the sign among them) and b behind it:

    x on the grid = clip(round(x 2^b), -2^(a+b-1), 2^(a+b-1) - 1) / 2^b,        round half to even.

It is the `StaticRounding` of scale 2^-b and zero 2^(a+b-1), which is what is stored. Gradients pass where x
is inside the range. Zero is a level, so what is sparse stays sparse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, unknown
from netweight.nn.fake import StaticRounding
from netweight.nn.quantizer import FromLargest, FromMean

WEIGHTS = {"binary": 1, "ternary": 2, "2": 2, "3": 3, "4": 4, "6": 6, "8": 8}  # name: bits of a code


@dataclass(frozen=True)
class Fixed:
    """whole: bits before the point, the sign among them. fraction: bits behind it. 2 to 16 in all."""

    whole: int
    fraction: int

    def __post_init__(self) -> None:
        if self.whole < 1 or self.fraction < 0 or not 2 <= self.bits <= 16:
            raise BadInput(
                f"{self.whole}.{self.fraction}: a fixed-point number has a sign and from 2 to 16 bits; "
                "give for example 4.4"
            )

    @classmethod
    def parse(cls, text: str) -> Fixed:
        """The format that "4.4" names."""
        whole, point, fraction = text.partition(".")
        if not (point and whole.isdecimal() and fraction.isdecimal()):
            raise BadInput(f"{text!r} is no fixed-point format; give bits before and behind it, such as 4.4")
        return cls(int(whole), int(fraction))

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return self.whole + self.fraction

    def stored(self, device: torch.device | str = "cpu") -> StaticRounding:
        """As a network keeps it."""
        scale = torch.tensor(2.0**-self.fraction, device=device)
        return StaticRounding(scale, torch.tensor(2.0 ** (self.bits - 1), device=device), self.bits)

    def __call__(self, x: Tensor) -> Tensor:
        """x on the grid; the same numbers as `stored().module()(x)`."""
        most, one = 2.0 ** (self.bits - 1), 2.0**self.fraction
        inside = x.clamp(-most / one, (most - 1) / one)
        return (inside * one).detach().round_().div_(one) + (inside - inside.detach())


def weight_rounding(name: str) -> FromMean | FromLargest:
    """What rounds a weight: binary or ternary by the mean of each row, or that many bits by the largest."""
    if name not in WEIGHTS:
        raise unknown("rounding of weights", name, WEIGHTS)
    if name in ("binary", "ternary"):
        return FromMean.binary() if name == "binary" else FromMean.ternary()
    return FromLargest(WEIGHTS[name])


class Rounding(nn.Module):
    """A fixed-point format as a layer, for training."""

    def __init__(self, format: Fixed) -> None:
        super().__init__()
        self.format = format

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        return self.format(x)
