"""`Split`: a weight as a sum of affine weights, each of which holds another part of it and zeros elsewhere.

Song and Lin, "SplitQuant: Layer Splitting for Low-Bit Neural Network Quantization", 2025, arXiv:2501.12428: a
layer becomes lower(x) + middle(x) + upper(x), each with a scale and zero of its own. Stored are, for each
weight, the number of the part that holds it (five to a byte for three parts) and its code there; the zeros of
the other parts cost nothing and decode to exactly 0, as zero points are whole numbers.

    form.layer(like)          # decodes the sum and runs one layer
    opened(model)             # a copy that runs every split layer as k affine layers and a sum
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from netweight.core import compressed, grid
from netweight.core.grid import Grid
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import DTYPES, Affine, check_bytes, check_shape, dtype_name, layout, stored

MOST = 256  # parts


@dataclass(frozen=True)
class Split:
    """weight = (code - zero_c) * scale_c, c the part that holds it.

    codes: packed, see `grid.pack`. places: the parts c, see `pack_places`; empty where there is one. scale:
    `parts rows groups`, float16 or float32. zero: as many codes, packed. shape, dtype: of the weight.
    group: as in `core.grid`.
    """

    codes: UInt8[Tensor, " bytes"]
    places: UInt8[Tensor, " place_bytes"]
    scale: Float[Tensor, "parts rows groups"]
    zero: UInt8[Tensor, " zero_bytes"]
    bits_per_code: int
    shape: tuple[int, ...]
    group: int = grid.PER_TENSOR
    dtype: str = "float32"

    def __post_init__(self) -> None:
        count = math.prod(self.shape)
        check_shape(self.shape, count, "codes")
        check_bytes(self.codes, count, self.grid.bits)
        fits = self.scale.is_floating_point() and self.scale.ndim == 3 and 1 <= len(self.scale) <= MOST
        if not fits or self.scale.shape[1:] != layout(self.shape, self.group) or self.dtype not in DTYPES:
            raise ValueError(f"scales {tuple(self.scale.shape)} of {self.dtype} do not fit {self.shape}")
        check_bytes(self.zero, self.scale.numel(), self.grid.bits)
        wanted = place_bytes(count, len(self.scale))
        if self.places.dtype != torch.uint8 or self.places.shape != (wanted,):
            raise ValueError(f"{self.places.numel()} bytes do not hold the parts of {count} weights")
        if wanted and int(self.parts().max()) >= len(self.scale):
            raise ValueError(f"a weight lies in none of the {len(self.scale)} parts")

    @classmethod
    def nearest(
        cls, weight: Float[Tensor, "out ..."], parts: Tensor, count: int, grid_: Grid, layer: str = "weight"
    ) -> Split:
        """Every part rounded to the grid of its own range, which holds 0.

        parts: 0 to count - 1 in the shape of the weight. Raises ValueError for a symmetric grid, `DoesNotFit`
        where the group does not divide a row of the `layer`.
        """
        if grid_.symmetric:
            raise ValueError("parts lie on one side of 0: a symmetric grid would waste half of its codes")
        whole, member = grid.in_groups(weight, grid_.group, layer), grid.in_groups(parts, grid_.group)
        rows, groups = layout(tuple(weight.shape), grid_.group)
        values = [torch.where(member == c, whole, 0) for c in range(count)]
        scale, zero = grid.scale_and_zero(*grid.extent(torch.cat(values), False), grid_)
        scales, zeros = scale.reshape(count, -1), zero.reshape(count, -1)
        codes = torch.zeros_like(member, dtype=torch.uint8)
        for c, held in enumerate(values):
            codes = torch.where(member == c, grid.to_codes(held, scales[c], zeros[c], grid_), codes)
        return cls(
            codes=grid.pack(codes, grid_.bits),
            places=pack_places(parts, count),
            scale=scale.reshape(count, rows, groups),
            zero=grid.pack(zero, grid_.bits),
            bits_per_code=grid_.bits,
            shape=tuple(weight.shape),
            group=grid_.group,
            dtype=dtype_name(weight),
        )

    @property
    def grid(self) -> Grid:
        """The grid that the codes of each part lie on."""
        return Grid(self.bits_per_code, False, self.group)

    def integers(self) -> UInt8[Tensor, "*shape"]:
        """The codes, one byte each, in the shape of the weight."""
        return grid.unpack(self.codes, self.bits_per_code, math.prod(self.shape)).reshape(self.shape)

    def parts(self) -> UInt8[Tensor, "*shape"]:
        """The part that holds each weight, in the shape of the weight."""
        return unpack_places(self.places, len(self.scale), math.prod(self.shape)).reshape(self.shape)

    def zeros(self) -> UInt8[Tensor, "parts rows groups"]:
        """The zero point of each group of each part."""
        return grid.unpack(self.zero, self.bits_per_code, self.scale.numel()).reshape(self.scale.shape)

    def decode(self) -> Tensor:
        """The sum of the parts, in the dtype of the weight."""
        codes = grid.in_groups(self.integers(), self.group)
        member = grid.in_groups(self.parts(), self.group).long()
        scale = self.scale.float().flatten(1).T.gather(1, member)  # `group part` -> `group of`
        zero = self.zeros().float().flatten(1).T.gather(1, member)
        return ((codes.float() - zero) * scale).reshape(self.shape).to(DTYPES[self.dtype])

    def bits(self) -> int:
        """Bits of codes, parts, scales and zeros as they lie in the file."""
        return stored(self.codes, self.places, self.scale, self.zero)

    def project(self, weight: Tensor) -> Split:
        """Of all values that the scales and zeros allow, in whatever part, the nearest to each weight."""
        groups = grid.in_groups(weight, self.group)
        least = torch.full_like(groups, torch.inf, dtype=torch.float32)
        codes = torch.zeros_like(groups, dtype=torch.uint8)
        member = torch.zeros_like(codes)
        for c, (scale, zero) in enumerate(zip(self.scale.flatten(1), self.zeros().flatten(1))):
            tried = grid.to_codes(groups, scale, zero, self.grid)
            error = (groups.float() - grid.from_codes(tried, scale, zero)).abs()
            better = error < least
            least, codes = torch.where(better, error, least), torch.where(better, tried, codes)
            member = torch.where(better, c, member)
        return replace(
            self,
            codes=grid.pack(codes, self.bits_per_code),
            places=pack_places(member, len(self.scale)),
        )

    def part(self, c: int) -> Affine:
        """One part as an affine weight of its own, exactly 0 where another part holds the weight."""
        zero = self.zeros()[c]
        codes = grid.in_groups(self.integers(), self.group)
        held = grid.in_groups(self.parts(), self.group) == c
        codes = torch.where(held, codes, zero.reshape(-1, 1))
        like = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")
        return Affine.of(codes, self.scale[c].reshape(-1), zero.reshape(-1), like, self.grid)

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)


class Summed(nn.Module):
    """The sum of what several layers give for the same input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """lower(x) + middle(x) + upper(x), from the first to the last."""
        total = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            total = total + layer(x)
        return total


def summed(layer: nn.Module, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> Summed:
    """Copies of a Linear or Conv, each with one of the weights and, where there are any, of the biases."""
    copies = [copy.deepcopy(layer) for _ in weights]
    for index, one in enumerate(copies):
        one.weight = nn.Parameter(weights[index].detach().clone())
        if biases is not None:
            one.bias = nn.Parameter(biases[index].detach().clone())
    return Summed(copies)


def opened(model: nn.Module) -> nn.Module:
    """A copy in which every layer of a `Split` weight is a sum of layers of `Affine` weights.

    It is what a runtime of plain integer layers runs; outputs agree with the packed network's but for the
    order of sums. The bias stands in the first layer.
    """
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLayer) and isinstance(layer.form, Split):
            form, bare = layer.form, layer.plain()
            layers = []
            for c in range(len(form.scale)):
                like = copy.copy(bare)
                if c:
                    like._parameters = {**bare._parameters, "bias": None}
                layers.append(form.part(c).layer(like))
            compressed.replace(model, name, Summed(layers))
    return model


def pack_places(parts: Tensor, count: int) -> UInt8[Tensor, " bytes"]:
    """Numbers below `count` as digits of that base, as many to a byte as go in, the first one lowest."""
    flat, each = parts.reshape(-1).to(torch.uint8), digits(count)
    if not each:
        return torch.zeros(0, dtype=torch.uint8, device=flat.device)
    whole = torch.zeros(-(-flat.numel() // each) * each, dtype=torch.int64, device=flat.device)
    whole[: flat.numel()] = flat
    powers = count ** torch.arange(each, device=flat.device)
    return (whole.reshape(-1, each) * powers).sum(1).to(torch.uint8)


def unpack_places(packed: UInt8[Tensor, " bytes"], count: int, numbers: int) -> UInt8[Tensor, " numbers"]:
    """The first numbers of `pack_places`; a byte too large for them gives a number that is none of them."""
    each = digits(count)
    if not each:
        return torch.zeros(numbers, dtype=torch.uint8, device=packed.device)
    byte, powers = torch.arange(256, device=packed.device)[:, None], count ** torch.arange(each)
    powers = powers.to(packed.device)
    table = torch.where(byte < count**each, byte // powers % count, count).clamp(max=255)
    return table.to(torch.uint8)[packed.long()].reshape(-1)[:numbers]


def digits(count: int) -> int:
    """How many numbers below `count` go into a byte; 0 where there is nothing to tell apart."""
    return 0 if count == 1 else max(n for n in range(1, 9) if count**n <= 256)


def place_bytes(numbers: int, count: int) -> int:
    """Bytes that `pack_places` makes of so many numbers."""
    return -(-numbers // digits(count)) if digits(count) else 0
