"""`Buckets`: weights cut into runs of equal length, each scaled to [0, 1] and put on levels that all share.

    beta_b = min of bucket b,   alpha_b = max - min (1 if that is below 1e-10),   u = (w - beta_b) / alpha_b
    uniform     w' = alpha_b round(u (S - 1)) / (S - 1) + beta_b,                      S = 2^bits
    points      w' = alpha_b p_a + beta_b,      a the place of the point nearest to u,      p_1 <= .. <= p_k

(Polino et al., "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668, sections
2 and 4.) A bucket is `bucket` weights as they lie in memory, the last one shorter; 0 is the whole tensor.
Buckets cross rows, their least value is any number: hence no `Affine`. Rounding is half to even; alpha and
beta are float32, values are computed in float64 and rounded once.

`InBuckets` and `OnPoints` are what one trains with; both decode to what they pack, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from netweight.core import grid, huffman
from netweight.core.errors import BadInput, unknown
from netweight.nn.codebook import LARGEST, nearest
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import DTYPES, check_bytes, check_shape, dtype_name, place_bits, stored
from netweight.nn.quantizer import straight

POINT = 1e-10  # a bucket that is no wider holds one value
BACKWARD = ("straight", "truncated", "exact")


@dataclass(frozen=True)
class Buckets:
    """Codes of all weights, the width and the least value of each bucket, and the points they share.

    codes: packed, see `grid.pack`. points: ascending, of [0, 1] unless they were trained out of it; None for
    the uniform k / (2^bits - 1). bucket: weights of a bucket, 0 for all. shape, dtype: of the weight.
    """

    codes: UInt8[Tensor, " bytes"]
    width: Float[Tensor, " buckets"]
    least: Float[Tensor, " buckets"]
    points: Float[Tensor, " entries"] | None
    bits_per_code: int
    bucket: int
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        count = math.prod(self.shape)
        check_shape(self.shape, count, "codes")
        if self.dtype not in DTYPES or self.bucket < 0 or not 1 <= self.bits_per_code <= 8:
            raise ValueError(f"no such buckets: {self.dtype}, {self.bucket} of {self.bits_per_code} bits")
        check_bytes(self.codes, count, self.bits_per_code)
        runs = (-(-count // (self.bucket or count)),)
        if self.width.shape != runs or self.least.shape != runs:
            raise ValueError(
                f"{len(self.width)} widths and {len(self.least)} least values for {runs[0]} runs"
            )
        if not (self.width.isfinite().all() and self.least.isfinite().all() and (self.width > 0).all()):
            raise ValueError("a bucket has no finite least value or no positive width")
        if self.points is not None:
            self._check_points(self.points)

    def _check_points(self, points: Tensor) -> None:
        fits = points.ndim == 1 and 2 <= len(points) <= LARGEST and bool(points.isfinite().all())
        if not fits or place_bits(len(points)) != self.bits_per_code or bool((points.diff() < 0).any()):
            raise ValueError("points are two or more finite, ascending numbers, as many as the codes need")
        if len(points) < 2**self.bits_per_code and int(self.integers().max()) >= len(points):
            raise ValueError(f"a code lies past the {len(points)} points")

    @classmethod
    def nearest(
        cls, weight: Float[Tensor, "out ..."], bits: int, bucket: int, points: Tensor | None = None
    ) -> Buckets:
        """The weight on the levels of its own buckets; with points, `bits` is what these need."""
        u, width, least = scaled(weight, bucket)
        bits = bits if points is None else place_bits(len(points))
        codes = places(u, bits, points)
        return cls(
            codes=grid.pack(codes.to(torch.uint8), bits),
            width=width,
            least=least,
            points=None if points is None else points.detach().float().clone(),
            bits_per_code=bits,
            bucket=bucket,
            shape=tuple(weight.shape),
            dtype=dtype_name(weight),
        )

    def integers(self) -> UInt8[Tensor, " weights"]:
        """The codes, one byte each, as the weights lie in memory."""
        return grid.unpack(self.codes, self.bits_per_code, math.prod(self.shape))

    def decode(self) -> Tensor:
        """alpha p + beta, in the dtype of the weight."""
        codes = self.integers().long()
        values = on_levels(codes, self.width, self.least, self.bits_per_code, self.points, self.bucket)
        return values.to(DTYPES[self.dtype]).reshape(self.shape)

    def bits(self) -> int:
        """Bits of codes, widths, least values and points as they lie in the file."""
        return stored(self.codes, self.width, self.least, self.points)

    def huffman_bits(self) -> int:
        """The same if the codes were Huffman coded (their table of code lengths is not counted)."""
        counts = self.integers().long().bincount(minlength=2**self.bits_per_code).tolist()
        return huffman.total_bits(counts) + stored(self.width, self.least, self.points)

    def project(self, weight: Tensor) -> Buckets:
        """The nearest codes with the same buckets and points."""
        w = weight.detach().reshape(-1).double()
        u = (w - along(self.least, len(w), self.bucket)) / along(self.width, len(w), self.bucket)
        codes = places(u, self.bits_per_code, self.points)
        return replace(self, codes=grid.pack(codes.to(torch.uint8), self.bits_per_code))

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


# The equations -------------------------------------------------------------------------------------------


def in_buckets(weight: Float[Tensor, ...], bucket: int) -> Float[Tensor, "buckets of"]:
    """One row for each bucket; the last is filled up with the last value, which moves no end of it."""
    flat = weight.reshape(-1)
    size = min(bucket or flat.numel(), flat.numel())
    missing = -flat.numel() % size
    return (
        torch.cat([flat, flat[-1:].expand(missing)]).reshape(-1, size) if missing else flat.reshape(-1, size)
    )


def scaled(weight: Float[Tensor, ...], bucket: int) -> tuple[Tensor, Tensor, Tensor]:
    """(u, alpha, beta): every weight within its bucket (float64, flat), width and least value of each."""
    w = weight.detach()
    rows = in_buckets(w.float(), bucket)
    least = rows.amin(1)
    width = rows.amax(1) - least
    width = torch.where(width < POINT, torch.ones_like(width), width)
    count = w.numel()
    u = (w.reshape(-1).double() - along(least, count, bucket)) / along(width, count, bucket)
    return u, width, least


def places(u: Float[Tensor, " weights"], bits: int, points: Tensor | None) -> Int64[Tensor, " weights"]:
    """The level of each scaled weight: of 2^bits equally far apart, or the nearest of the points."""
    if points is not None:
        return nearest(u, points.detach())
    top = 2**bits - 1
    return (u * top).round().clamp(0, top).long()


def drawn(u: Float[Tensor, " weights"], bits: int) -> Int64[Tensor, " weights"]:
    """The level below or the one above, at random, so that the mean over draws is u (torch's own chance)."""
    top = 2**bits - 1
    below = (u * top).clamp(0, top)
    return (below.floor() + (torch.rand_like(u) < below.frac())).long()


def on_levels(
    codes: Int64[Tensor, " weights"],
    width: Tensor,
    least: Tensor,
    bits: int,
    points: Tensor | None,
    bucket: int,
) -> Float[Tensor, " weights"]:
    """alpha p + beta of each code, float64; gradients reach the points."""
    p = codes.double() / (2**bits - 1) if points is None else points.double()[codes]
    return along(width, len(codes), bucket) * p + along(least, len(codes), bucket)


def along(each: Float[Tensor, " buckets"], count: int, bucket: int) -> Float[Tensor, " weights"]:
    """What a bucket has, at every weight of it, float64."""
    return each.double().repeat_interleave(bucket or count)[:count]


# What one trains with ------------------------------------------------------------------------------------


class InBuckets(nn.Module):
    """Rounds to 2^bits equal levels of each bucket; the gradient arrives at the weight

    straight     as it is
    truncated    where |w| <= 1; the weight counts as clamped to [-1, 1]
    exact        and through alpha as well: that of alpha (u + (q - u)) + beta, q - u held fixed

    stochastic: while it trains, the level below or above at random (see `drawn`).
    """

    def __init__(self, bits: int, bucket: int, backward: str = "straight", stochastic: bool = False) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise BadInput(f"bits={bits}: a weight takes from 1 to 8 bits here")
        if bucket < 0:
            raise BadInput(f"bucket={bucket}: give the weights of a bucket, or 0 for the whole tensor")
        if backward not in BACKWARD:
            raise unknown("backward pass", backward, BACKWARD)
        self.bits, self.bucket, self.backward, self.stochastic = bits, bucket, backward, stochastic

    def forward(self, w: Tensor) -> Tensor:
        """w on the levels."""
        w = self._seen(w)
        u, width, least = scaled(w, self.bucket)
        draws = self.stochastic and self.training
        codes = drawn(u, self.bits) if draws else places(u, self.bits, None)
        value = on_levels(codes, width, least, self.bits, None, self.bucket).to(w.dtype).reshape(w.shape)
        if self.backward != "exact":
            return straight(w, value)
        moved = (codes.double() / (2**self.bits - 1) - u).to(w.dtype).reshape(w.shape)
        return straight(w + moved * self._width(w), value)

    def stored(self, w: Tensor) -> Buckets:
        """The rounded weight as it is stored."""
        return Buckets.nearest(self._seen(w), self.bits, self.bucket)

    def _seen(self, w: Tensor) -> Tensor:
        return w.clamp(-1, 1) if self.backward == "truncated" else w

    def _width(self, w: Tensor) -> Tensor:
        """alpha at every weight, with its gradient to the largest and the least of the bucket."""
        rows = in_buckets(w, self.bucket)
        found = rows.detach()
        most, least = found.argmax(1, keepdim=True), found.argmin(1, keepdim=True)
        width = rows.gather(1, most) - rows.gather(1, least)
        return width.expand_as(rows).reshape(-1)[: w.numel()].reshape(w.shape)


class OnPoints(nn.Module):
    """Puts a weight that stays as it is on points that are learnt.

    dL/dp_j = sum over a(i) = j of alpha dL/dw'_i. points: as many as given, first at the quantiles of the
    weight scaled in its buckets, or equally far apart. They have to be put in order (`sort`) whenever the
    optimizer has moved them.
    """

    def __init__(self, weight: Tensor, points: int, bucket: int, quantiles: bool = True) -> None:
        super().__init__()
        if not 2 <= points <= LARGEST:
            raise BadInput(f"points={points}: a tensor takes from 2 to {LARGEST} points")
        if bucket < 0:
            raise BadInput(f"bucket={bucket}: give the weights of a bucket, or 0 for the whole tensor")
        at = torch.linspace(0, 1, points, dtype=torch.float64, device=weight.device)
        first = at_share(scaled(weight, bucket)[0], at) if quantiles else at
        self.points, self.bucket = nn.Parameter(first.float()), bucket

    def forward(self, w: Tensor) -> Tensor:
        """w on the points; gradients reach the points and not w."""
        u, width, least = scaled(w, self.bucket)
        codes = nearest(u, self.points.detach())
        value = on_levels(codes, width, least, 0, self.points, self.bucket)
        return value.to(w.dtype).reshape(w.shape)

    @torch.no_grad()
    def sort(self) -> None:
        """Put the points in order."""
        self.points.copy_(self.points.sort().values)

    def stored(self, w: Tensor) -> Buckets:
        """The weight on the points as it is stored."""
        return Buckets.nearest(w, 0, self.bucket, self.points)


def at_share(values: Float[Tensor, " n"], share: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Quantiles, between two values by a straight line (torch's own take at most 16 million values)."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
