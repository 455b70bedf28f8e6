"""Uniform grids for weights: ranges, codes, decoding, and codes packed into bytes.

A weight `out in *kernel` is cut into GROUPS that share one scale and zero:

    group = -1  one for the tensor,    0  one per output row,    g > 0  one per g consecutive inputs of a row,

with inputs and kernel positions flattened as they lie in memory. In each group, b bits (Nagel et al., "A
White Paper on Neural Network Quantization", 2021, arXiv:2106.08295, section 2):

    symmetric    s = c / (2^(b-1) - 1),       z = 2^(b-1),           codes 1 .. 2^b - 1
    asymmetric   s = (hi - lo) / (2^b - 1),   z = round(-lo / s),    codes 0 .. 2^b - 1,      lo <= 0 <= hi
    code = clip(round(w / s) + z),            decoded = (code - z) s.

Rounding is half to even. Scales are kept in float16 where that is a normal number: then (code - z) s has at
most 19 significant bits and is exact in float32, whatever the order of operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from netweight.core.errors import DoesNotFit

PER_TENSOR, PER_ROW = -1, 0
TINY, HUGE = 2.0**-14, 65504.0  # the normal range of float16


@dataclass(frozen=True)
class Grid:
    """bits: 2 to 8. symmetric: no zero point. group: see the module's head."""

    bits: int = 4
    symmetric: bool = False
    group: int = PER_ROW

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"need 2 <= bits <= 8, got bits={self.bits}")
        if self.group < PER_TENSOR:
            raise ValueError(
                f"need group >= -1 (-1 tensor, 0 row, else inputs per group), got group={self.group}"
            )

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return (1 if self.symmetric else 0), 2**self.bits - 1


def in_groups(
    weight: Shaped[Tensor, "out ..."], group: int, layer: str = "weight"
) -> Shaped[Tensor, "groups of"]:
    """One row for each group; raises `DoesNotFit` where `group` does not divide a row."""
    if group == PER_TENSOR:
        return weight.reshape(1, -1)
    rows = weight.reshape(len(weight), -1)
    if group == PER_ROW:
        return rows
    if rows.shape[1] % group:
        raise DoesNotFit(f"{layer}: rows of {rows.shape[1]} weights are not a multiple of group={group}")
    return rows.reshape(-1, group)


def extent(groups: Float[Tensor, "groups of"], symmetric: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group; 0 is always inside, symmetric ones are mirrored."""
    if symmetric:
        c = groups.abs().amax(1)
        return -c, c
    return groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)


def scale_and_zero(
    lo: Float[Tensor, " groups"], hi: Float[Tensor, " groups"], grid: Grid
) -> tuple[Tensor, Tensor]:
    """s (float16 where exact products allow it, else float32) and z (uint8) of each group; 1 where a group
    is all zero."""
    steps = 2 ** (grid.bits - 1) - 1 if grid.symmetric else 2**grid.bits - 1
    scale = (hi if grid.symmetric else hi - lo).float() / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = storable(scale)
    if grid.symmetric:
        return scale, torch.full_like(scale, 2 ** (grid.bits - 1), dtype=torch.uint8)
    zero = (-lo.float() / scale.float()).round().clamp(*map(float, grid.levels))
    return scale, zero.to(torch.uint8)


def storable(scale: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """The scales in float16 if all are normal numbers there, else in float32."""
    fits = bool(((scale >= TINY) & (scale <= HUGE)).all())
    return scale.half() if fits else scale.float()


def to_codes(
    groups: Float[Tensor, "groups of"], scale: Tensor, zero: Tensor, grid: Grid
) -> UInt8[Tensor, "groups of"]:
    """The nearest code of each weight, half to even."""
    codes = (groups.float() / scale.float()[:, None]).round() + zero.float()[:, None]
    return codes.clamp(*map(float, grid.levels)).to(torch.uint8)


def from_codes(codes: UInt8[Tensor, "groups of"], scale: Tensor, zero: Tensor) -> Float[Tensor, "groups of"]:
    """(code - z) s in float32."""
    return (codes.float() - zero.float()[:, None]) * scale.float()[:, None]


def nearest(weight: Float[Tensor, "out ..."], grid: Grid) -> Float[Tensor, out * rest]:
    """The weight rounded to the grid of its own range: what round-to-nearest does to it."""
    groups = in_groups(weight, grid.group)
    scale, zero = scale_and_zero(*extent(groups, grid.symmetric), grid)
    return from_codes(to_codes(groups, scale, zero, grid), scale, zero).reshape(weight.shape).to(weight.dtype)


def pack(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Codes of 1 to 8 bits one after the other, little-endian; what is left of the last byte is 0."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    eights = torch.zeros(-(-flat.numel() // 8), 8, dtype=torch.uint8, device=flat.device)
    eights.view(-1)[: flat.numel()] = flat
    word = torch.zeros(len(eights), dtype=torch.int64, device=flat.device)
    for place in range(8):
        word |= eights[:, place].to(torch.int64) << (bits * place)
    whole = torch.stack([(word >> (8 * byte)) & 255 for byte in range(bits)], 1).to(torch.uint8)
    return whole.reshape(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> UInt8[Tensor, " count"]:
    """The first `count` codes of `pack`."""
    if bits == 8:
        return packed[:count]
    if (
        8 % bits == 0
    ):  # whole codes in every byte: several times as fast, and the runtime decodes on each call
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count]
    words = -(-len(packed) // bits)
    whole = torch.zeros(words * bits, dtype=torch.uint8, device=packed.device)
    whole[: len(packed)] = packed
    word = torch.zeros(words, dtype=torch.int64, device=packed.device)
    for byte, values in enumerate(whole.reshape(-1, bits).unbind(1)):
        word |= values.to(torch.int64) << (8 * byte)
    codes = torch.stack([(word >> (bits * place)) & (2**bits - 1) for place in range(8)], 1)
    return codes.to(torch.uint8).reshape(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `pack` makes of `count` codes."""
    return -(-count * bits // 8)
