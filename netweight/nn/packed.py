"""Stored forms of one weight: `Affine` (codes on a uniform grid), `Dense`, `NM` and `Sparse`.

Each is a frozen dataclass that meets `core.compressed.Packed`: `decode()` is the weight that the layer
computes with, `bits()` counts what is stored, `project()` finds the nearest weight of the same form,
`layer()` runs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from netweight.core import grid
from netweight.core.grid import Grid
from netweight.nn.layers import PackedLayer

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
DIVISION = 2.0**-22  # twice the relative error of a float32 division of a weight rounded to float32


def dtype_name(weight: Tensor) -> str:
    """The name under which a form keeps the dtype of its weight."""
    return str(weight.dtype).removeprefix("torch.")


def stored(*tensors: Tensor | None) -> int:
    """Bits that these tensors take."""
    return sum(8 * t.numel() * t.element_size() for t in tensors if t is not None)


def check_shape(shape: tuple[int, ...], values: int, what: str) -> None:
    """Raises ValueError unless `shape` is a sane shape of that many values (a file may say anything)."""
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape) or math.prod(shape) != values:
        raise ValueError(f"{what} do not fit the shape {shape}")


def check_bytes(packed: Tensor, codes: int, bits: int) -> None:
    """Raises ValueError unless these are the bytes of that many codes."""
    if packed.dtype != torch.uint8 or packed.shape != (grid.packed_bytes(codes, bits),):
        raise ValueError(
            f"{packed.numel()} values of {packed.dtype} do not hold {codes} codes of {bits} bits"
        )


@dataclass(frozen=True)
class Affine:
    """Codes on a uniform grid: weight = (code - zero) * scale, group by group (see `core.grid`).

    codes: packed, see `grid.pack`. scale: `rows groups`, float16 or float32. zero: `rows groups` codes,
    packed, or None for a symmetric grid. shape, dtype: of the weight. group: as in `core.grid`.
    """

    codes: UInt8[Tensor, " bytes"]
    scale: Float[Tensor, "rows groups"]
    zero: UInt8[Tensor, " zero_bytes"] | None
    bits_per_code: int
    shape: tuple[int, ...]
    group: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_shape(self.shape, math.prod(self.shape), "codes")
        check_bytes(self.codes, math.prod(self.shape), self.grid.bits)
        if self.zero is not None:
            check_bytes(self.zero, self.scale.numel(), self.grid.bits)
        fits = self.scale.is_floating_point() and self.scale.shape == layout(self.shape, self.group)
        if not fits or self.dtype not in DTYPES:
            raise ValueError(f"scales {tuple(self.scale.shape)} of {self.dtype} do not fit {self.shape}")

    @classmethod
    def of(
        cls, codes: UInt8[Tensor, "groups of"], scale: Tensor, zero: Tensor, like: Tensor, grid_: Grid
    ) -> Affine:
        """From the codes, scales and zeros that `core.grid` makes of the groups of the weight `like`."""
        rows, groups = layout(tuple(like.shape), grid_.group)
        return cls(
            codes=grid.pack(codes, grid_.bits),
            scale=scale.reshape(rows, groups),
            zero=None if grid_.symmetric else grid.pack(zero, grid_.bits),
            bits_per_code=grid_.bits,
            shape=tuple(like.shape),
            group=grid_.group,
            dtype=dtype_name(like),
        )

    @classmethod
    def nearest(cls, weight: Float[Tensor, "out ..."], grid_: Grid, layer: str = "weight") -> Affine:
        """The weight rounded to the grid of its own range; `layer` names it where the group does not fit."""
        groups = grid.in_groups(weight, grid_.group, layer)
        scale, zero = grid.scale_and_zero(*grid.extent(groups, grid_.symmetric), grid_)
        return cls.of(grid.to_codes(groups, scale, zero, grid_), scale, zero, weight, grid_)

    @property
    def grid(self) -> Grid:
        """The grid that the codes lie on."""
        return Grid(self.bits_per_code, self.zero is None, self.group)

    def integers(self) -> UInt8[Tensor, "*shape"]:
        """The codes, one byte each, in the shape of the weight."""
        return grid.unpack(self.codes, self.bits_per_code, math.prod(self.shape)).reshape(self.shape)

    def zeros(self) -> UInt8[Tensor, "rows groups"]:
        """The zero point of each group, also for a symmetric grid."""
        if self.zero is None:
            return torch.full_like(self.scale, 2 ** (self.bits_per_code - 1), dtype=torch.uint8)
        return grid.unpack(self.zero, self.bits_per_code, self.scale.numel()).reshape(self.scale.shape)

    def decode(self) -> Tensor:
        """(code - zero) * scale, in the dtype of the weight."""
        groups = grid.in_groups(self.integers(), self.group)
        values = grid.from_codes(groups, self.scale.reshape(-1), self.zeros().reshape(-1))
        return values.reshape(self.shape).to(DTYPES[self.dtype])

    def bits(self) -> int:
        """Bits of codes, scales and zeros as they lie in the file."""
        return stored(self.codes, self.scale, self.zero)

    def project(self, weight: Tensor) -> Affine:
        """The nearest codes with the same scales and zeros."""
        groups = grid.in_groups(weight, self.group)
        codes = grid.to_codes(groups, self.scale.reshape(-1), self.zeros().reshape(-1), self.grid)
        return replace(self, codes=grid.pack(codes, self.bits_per_code))

    def cell(self) -> tuple[Tensor, Tensor]:
        """Lower and upper corner (float64) of all weights that round to these codes; infinite past a clipped
        end.

        `grid.to_codes` divides in float32: the corners are `DIVISION` wider than the exact cell, relatively.
        """
        codes = grid.in_groups(self.integers(), self.group).double()
        scale, zero = self.scale.double().reshape(-1, 1), self.zeros().double().reshape(-1, 1)
        first, last = self.grid.levels
        lower, upper = (codes - zero - 0.5) * scale, (codes - zero + 0.5) * scale
        lower = torch.where(codes <= first, -torch.inf, lower - lower.abs() * DIVISION)
        upper = torch.where(codes >= last, torch.inf, upper + upper.abs() * DIVISION)
        return lower.reshape(self.shape), upper.reshape(self.shape)

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


@dataclass(frozen=True)
class Dense:
    """Every value as it is, in its own dtype (float16 stores half of float32)."""

    values: Tensor
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")

    def decode(self) -> Tensor:
        """The values in the dtype of the weight."""
        return self.values.to(DTYPES[self.dtype])

    def bits(self) -> int:
        """Bits of the values."""
        return stored(self.values)

    def project(self, weight: Tensor) -> Dense:
        """The weight in the stored dtype."""
        return replace(self, values=weight.to(self.values.dtype))

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


@dataclass(frozen=True)
class NM:
    """Of every `each` consecutive inputs the kept values and their places (ascending).

    values: `group keep`. packed_places: 0 to each - 1 in ceil(log2 each) bits, see `grid.pack`. Groups run
    along the inputs (axis 1), at one output and one kernel position.
    """

    values: Float[Tensor, "group keep"]
    packed_places: UInt8[Tensor, " bytes"]
    each: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_shape(self.shape, len(self.values) * self.each, "groups")
        if self.values.ndim != 2 or len(self.shape) < 2 or self.shape[1] % self.each:
            raise ValueError(f"groups of {self.each} inputs do not fit the shape {self.shape}")
        check_bytes(self.packed_places, self.values.numel(), place_bits(self.each))
        places = self.places.int()
        if places.numel() and (int(places.max()) >= self.each or not (places.diff(dim=1) > 0).all()):
            raise ValueError(f"places are not ascending numbers below {self.each}")

    @classmethod
    def of(cls, values: Tensor, places: UInt8[Tensor, "group keep"], each: int, shape: tuple[int, ...]) -> NM:
        """From the kept values and their places in each group."""
        return cls(values, grid.pack(places, place_bits(each)), each, shape)

    @property
    def places(self) -> UInt8[Tensor, "group keep"]:
        """Where the values stand in their groups."""
        places = grid.unpack(self.packed_places, place_bits(self.each), self.values.numel())
        return places.reshape(self.values.shape)

    def decode(self) -> Tensor:
        """Kept values at their places, zeros elsewhere."""
        rows = torch.zeros(len(self.values), self.each, dtype=self.values.dtype, device=self.values.device)
        rows.scatter_(1, self.places.long(), self.values)
        moved = (self.shape[0], *self.shape[2:], self.shape[1])
        return rows.reshape(moved).movedim(-1, 1).contiguous()

    def bits(self) -> int:
        """Bits of the kept values and of their places."""
        return stored(self.values, self.packed_places)

    def project(self, weight: Tensor) -> NM:
        """The weight's values at the same places."""
        groups = weight.movedim(1, -1).reshape(-1, self.each)
        return replace(self, values=groups.gather(1, self.places.long()).to(self.values.dtype))

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


@dataclass(frozen=True)
class Sparse:
    """Kept values in memory order and a bit mask of where they stand (1: kept).

    values: `kept`. mask: packed bits, see `grid.pack`.
    """

    values: Float[Tensor, " kept"]
    mask: UInt8[Tensor, " bytes"]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        count = math.prod(self.shape)
        check_shape(self.shape, count, "mask bits")
        check_bytes(self.mask, count, 1)
        if self.values.ndim != 1 or int(self.kept().sum()) != len(self.values):
            raise ValueError(f"the mask does not hold {len(self.values)} values of {self.shape}")

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor) -> Sparse:
        """The weight where `keep` (bool, same shape) is True."""
        return cls(weight[keep], grid.pack(keep.to(torch.uint8), 1), tuple(weight.shape))

    def kept(self) -> Tensor:
        """The mask as bool in the shape of the weight."""
        return grid.unpack(self.mask, 1, math.prod(self.shape)).bool().reshape(self.shape)

    def decode(self) -> Tensor:
        """Kept values in place, zeros elsewhere."""
        weight = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        weight[self.kept()] = self.values
        return weight

    def bits(self) -> int:
        """Kept values and one mask bit a weight."""
        return stored(self.values, self.mask)

    def project(self, weight: Tensor) -> Sparse:
        """The weight under the same mask."""
        return replace(self, values=weight[self.kept()].to(self.values.dtype))

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


def place_bits(each: int) -> int:
    """Bits of a place in a group of `each` inputs."""
    return max(each - 1, 1).bit_length()


def layout(shape: tuple[int, ...], group: int) -> tuple[int, int]:
    """Rows, and groups per row, of a weight of that shape; raises ValueError where they do not fit."""
    if group == grid.PER_TENSOR:
        return 1, 1
    row = math.prod(shape[1:])
    if group == grid.PER_ROW:
        return shape[0], 1
    if row % group:
        raise ValueError(f"groups of {group} do not fit rows of {row} weights")
    return shape[0], row // group
