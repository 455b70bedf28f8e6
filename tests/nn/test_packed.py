"""Stored forms: what they decode to, what they cost, the cell of a rounding, and files that lie."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.grid import Grid, extent, in_groups, scale_and_zero, to_codes
from netweight.nn.packed import NM, Affine, Dense, Sparse, dtype_name, layout, place_bits, stored
from netweight.testing import check_form

WEIGHT = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0))


def affine(weight, bits=4, symmetric=False, group=0):
    grid = Grid(bits, symmetric, group)
    groups = in_groups(weight, group)
    scale, zero = scale_and_zero(*extent(groups, symmetric), grid)
    return Affine.of(to_codes(groups, scale, zero, grid), scale, zero, weight, grid)


def test_affine_by_hand():
    codes = torch.tensor([[0, 15], [3, 8]], dtype=torch.uint8)
    scale, zero = torch.tensor([0.5, 2.0]).half(), torch.tensor([5, 8], dtype=torch.uint8)
    form = Affine.of(codes, scale, zero, torch.zeros(2, 2), Grid(4))
    assert form.codes.tolist() == [0xF0, 0x83] and form.zero.tolist() == [0x85]
    assert form.decode().tolist() == [[-2.5, 5.0], [-10.0, 0.0]]
    assert form.integers().tolist() == codes.tolist() and form.zeros().tolist() == [[5], [8]]
    assert form.bits() == 16 + 32 + 8 and form.grid == Grid(4)
    symmetric = Affine.of(codes, scale, zero, torch.zeros(2, 2), Grid(4, symmetric=True))
    assert symmetric.zero is None and symmetric.zeros().tolist() == [[8], [8]] and symmetric.bits() == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group"), [(4, False, 0), (3, True, 4), (8, False, -1), (2, True, -1)]
)
def test_affine_keeps_the_laws_in_every_dtype(dtype, bits, symmetric, group):
    form = affine(WEIGHT.to(dtype), bits, symmetric, group)
    check_form(form, WEIGHT.to(dtype))
    assert form.scale.shape == {0: (6, 1), 4: (6, 2), -1: (1, 1)}[group]
    assert dtype_name(WEIGHT.to(dtype)) == form.dtype


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([0, 2, -1]),
    seed=st.integers(0, 2**16),
)
def test_projecting_finds_the_nearest_code_of_the_same_grid(bits, symmetric, group, seed):
    other = torch.randn(WEIGHT.shape, generator=torch.Generator().manual_seed(seed))
    form = affine(WEIGHT, bits, symmetric, group)
    moved = form.project(other)
    assert torch.equal(moved.scale, form.scale) and moved.zero is form.zero
    low, high = form.grid.levels
    all_codes = torch.arange(low, high + 1)
    values = (all_codes - form.zeros().reshape(-1, 1).float()) * form.scale.reshape(-1, 1).float()
    rows = in_groups(other, group)
    nearest = (rows[:, :, None] - values[:, None, :]).abs().amin(2)
    assert torch.allclose((in_groups(moved.decode(), group) - rows).abs(), nearest, atol=1e-5)


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 2**16))
def test_the_cell_holds_what_rounds_to_the_codes_and_little_else(bits, symmetric, seed):
    g = torch.Generator().manual_seed(seed)
    form = affine(WEIGHT, bits, symmetric)
    lower, upper = form.cell()
    assert ((form.decode() >= lower) & (form.decode() <= upper)).all() and (lower <= WEIGHT).all()
    assert (upper >= WEIGHT).all()
    step = form.scale.double().reshape(6, 1, 1)
    width = torch.where((upper - lower).isfinite(), upper - lower, step)
    assert ((width - step).abs() <= step * 2e-4).all()
    low, high = lower.clamp(min=-9), upper.clamp(max=9)
    inside = low + (high - low) * torch.rand(WEIGHT.shape, generator=g).double() * 0.999
    slack = 2e-4 * step
    well_inside = torch.minimum(torch.maximum(inside, low + slack), high - slack).float()
    assert torch.equal(form.project(well_inside).codes, form.codes)
    for corner, outwards in ((lower, -1), (upper, 1)):
        beyond = (corner + outwards * 2 * slack).float()
        changed = form.project(beyond).integers() != form.integers()
        assert (changed == corner.isfinite()).all()


@given(seed=st.integers(0, 2**16))
def test_a_weight_that_float32_arithmetic_rounds_into_the_cell_is_inside_it(seed):
    form = affine(torch.randn(1, 16, generator=torch.Generator().manual_seed(seed)).double())
    near = (torch.arange(16) - int(form.zeros()) + 0.5).double() * float(
        form.scale
    )  # halfway between two codes
    for outwards in (near.sign() * 9, near.sign() * 0):
        weight = torch.nextafter(near, outwards)[None]
        lower, upper = form.project(weight).cell()
        assert ((lower <= weight) & (weight <= upper)).all()


def test_dense():
    form = Dense(WEIGHT.half())
    assert torch.equal(form.decode(), WEIGHT.half().float()) and form.bits() == 48 * 16
    assert form.project(WEIGHT * 2).values.dtype == torch.float16
    check_form(form, WEIGHT)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        Dense(WEIGHT, "int8")


def test_nm_by_hand():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    form = NM.of(values, torch.tensor([[0, 3], [1, 2]], dtype=torch.uint8), 4, (1, 4, 2))
    assert form.decode().tolist() == [[[1, 0], [0, 3], [0, 4], [2, 0]]]  # one group for each kernel position
    assert form.bits() == 4 * 32 + 4 * 2 and form.places.tolist() == [[0, 3], [1, 2]]
    moved = form.project(torch.arange(8.0).reshape(1, 4, 2))
    assert moved.values.tolist() == [[0, 6], [3, 5]]
    check_form(form, form.decode())
    assert [place_bits(n) for n in (2, 3, 4, 5, 256)] == [1, 2, 2, 3, 8]


def test_sparse_by_hand():
    weight = torch.tensor([[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]])
    form = Sparse.of(weight, torch.tensor([[True, False, True], [False, False, True]]))
    assert form.values.tolist() == [1, -3, 6] and form.mask.tolist() == [0b100101]
    assert form.decode().tolist() == [[1, 0, -3], [0, 0, 6]] and form.bits() == 3 * 32 + 8
    assert form.project(weight * 2).decode().tolist() == [[2, 0, -6], [0, 0, 12]]
    check_form(form, weight)
    assert Sparse.of(weight, weight > 9).decode().sum() == 0
    assert stored(None, form.mask, form.values) == form.bits()


def test_layout():
    assert (
        layout((6, 4, 2), -1) == (1, 1) and layout((6, 4, 2), 0) == (6, 1) and layout((6, 4, 2), 4) == (6, 2)
    )
    with pytest.raises(ValueError, match="groups of 3 do not fit rows of 8"):
        layout((6, 4, 2), 3)


BYTES = torch.zeros(3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("codes", BYTES, "do not hold 48 codes of 4 bits"),
        ("codes", torch.zeros(24), "torch.float32 do not hold"),
        ("zero", torch.zeros(4, dtype=torch.uint8), "do not hold 6 codes"),
        ("scale", torch.ones(6, 2), "do not hold 12 codes"),
        ("scale", torch.ones(1, 6), "do not fit"),
        ("scale", torch.ones(6, 1, dtype=torch.int64), "do not fit"),
        ("shape", (6, 4, -2), "do not fit the shape"),
        ("shape", (6, 4), "do not hold 24 codes"),
        ("shape", (), "do not fit the shape"),
        ("bits_per_code", 9, "bits=9"),
        ("bits_per_code", 3, "codes of 3 bits"),
        ("group", 3, "groups of 3"),
        ("group", -5, "group=-5"),
        ("dtype", "int8", "int8 do not fit"),
    ],
)
def test_an_affine_form_that_does_not_fit_together_is_refused(field, value, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(affine(WEIGHT), **{field: value})


def test_other_forms_that_do_not_fit_together_are_refused():
    values, places = torch.ones(2, 2), torch.tensor([[0, 3], [1, 2]], dtype=torch.uint8)
    for wrong in (
        lambda: NM.of(values, torch.tensor([[0, 3], [2, 2]], dtype=torch.uint8), 4, (2, 4)),
        lambda: NM.of(values, torch.tensor([[0, 3], [2, 1]], dtype=torch.uint8), 4, (2, 4)),
        lambda: NM.of(values, torch.tensor([[0, 2], [0, 3]], dtype=torch.uint8), 3, (2, 3)),
        lambda: NM.of(values, places, 4, (2, 5)),
        lambda: NM.of(values, places, 4, (4, 2)),
        lambda: NM.of(values, places, 4, (8,)),
        lambda: NM(values, BYTES, 4, (2, 4)),
        lambda: NM(values.reshape(-1), NM.of(values, places, 4, (2, 4)).packed_places, 4, (4, 4)),
        lambda: Sparse(torch.ones(3), BYTES, (4, 6)),
        lambda: Sparse(torch.ones(0), BYTES, (4, 5, 6)),
        lambda: Sparse(torch.ones(0, 1), BYTES, (4, 6)),
    ):
        with pytest.raises(ValueError):
            wrong()
