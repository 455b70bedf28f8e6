"""`Codebook`: each weight is a place in a small table of values, times the scale of its group of rows.

    weight[order[r], j] = scale[g(r)] * table[t(g(r)), code[r, j]]

Rows lie in the file group by group, so that G - 1 row numbers say which row is in which group, and no code
does. `order` is there where the rows of the network do not lie in that order (see `core.permute`, which puts
them there). All groups share one table, or each has its own; a table is ascending.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor, nn

from netweight.core import grid
from netweight.core.line_clusters import centres
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import DTYPES, check_bytes, check_shape, dtype_name, place_bits, stored

LARGEST = 256  # entries of a table: a code has at most eight bits
POINTS = 1 << 13  # more weights than these are averaged over runs of neighbours before they are clustered
LLOYD = 100  # most passes that then move the entries to the weights themselves


@dataclass(frozen=True)
class Codebook:
    """Places in tables, packed (see `grid.pack`), with rows in stored order.

    tables: `tables entries`, one for all groups or one each. scale: of each group, or None for 1. ends: the
    first row of groups 2 to G, None for a single group. order: the weight's row that each stored row is, None
    where they agree. shape, dtype: of the weight.
    """

    codes: UInt8[Tensor, " bytes"]
    tables: Float[Tensor, "tables entries"]
    scale: Float[Tensor, " groups"] | None
    ends: Int[Tensor, " cuts"] | None
    order: Int[Tensor, " out"] | None
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        count = math.prod(self.shape)
        check_shape(self.shape, count, "codes")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        _check_tables(self.tables, self.scale, self.groups)
        check_bytes(self.codes, count, self.bits_per_code)
        entries = self.tables.shape[1]  # every code has an entry where they are a power of two
        if entries < 2**self.bits_per_code and int(self.integers().max()) >= entries:
            raise ValueError(f"a code lies past the {entries} entries of a table")
        _check_rows(self.ends, self.order, self.shape[0])

    @classmethod
    def of(
        cls,
        codes: Int64[Tensor, "out each"],
        tables: Float[Tensor, "tables entries"],
        scale: Float[Tensor, " groups"] | None,
        group_of: Int64[Tensor, " out"],
        like: Float[Tensor, "out ..."],
    ) -> Codebook:
        """From the codes and the group of each row, both in the order of the weight `like`.

        Scales are kept in float16 where that is exact enough (`grid.storable`), tables in float16 where a
        scale stands beside them or nothing is lost.
        """
        order = group_of.argsort(stable=True)
        counts = group_of.bincount(minlength=1 if scale is None else len(scale))
        sorted_already = bool((order.diff() > 0).all())
        bits = place_bits(tables.shape[1])
        half = tables.half()
        small = scale is not None or torch.equal(half.to(tables), tables)
        return cls(
            codes=grid.pack(codes[order].to(torch.uint8), bits),
            tables=half if small else tables,
            scale=None if scale is None else grid.storable(scale),
            ends=None if len(counts) == 1 else counts.cumsum(0)[:-1].to(_row_dtype(len(order))),
            order=None if sorted_already else order.to(_row_dtype(len(order))),
            shape=tuple(like.shape),
            dtype=dtype_name(like),
        )

    @classmethod
    def nearest(
        cls,
        weight: Float[Tensor, "out ..."],
        bits: int,
        group_of: Int64[Tensor, " out"] | None = None,
        *,
        own_tables: bool = False,
    ) -> Codebook:
        """k-means of W / s with 2^bits entries, s of each group (see `spreads`); one table, or one a group.

        A weight with no more distinct values than that gets them as its table, exactly, without groups, if
        that is smaller than the weight.
        """
        distinct, width = weight.unique(), 2**bits
        one = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        if len(distinct) <= width:
            codes = torch.searchsorted(distinct, weight.flatten(1).contiguous())
            exact = cls.of(codes, distinct[None], None, one, weight)
            if exact.bits() < stored(weight):
                return exact
            width = len(distinct)
        group_of = one if group_of is None else group_of
        scale = grid.storable(spreads(weight, group_of))
        units = weight.flatten(1).double() / scale.double()[group_of][:, None]
        parts = [group_of == g for g in range(len(scale))] if own_tables else [group_of >= 0]
        found = [table_of(units[rows].reshape(-1), width) for rows in parts]
        tables = torch.stack(found).half()
        codes = torch.empty_like(units, dtype=torch.int64)
        for rows, table in zip(parts, tables):
            codes[rows] = nearest(units[rows], table)
        return cls.of(codes, tables, scale, group_of, weight)

    @property
    def groups(self) -> int:
        """How many groups of rows there are."""
        return 1 if self.ends is None else len(self.ends) + 1

    @property
    def bits_per_code(self) -> int:
        """As many as the entries of a table need."""
        return place_bits(self.tables.shape[1])

    def integers(self) -> UInt8[Tensor, "out each"]:
        """The codes in stored order, one byte each."""
        codes = grid.unpack(self.codes, self.bits_per_code, math.prod(self.shape))
        return codes.reshape(self.shape[0], -1)

    def places(self) -> Int64[Tensor, "out each"]:
        """The codes with rows in the order of the network."""
        return self._in_place(self.integers().long())

    def levels(self) -> Float[Tensor, "groups entries"]:
        """The values that the weights of each group take, ascending, in the dtype of the weight."""
        dtype = DTYPES[self.dtype]
        if self.scale is None:
            return self.tables.to(dtype).expand(self.groups, -1)
        return (self.tables.float() * self.scale.float()[:, None]).to(dtype)

    def group_of(self) -> Int64[Tensor, " out"]:
        """The group of each stored row."""
        rows = torch.arange(self.shape[0], device=self.codes.device)
        if self.ends is None:
            return torch.zeros_like(rows)
        return torch.searchsorted(self.ends.long(), rows, right=True)

    def decode(self) -> Tensor:
        """The level of each code, rows in the order of the network."""
        levels, codes = self.levels(), self.integers().long()
        if self.groups == 1:
            values = levels[0][codes]
        else:
            values = levels.reshape(-1)[codes + levels.shape[1] * self.group_of()[:, None]]
        return self._in_place(values).reshape(self.shape)

    def bits(self) -> int:
        """Bits of codes, tables, scales, group ends and order as they lie in the file."""
        return stored(self.codes, self.tables, self.scale, self.ends, self.order)

    def project(self, weight: Tensor) -> Codebook:
        """The nearest level for each weight, with the same tables, scales and groups."""
        rows = self._as_stored(weight.flatten(1))
        levels = self.levels().double()
        codes = torch.empty_like(rows, dtype=torch.int64)
        for group, own in enumerate(self._rows_of_groups()):
            codes[own] = nearest(rows[own], levels[group])
        return replace(self, codes=grid.pack(codes.to(torch.uint8), self.bits_per_code))

    def cell(self) -> tuple[Tensor, Tensor]:
        """Lower and upper corner (float64) of all weights that project to these codes; infinite at the ends.

        Halfway between two levels counts to both. Exact for levels of float32 or less.
        """
        levels, codes, group = self.levels().double(), self.integers().long(), self.group_of()[:, None]
        between = (levels[:, 1:] + levels[:, :-1]) / 2
        infinite = levels.new_full((len(levels), 1), torch.inf)
        lower, upper = torch.cat([-infinite, between], 1), torch.cat([between, infinite], 1)
        return tuple(self._in_place(end[group, codes]).reshape(self.shape) for end in (lower, upper))  # type: ignore[return-value]

    def layer(self, like: nn.Module) -> nn.Module:
        """`like` with this weight."""
        return PackedLayer(like, self)

    def _rows_of_groups(self) -> list[slice]:
        inner = [] if self.ends is None else self.ends.tolist()
        edges = [0, *inner, self.shape[0]]
        return [slice(start, stop) for start, stop in zip(edges, edges[1:])]

    def _in_place(self, rows: Tensor) -> Tensor:
        """Stored rows in the order of the network."""
        if self.order is None:
            return rows
        placed = torch.empty_like(rows)
        placed[self.order.long()] = rows
        return placed

    def _as_stored(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows[self.order.long()]


def table_of(values: Float[Tensor, " n"], entries: int) -> Float[Tensor, " entries"]:
    """k-means: the ascending entries from which the values are least far, float64; the optimum up to `POINTS`
    values.

    More values are averaged over equally many neighbours, and Lloyd's iteration goes on from there until no
    value changes its entry. The largest is repeated where there are fewer distinct values.
    """
    ordered = values.double().sort().values
    each = -(-len(ordered) // POINTS)
    runs = _averaged(ordered, each)
    table = torch.from_numpy(centres(runs.cpu().numpy(), entries)).to(ordered)
    sums, before = torch.nn.functional.pad(ordered.cumsum(0), (1, 0)), None
    for _ in range(LLOYD if each > 1 else 0):
        cuts = torch.searchsorted(ordered, (table[1:] + table[:-1]) / 2, right=True)
        if before is not None and torch.equal(cuts, before):
            break
        before = cuts
        ends = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(ordered))])
        size = ends.diff()
        table = torch.where(size > 0, sums[ends].diff() / size.clamp(min=1), table)
    return table


def nearest(values: Float[Tensor, "*shape"], table: Float[Tensor, " entries"]) -> Int64[Tensor, "*shape"]:
    """The place of the nearest entry of an ascending table; halfway between two, the lower one."""
    table = table.double()
    return torch.searchsorted((table[1:] + table[:-1]) / 2, values.double().contiguous())


def spreads(weight: Float[Tensor, "out ..."], group_of: Int64[Tensor, " out"]) -> Float[Tensor, " groups"]:
    """The root mean square of the weights of each group, 1 where all are zero; float32."""
    squares = weight.double().flatten(1).square().mean(1)
    counts = group_of.bincount()
    total = torch.zeros(len(counts), dtype=torch.float64, device=weight.device).index_add(
        0, group_of, squares
    )
    root = (total / counts.clamp(min=1)).sqrt().float()
    return torch.where(root > 0, root, torch.ones_like(root))


def _averaged(ordered: Tensor, each: int) -> Tensor:
    """Means of runs of `each` values, the last run shorter."""
    whole = len(ordered) // each * each
    runs = ordered[:whole].reshape(-1, each).mean(1)
    return torch.cat([runs, ordered[whole:].mean()[None]]) if whole < len(ordered) else runs


def most_bits(shape: Sequence[int], bits: int, groups: int = 1, *, own_tables: bool = False) -> int:
    """Bits of a Codebook of a weight of that shape, at most: with scales in float32 and an order of rows."""
    count, row = math.prod(shape), 8 * _row_dtype(shape[0]).itemsize
    groups = min(groups, shape[0])
    tables = 16 * min(2**bits, count) * (groups if own_tables else 1)
    rows = row * (shape[0] + groups - 1) if groups > 1 else 0
    return 8 * grid.packed_bytes(count, bits) + tables + 32 * groups + rows


def _row_dtype(rows: int) -> torch.dtype:
    return torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32


def _check_tables(tables: Tensor, scale: Tensor | None, groups: int) -> None:
    """Raises ValueError unless there is an ascending, finite table and a positive scale for each group."""
    fits = tables.is_floating_point() and tables.ndim == 2 and tables.shape[0] in (1, groups)
    if not fits or not 1 <= tables.shape[1] <= LARGEST or not tables.isfinite().all():
        raise ValueError(f"tables {tuple(tables.shape)} of {tables.dtype} do not fit {groups} groups")
    if bool((tables.diff(dim=1) < 0).any()):
        raise ValueError("a table is not ascending")
    if scale is not None:
        fits = scale.is_floating_point() and scale.shape == (groups,)
        if not fits or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"need one positive scale for each of {groups} groups")


def _check_rows(ends: Tensor | None, order: Tensor | None, rows: int) -> None:
    """Raises ValueError unless `ends` ascend inside the rows and `order` names every row once."""
    whole: Sequence[Tensor] = [rows_ for rows_ in (ends, order) if rows_ is not None]
    if any(rows_.is_floating_point() or rows_.ndim != 1 for rows_ in whole):
        raise ValueError("rows are not given as whole numbers")
    if ends is not None and not (ends[0] > 0 and ends[-1] < rows and (ends.diff() > 0).all()):
        raise ValueError(f"group ends {ends.tolist()} do not cut {rows} rows")
    if order is not None and not torch.equal(order.sort().values, torch.arange(rows).to(order)):
        raise ValueError(f"the order does not name each of {rows} rows once")


def kept(
    forms: Mapping[str, Codebook], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Codebook], dict[str, str]]:
    """The forms that are smaller than their weights, and the layers that are left, with the reason."""
    packed: dict[str, Codebook] = {}
    left: dict[str, str] = {}
    for layer, form in forms.items():
        dense = stored(weights[layer])
        if form.bits() < dense:
            packed[layer] = form
        else:
            left[layer] = (
                f"{form.bits()} bits of codes and tables are not fewer than the {dense} of its weight"
            )
    return packed, left
