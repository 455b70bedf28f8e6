"""Sets around a point: what may happen to an input, a weight, a memory or a graph.

    Linf L2 L1    |s - x|_p <= eps, within the valid range [low, high]           inputs and activations
    Box           lower <= s <= upper, wherever x is                             inputs and activations
    WeightLinf    |s - x|_inf <= eps                                             weights
    Rounding      the cell of each weight's nearest grid code                    weights
    BitFlips      at most k flipped bits per example                             uint8 codes
    EdgeFlips     at most k flipped edges per example                            undirected 0/1 adjacency
    Synonyms      at most k words replaced, each by one of its own (`core.words`)  embedded sentences

`project` and `sample` return points that are inside to the last bit of their dtype; `contains` decides
exactly (float64 with its rounding error accounted for, rationals where that is not enough). `corners` and
`support` are for proofs: rounded outwards, never too small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from netweight.core import grid
from netweight.core.balls import L1, L2, Linf, WeightLinf, check_valid
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.exact import box_support, rounded, spelled
from netweight.core.flips import BitFlips, EdgeFlips


@runtime_checkable
class Perturbation(Protocol):
    """A set around x; the first axis counts examples (for weights: rows)."""

    def project(self, s: Tensor, x: Tensor) -> Tensor:
        """A point of the set near s (the nearest, but for L2 and L1 within a range); s itself if inside."""
        ...

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of the set; drawn on the generator's device, returned on that of x."""
        ...

    def contains(self, s: Num[Tensor, "b *in"], x: Num[Tensor, "b *in"]) -> Bool[Tensor, " b"]:
        """Which examples of s lie in the set, decided exactly."""
        ...

    def corners(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper): a box around the set, rounded outwards."""
        ...

    def support(self, a: Float[Tensor, "b k *in"], x: Num[Tensor, "b *in"]) -> Float[Tensor, "b k"]:
        """max <a, s> over the set, or something above it; rounded up."""
        ...


@dataclass(frozen=True)
class Found:
    """What an attack found. points: inside the set. hit: where it reached what it looked for."""

    points: Tensor
    hit: Bool[Tensor, " b"]


def _inner(self: Cell, x: Tensor) -> tuple[Tensor, Tensor]:
    """The cell rounded inwards to the dtype of x; raises where no number of that dtype lies inside."""
    lower, upper = self.cell(x)
    lower, upper = rounded(lower, x.dtype, up=True), rounded(upper, x.dtype, up=False)
    if (lower > upper).any():
        raise DoesNotFit(f"no {x.dtype} number lies in one of the intervals; widen the box or use float64")
    return lower, upper


def _cell_contains(self: Cell, s: Num[Tensor, "b *in"], x: Num[Tensor, "b *in"]) -> Bool[Tensor, " b"]:
    lower, upper = self.cell(x)
    return ((s.double() >= lower) & (s.double() <= upper)).reshape(len(x), -1).all(1)


def _cell_project(self: Cell, s: Tensor, x: Tensor) -> Tensor:
    return torch.clamp(s, *_inner(self, x))


def _cell_sample(self: Cell, x: Tensor, generator: torch.Generator) -> Tensor:
    lower, upper = self.cell(x)
    share = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=generator.device).to(
        x.device
    )
    return self.project((lower + (upper - lower) * share).to(x.dtype), x)


def _cell_corners(self: Cell, x: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = self.cell(x)
    return rounded(lower, x.dtype, up=False), rounded(upper, x.dtype, up=True)


def _cell_support(self: Cell, a: Float[Tensor, "b k *in"], x: Float[Tensor, "b *in"]) -> Float[Tensor, "b k"]:
    return box_support(a, *self.cell(x))


@dataclass(frozen=True, eq=False)
class Box:
    """lower <= s <= upper, wherever x is. Bounds are numbers, `*in` or `b *in`, finite, in input units."""

    lower: Tensor | float
    upper: Tensor | float

    def __post_init__(self) -> None:
        low, high = torch.as_tensor(self.lower), torch.as_tensor(self.upper)
        if not (low.isfinite().all() and high.isfinite().all() and (low <= high.to(low.device)).all()):
            raise BadInput("box: the bounds must be finite with lower <= upper everywhere; check their order")

    def cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds in float64, in the shape of x."""
        check_valid(Linf(0.0), x)
        sides = [torch.as_tensor(b, dtype=torch.float64, device=x.device) for b in (self.lower, self.upper)]
        return sides[0].expand(x.shape), sides[1].expand(x.shape)

    def steepest(self, gradient: Float[Tensor, "b *in"], x: Float[Tensor, "b *in"]) -> Float[Tensor, "b *in"]:
        """Half the width of the box, in the direction of the gradient's signs."""
        lower, upper = self.cell(x)
        return gradient.sign() * (0.5 * (upper - lower)).to(x.dtype)

    project, sample, contains = _cell_project, _cell_sample, _cell_contains
    corners, support = _cell_corners, _cell_support
    __str__ = spelled


@dataclass(frozen=True)
class Rounding:
    """Around a weight `out in *kernel`: what a grid of its range rounds to the same codes (`core.grid`).

    Half a step to each side of the decoded code, widened where needed to hold the weight itself.
    """

    bits: int = 4
    symmetric: bool = False
    group: int = grid.PER_ROW

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 8 and self.group >= grid.PER_TENSOR):
            raise BadInput(
                f"rounding={self.bits}, group={self.group}: give 2 to 8 bits and a group of at least -1"
            )

    def cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each weight in float64, exact: scales are float16 or float32, codes have 8 bits."""
        how = grid.Grid(self.bits, self.symmetric, self.group)
        groups = grid.in_groups(x, self.group)
        scale, zero = grid.scale_and_zero(*grid.extent(groups, self.symmetric), how)
        codes = grid.to_codes(groups, scale, zero, how).double() - zero.double()[:, None]
        sides = [((codes + half) * scale.double()[:, None]).reshape(x.shape) for half in (-0.5, 0.5)]
        return torch.minimum(sides[0], x.double()), torch.maximum(sides[1], x.double())

    project, sample, contains = _cell_project, _cell_sample, _cell_contains
    corners, support = _cell_corners, _cell_support
    __str__ = spelled


Cell = Box | Rounding


SETS: dict[str, Callable[..., Perturbation]] = {
    "linf": Linf,
    "l2": L2,
    "l1": L1,
    "weightlinf": WeightLinf,
    "rounding": Rounding,
    "bitflips": BitFlips,
    "edgeflips": EdgeFlips,
}
WHOLE = ("rounding", "bitflips", "edgeflips")


def parse(text: str) -> Perturbation:
    """From "linf=0.01", "linf=2/255", "l2=0.5", "l1=3", "rounding", "rounding=4", "bitflips=3", ..."""
    name, _, value = (word.strip() for word in text.partition("="))
    if name.lower() not in SETS:
        raise unknown("set", name, SETS)
    name = name.lower()
    if name == "rounding" and not value:
        return Rounding()
    try:
        over, _, under = value.partition("/")
        size = float(over) / float(under) if under else float(value)
        return SETS[name](int(value) if name in WHOLE else size)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        kind, example = ("whole number", 3) if name in WHOLE else ("number", 0.01)
        raise BadInput(
            f"{text.strip()!r}: {value!r} is not a {kind}; write for example {name}={example}"
        ) from error


def over_the_range(within: Perturbation, low: float | None, high: float | None) -> str | None:
    """A sentence where the set leaves no valid number of an input out, else None."""
    if low is None or high is None or not isinstance(within, Linf | L2 | L1) or within.eps < high - low:
        return None
    return (
        f"{type(within).__name__.lower()}={within.eps:g} reaches over the whole valid range of a number, "
        f"{low:g} to {high:g}; give a smaller radius."
    )


def with_range(within: Perturbation, low: float | None, high: float | None) -> Perturbation:
    """The set cut to valid inputs; sets of weights, memories and graphs have no range and stay."""
    if isinstance(within, Linf | L2 | L1):
        lows = [bound for bound in (within.low, low) if bound is not None]
        highs = [bound for bound in (within.high, high) if bound is not None]
        return replace(within, low=max(lows, default=None), high=min(highs, default=None))
    if isinstance(within, Box):
        lower, upper = torch.as_tensor(within.lower), torch.as_tensor(within.upper)
        return Box(
            lower.double().clamp(min=low) if low is not None else lower,
            upper.double().clamp(max=high) if high is not None else upper,
        )
    return within
