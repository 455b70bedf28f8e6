"""Codes on a power grid: `Power` for weights, `PowerRounding` for the inputs of a layer.

Paper: Yvinec et al., "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR 2023,
arXiv:2301.09858.

phi_a(x) = sign(x) |x|^a, the only continuous maps that keep products: phi_a(x y) = phi_a(x) phi_a(y). With
the largest code q and the scale s = max |w| / q of a group,

    n = clip(round(q phi_a(w / (q s))), -q, q),        w' = q s phi_1/a(n / q),        q = 2^(b-1) - 1,

written as q^(1-a) phi_a(w / s) and s q^(1-1/a) phi_1/a(n), so that a = 1 is the symmetric uniform grid of
`core.grid` to the last bit. a < 1 has more levels near 0. Rounding happens in the domain of n, half to even:
between two levels a weight goes to the one whose code is nearer, not always to the nearer level. Inputs that
are never negative have codes 0 .. 2^b - 1 in place of -q .. q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int16, UInt8
from torch import Tensor, nn

from netweight.core import grid
from netweight.core.grid import Grid
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import DIVISION, DTYPES, check_bytes, check_shape, dtype_name, layout, stored

LOWEST, HIGHEST, STEP = 0.2, 1.2, 0.05  # exponents that are searched
CLOSE = 1e-3  # how near to the best exponent the search ends
SAMPLE = 2**18  # weights that the search looks at
GOLDEN = (math.sqrt(5) - 1) / 2


def most(bits: int) -> int:
    """q, the largest code of a signed grid."""
    return 2 ** (bits - 1) - 1


def spread(ratio: Float[Tensor, "*shape"], exponent: float, q: int) -> Float[Tensor, "*shape"]:
    """q phi_a(w / (q s)) of the ratios w / s: where the weights lie among the codes, not yet rounded."""
    return ratio.sign() * ratio.abs().pow(exponent) * q ** (1 - exponent)


def levels(exponent: float, q: int) -> Float[Tensor, " levels"]:
    """w' / s of the codes -q to q, float32 on the CPU."""
    half = torch.arange(1, q + 1, dtype=torch.float64).pow(1 / exponent) * q ** (1 - 1 / exponent)
    return torch.cat([-half.flip(0), half.new_zeros(1), half]).float()


def to_codes(
    groups: Float[Tensor, "groups of"], scale: Float[Tensor, " groups"], exponent: float, q: int
) -> Int16[Tensor, "groups of"]:
    """n of every weight; the ratio is taken in float32 as `core.grid` does, the power in float64."""
    ratio = (groups.float() / scale.float()[:, None]).double()
    return spread(ratio, exponent, q).round().clamp(-q, q).to(torch.int16)


def from_codes(
    codes: Int[Tensor, "groups of"], scale: Float[Tensor, " groups"], exponent: float, q: int
) -> Float[Tensor, "groups of"]:
    """w' in float32."""
    return levels(exponent, q).to(scale.device)[codes.long() + q] * scale.float()[:, None]


def scale_of(groups: Float[Tensor, "groups of"], bits: int) -> Float[Tensor, " groups"]:
    """s of each group, as it is stored; 1 where all weights are 0."""
    return grid.scale_and_zero(*grid.extent(groups, True), Grid(bits, True))[0]


def least_error(groups: Float[Tensor, "groups of"], scale: Float[Tensor, " groups"], q: int) -> float:
    """a* = argmin_a |W - W'|^2 within [0.2, 1.2], to 1e-3: the best of a coarse scan, then golden section.

    At most `SAMPLE` weights, evenly spaced, are looked at. Ties go to the exponent nearer to 1.2.
    """
    every = -(-groups.numel() // SAMPLE)
    values = groups.reshape(-1)[::every].float()[:, None]
    scales = scale[:, None].expand(groups.shape).reshape(-1)[::every].float()

    def error(exponent: float) -> float:
        rounded = from_codes(to_codes(values, scales, exponent, q), scales, exponent, q)
        return float((values - rounded).double().square().sum())

    steps = round((HIGHEST - LOWEST) / STEP)
    coarse = min((HIGHEST - STEP * step for step in range(steps + 1)), key=error)
    return golden(error, max(coarse - STEP, LOWEST), min(coarse + STEP, HIGHEST), CLOSE)


def golden(error: Callable[[float], float], low: float, high: float, close: float) -> float:
    """Where a function with one minimum between low and high is least, to `close`: golden section.

    The best point that was looked at is returned, so a function with several minima does no harm.
    """
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    found = {x: error(x) for x in (low, high, *inner)}
    while high - low > close:
        if found[inner[0]] <= found[inner[1]]:
            high, inner = inner[1], [inner[1] - GOLDEN * (inner[1] - low), inner[0]]
        else:
            low, inner = inner[0], [inner[1], inner[0] + GOLDEN * (high - inner[0])]
        found.update({x: error(x) for x in inner if x not in found})
    return min(found, key=found.__getitem__)


@dataclass(frozen=True)
class Power:
    """Codes on a power grid: weight = q s phi_1/a(n / q), group by group.

    codes: n + q, packed, see `grid.pack`. scale: s, `rows groups`, float16 or float32. exponent: a, one for
    the weight. shape, dtype: of the weight. group: as in `core.grid`.
    """

    codes: UInt8[Tensor, " bytes"]
    scale: Float[Tensor, "rows groups"]
    exponent: Float[Tensor, ""]
    bits_per_code: int
    shape: tuple[int, ...]
    group: int = grid.PER_TENSOR
    dtype: str = "float32"

    def __post_init__(self) -> None:
        Grid(self.bits_per_code, True, self.group)
        check_shape(self.shape, math.prod(self.shape), "codes")
        check_bytes(self.codes, math.prod(self.shape), self.bits_per_code)
        fits = self.scale.is_floating_point() and self.scale.shape == layout(self.shape, self.group)
        if not fits or self.dtype not in DTYPES:
            raise ValueError(f"scales {tuple(self.scale.shape)} of {self.dtype} do not fit {self.shape}")
        check_exponent(self.exponent)

    @classmethod
    def of(
        cls,
        codes: Int[Tensor, "groups of"],
        scale: Float[Tensor, " groups"],
        exponent: float,
        like: Tensor,
        bits: int,
        group: int,
    ) -> Power:
        """From the codes -q to q and the scales of the groups of the weight `like`."""
        return cls(
            codes=grid.pack((codes + most(bits)).to(torch.uint8), bits),
            scale=scale.reshape(layout(tuple(like.shape), group)),
            exponent=torch.tensor(exponent, dtype=torch.float32, device=like.device),
            bits_per_code=bits,
            shape=tuple(like.shape),
            group=group,
            dtype=dtype_name(like),
        )

    @classmethod
    def nearest(
        cls,
        weight: Float[Tensor, "out ..."],
        bits: int,
        group: int = grid.PER_TENSOR,
        exponent: float | None = None,
        layer: str = "weight",
    ) -> Power:
        """The weight on the grid of its own range; exponent None: that of least error.

        Raises `DoesNotFit`, naming `layer`, where the group does not divide a row.
        """
        groups = grid.in_groups(weight, group, layer)
        scale = scale_of(groups, bits)
        a = float32(least_error(groups, scale, most(bits)) if exponent is None else exponent)
        return cls.of(to_codes(groups, scale, a, most(bits)), scale, a, weight, bits, group)

    @property
    def q(self) -> int:
        """The largest code."""
        return most(self.bits_per_code)

    def integers(self) -> Int16[Tensor, "*shape"]:
        """The codes n, -q to q, in the shape of the weight."""
        codes = grid.unpack(self.codes, self.bits_per_code, math.prod(self.shape))
        return codes.reshape(self.shape).to(torch.int16) - self.q

    def decode(self) -> Tensor:
        """q s phi_1/a(n / q), in the dtype of the weight."""
        groups = grid.in_groups(self.integers(), self.group)
        values = from_codes(groups, self.scale.reshape(-1), float(self.exponent), self.q)
        return values.reshape(self.shape).to(DTYPES[self.dtype])

    def bits(self) -> int:
        """Bits of codes, scales and exponent as they lie in the file."""
        return stored(self.codes, self.scale, self.exponent)

    def project(self, weight: Tensor) -> Power:
        """The nearest codes with the same scales and exponent; nearest in the domain of the codes."""
        groups = grid.in_groups(weight, self.group)
        codes = to_codes(groups, self.scale.reshape(-1), float(self.exponent), self.q)
        return replace(self, codes=grid.pack((codes + self.q).to(torch.uint8), self.bits_per_code))

    def cell(self) -> tuple[Tensor, Tensor]:
        """Lower and upper corner (float64) of all weights that round to these codes; infinite past a clipped
        end.

        The ratio w / s is rounded to float32: the corners are `DIVISION` wider than the exact cell,
        relatively.
        """
        codes = grid.in_groups(self.integers(), self.group).double()
        scale, a = self.scale.double().reshape(-1, 1), float(self.exponent)

        def corner(at: Tensor) -> Tensor:
            return spread(at, 1 / a, self.q) * scale

        lower, upper = corner(codes - 0.5), corner(codes + 0.5)
        lower = torch.where(codes <= -self.q, -torch.inf, lower - lower.abs() * DIVISION)
        upper = torch.where(codes >= self.q, torch.inf, upper + upper.abs() * DIVISION)
        return lower.reshape(self.shape), upper.reshape(self.shape)

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


@dataclass(frozen=True)
class PowerRounding:
    """The input of a layer on a fixed power grid: codes of b bits, -q to q, or 0 to 2^b - 1 if not signed.

    scale: s, the largest level over the largest code. exponent: a, that of the layer's weight, so that codes
    of weights and inputs multiply (see `nn.power_integer`). bits: 2 to 8.
    """

    scale: Float[Tensor, ""]
    exponent: Float[Tensor, ""]
    bits: int = 8
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not bool(self.scale > 0):
            raise ValueError(f"need 2 <= bits <= 8 and scale > 0, got {self.bits} and {self.scale}")
        check_exponent(self.exponent)

    @classmethod
    def of(cls, lo: float, hi: float, exponent: float, bits: int = 8) -> PowerRounding:
        """For inputs seen between lo and hi; not signed where lo >= 0."""
        largest, signed = max(abs(lo), abs(hi)), lo < 0
        q = most(bits) if signed else 2**bits - 1
        scale = torch.tensor(largest / q if largest > 0 else 1.0)
        return cls(scale, torch.tensor(exponent, dtype=torch.float32), bits, signed)

    @property
    def q(self) -> int:
        """The largest code."""
        return most(self.bits) if self.signed else 2**self.bits - 1

    def integers(self, x: Float[Tensor, "*shape"]) -> Int16[Tensor, "*shape"]:
        """The codes of x; its rounding is q s phi_1/a(n / q)."""
        ratio = x / self.scale.to(x)
        low = -self.q if self.signed else 0
        ratio = ratio.clamp(low, self.q)  # before the power: it may overflow
        return spread(ratio, float(self.exponent), self.q).round().to(torch.int16)

    def module(self) -> nn.Module:
        """The rounding as a layer."""
        return PowerStatic(self)


class PowerStatic(nn.Module):
    """Rounds to a fixed power grid. Gradients pass straight through inside the range and are 0 outside.

    Both signs are rounded apart, Q(x) = R(max(x, 0)) - R(max(-x, 0)) with R monotone, so that the interval
    rules of `verification/` give exactly [Q(l), Q(u)], widened by what floating point may add.
    """

    def __init__(self, rounding: PowerRounding) -> None:
        super().__init__()
        self.exponent, self.q, self.signed = float(rounding.exponent), rounding.q, rounding.signed
        self.register_buffer("scale", rounding.scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid."""
        rounded = self.positive(torch.relu(x))
        top = self.scale * self.q
        if self.signed:
            rounded = rounded - self.positive(torch.relu(-x))
        inside = torch.minimum(torch.maximum(x, -top if self.signed else 0 * top), top)
        return rounded.detach() + (inside - inside.detach())  # the second term is 0: a gradient alone

    def positive(self, x: Tensor) -> Tensor:
        """R: x >= 0 on the grid."""
        q, a = self.q, self.exponent
        codes = ((x / self.scale).clamp(max=q).pow(a) * q ** (1 - a)).round()
        return codes.pow(1 / a) * q ** (1 - 1 / a) * self.scale


def check_exponent(exponent: Tensor) -> None:
    """Raises ValueError unless this is one positive finite number."""
    good = exponent.shape == () and exponent.is_floating_point() and exponent.isfinite() and exponent > 0
    if not bool(good):
        raise ValueError(f"an exponent is one positive number, not {exponent}")


def float32(value: float) -> float:
    """The number as it is stored."""
    return float(torch.tensor(value, dtype=torch.float32))
