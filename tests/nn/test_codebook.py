"""Codebooks: what they decode to, what they cost, their cells, and files that lie."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.nn import codebook
from netweight.nn.codebook import Codebook, kept, most_bits, nearest, spreads, table_of
from netweight.testing import check_form

WEIGHT = torch.randn(6, 20, 2, generator=torch.Generator().manual_seed(0))
GROUPS = torch.tensor([1, 0, 2, 0, 1, 0])


def test_by_hand():
    tables = torch.tensor([[-1.0, 0.5, 4.0]])
    codes = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 1]])
    form = Codebook.of(codes, tables, torch.tensor([2.0, 10.0]), torch.tensor([1, 0, 1]), torch.zeros(3, 3))
    assert form.decode().tolist() == [[-10, 5, 40], [8, 8, -2], [5, -10, 5]]
    assert form.order.tolist() == [1, 0, 2] and form.ends.tolist() == [1] and form.groups == 2
    assert form.integers().tolist() == [[2, 2, 0], [0, 1, 2], [1, 0, 1]]
    assert torch.equal(form.places(), codes)
    assert form.bits() == 3 * 8 + 3 * 16 + 2 * 16 + 16 + 3 * 16  # 18 bits of codes in three bytes
    own = Codebook.of(
        codes, torch.cat([tables, 2 * tables]), torch.ones(2), torch.tensor([0, 0, 1]), torch.zeros(3, 3)
    )
    assert own.decode().tolist() == [[-1, 0.5, 4], [4, 4, -1], [1, -2, 1]] and own.order is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [1, 3, 5])
@pytest.mark.parametrize(
    ("group_of", "own"), [(None, False), (GROUPS, False), (GROUPS, True), (GROUPS.sort().values, False)]
)
def test_the_laws_of_a_form_in_every_dtype(dtype, bits, group_of, own):
    weight = torch.cat([WEIGHT] * 3, 1).to(dtype)
    form = Codebook.nearest(weight, bits, group_of, own_tables=own)
    check_form(form, weight)
    assert (form.order is not None) == (group_of is GROUPS)
    assert form.levels().shape == (form.groups, 2**bits) and form.bits_per_code == bits
    assert form.bits() <= most_bits(weight.shape, bits, form.groups, own_tables=own)


@given(bits=st.integers(1, 4), seed=st.integers(0, 2**16), groups=st.integers(1, 4), own=st.booleans())
def test_a_group_takes_no_more_values_than_its_table_has_and_each_the_nearest(bits, seed, groups, own):
    g = torch.Generator().manual_seed(seed)
    weight, other = torch.randn(2, 8, 16, generator=g)
    group_of = (torch.arange(8) % groups)[torch.randperm(8, generator=g)]
    form = Codebook.nearest(weight, bits, group_of, own_tables=own)
    assert form.tables.shape[0] == (groups if own else 1) and form.scale.shape == (groups,)
    decoded, moved = form.decode(), form.project(other).decode()
    assert len(decoded.unique()) <= 2**bits * groups
    for group, levels in enumerate(form.levels()):
        rows = group_of == group
        assert torch.isin(decoded[rows], levels).all()
        least = (other[rows][..., None] - levels).abs().amin(-1)
        assert torch.allclose((moved[rows] - other[rows]).abs(), least, atol=1e-6)


@given(seed=st.integers(0, 2**16), values=st.integers(1, 16))
def test_few_distinct_values_are_kept_exactly(seed, values):
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(values, generator=g)
    weight = table[torch.randint(values, (8, 32), generator=g)]
    form = Codebook.nearest(weight, 4, torch.arange(8) % 2)
    assert torch.equal(form.decode(), weight) and form.scale is None and form.groups == 1
    check_form(form, weight)


def test_a_small_weight_of_many_values_is_still_smaller_than_itself():
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    form = Codebook.nearest(weight, 8)
    assert form.bits() < 32 * 144 and form.tables.shape == (1, 144)
    assert (form.decode() - weight).abs().max() < 2e-3
    packed, left = kept({"a": form, "b": form}, {"a": weight, "b": weight.half()})
    assert [*packed] == ["a"] and "not fewer than the 2304 of its weight" in left["b"]


@given(seed=st.integers(0, 2**16), groups=st.integers(1, 3))
def test_the_cell_holds_what_projects_to_the_codes_and_nothing_else(seed, groups):
    g = torch.Generator().manual_seed(seed)
    form = Codebook.nearest(WEIGHT, 2, torch.arange(6) % groups)
    lower, upper = form.cell()
    assert ((lower <= form.decode()) & (form.decode() <= upper)).all()
    assert (lower <= WEIGHT).all() and (upper >= WEIGHT).all()
    low, high = lower.clamp(min=-9), upper.clamp(max=9)
    inside = low + (high - low) * (0.001 + 0.998 * torch.rand(WEIGHT.shape, generator=g).double())
    assert torch.equal(form.project(inside).codes, form.codes)
    for corner, outwards in ((lower, -1e-6), (upper, 1e-6)):
        changed = form.project(corner + outwards).places() != form.places()
        assert torch.equal(changed.reshape(WEIGHT.shape), corner.isfinite())
        within = torch.where(corner.isfinite(), corner - outwards, WEIGHT.double())
        assert torch.equal(form.project(within).codes, form.codes)


@given(count=st.integers(1, 9), entries=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_the_table_is_the_best_there_is(count, entries, seed):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).double().sort().values
    table = table_of(values, entries)
    assert len(table) == entries and (table.diff() >= 0).all()
    assert torch.allclose(
        (values - table[nearest(values, table)]).square().sum(),
        torch.tensor(cheapest(values, entries)).double(),
    )


def cheapest(values: torch.Tensor, parts: int) -> float:
    """The least cost over all cuts of ascending values, by trying them."""
    if parts == 1 or len(values) < 2:
        return float((values - values.mean()).square().sum()) if len(values) else 0.0
    first = [(values[:i] - values[:i].mean()).square().sum() if i else 0.0 for i in range(len(values) + 1)]
    return min(float(first[i]) + cheapest(values[i:], parts - 1) for i in range(len(values) + 1))


def test_many_values_come_close_to_the_best(monkeypatch):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))

    def error() -> float:
        table = table_of(values, 8)
        return float((values - table[nearest(values, table)]).square().sum())

    best = error()
    monkeypatch.setattr(codebook, "POINTS", 300)
    rough = error()
    assert best <= rough <= best * 1.001
    monkeypatch.setattr(codebook, "LLOYD", 0)
    assert error() > best * 1.001


def test_halfway_goes_to_the_lower_entry_and_spreads_by_hand():
    assert nearest(torch.tensor([0.0, 0.5, 0.51, 9.0]), torch.tensor([0.0, 1.0])).tolist() == [0, 0, 1, 1]
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, 5.0]])
    assert spreads(weight, torch.tensor([0, 1, 0])).tolist() == [pytest.approx(18.75**0.5), 1.0]


FORM = Codebook.nearest(WEIGHT, 3, GROUPS)
BYTES = torch.zeros(3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("codes", BYTES, "do not hold 240 codes of 3 bits"),
        ("tables", torch.ones(2, 8), "do not fit 3 groups"),
        ("tables", torch.ones(8), "do not fit 3 groups"),
        ("tables", torch.full((1, 8), torch.nan), "do not fit"),
        ("tables", FORM.tables.flip(1), "not ascending"),
        ("tables", FORM.tables[:, :5], "past the 5 entries"),
        ("tables", torch.ones(1, 8, dtype=torch.int64), "do not fit"),
        ("scale", torch.ones(2), "one positive scale for each of 3 groups"),
        ("scale", torch.tensor([1.0, 0.0, 1.0]), "one positive scale"),
        ("scale", torch.tensor([1.0, torch.inf, 1.0]), "one positive scale"),
        ("ends", torch.tensor([3, 3]), "do not cut 6 rows"),
        ("ends", torch.tensor([0, 3]), "do not cut 6 rows"),
        ("ends", torch.tensor([3, 6]), "do not cut 6 rows"),
        ("ends", torch.tensor([1.0, 3.0]), "whole numbers"),
        ("ends", torch.zeros(0, dtype=torch.int16), "do not fit|one positive scale|do not cut"),
        ("order", torch.tensor([0, 1, 2, 3, 4, 4]), "each of 6 rows once"),
        ("order", torch.tensor([0, 1, 2]), "each of 6 rows once"),
        ("order", torch.zeros(6), "whole numbers"),
        ("shape", (6, 4, -2), "do not fit the shape"),
        ("shape", (3, 40, 2), "do not cut|rows once"),
        ("dtype", "int8", "'int8' is none of"),
    ],
)
def test_a_form_that_does_not_fit_together_is_refused(field, value, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(FORM, **{field: value})
