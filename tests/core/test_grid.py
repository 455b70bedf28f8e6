"""Uniform grids: hand examples, the range, packing into bytes, and nonsense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.errors import DoesNotFit
from netweight.core.grid import (
    Grid,
    extent,
    from_codes,
    in_groups,
    nearest,
    pack,
    packed_bytes,
    scale_and_zero,
    storable,
    to_codes,
    unpack,
)


def test_groups_by_hand():
    weight = torch.arange(12).reshape(2, 3, 2)
    assert in_groups(weight, -1).shape == (1, 12)
    assert in_groups(weight, 0).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert in_groups(weight, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    with pytest.raises(DoesNotFit, match="^conv: rows of 6 weights are not a multiple of group=4$"):
        in_groups(weight, 4, "conv")


def test_extent_holds_zero_and_is_mirrored_where_symmetric():
    groups = torch.tensor([[1.0, 2.0], [-3.0, -1.0], [-1.0, 2.0]])
    assert [v.tolist() for v in extent(groups, False)] == [[0, -3, -1], [2, 0, 2]]
    assert [v.tolist() for v in extent(groups, True)] == [[-2, -3, -2], [2, 3, 2]]


def test_scale_and_zero_by_hand():
    lo, hi = torch.tensor([-1.0, 0.0, -7.5]), torch.tensor([6.5, 15.0, 0.0])
    scale, zero = scale_and_zero(lo, hi, Grid(4))
    assert scale.tolist() == [0.5, 1.0, 0.5] and zero.tolist() == [2, 0, 15]
    assert scale.dtype == torch.float16 and zero.dtype == torch.uint8
    scale, zero = scale_and_zero(-hi, hi, Grid(3, symmetric=True))
    assert scale.tolist() == pytest.approx([6.5 / 3, 5.0, 1.0], rel=1e-3) and zero.tolist() == [4, 4, 4]
    scale, zero = scale_and_zero(torch.zeros(1), torch.zeros(1), Grid(8))
    assert scale.tolist() == [1.0] and zero.tolist() == [0]
    scale, _ = scale_and_zero(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1e-6]), Grid(8))
    assert scale.dtype == torch.float32 and torch.allclose(scale, torch.tensor([1.0, 1e-6]) / 255)


def test_levels():
    assert Grid(4).levels == (0, 15) and Grid(4, symmetric=True).levels == (1, 15)
    assert Grid() == Grid(4, False, 0)


@pytest.mark.parametrize("extreme", [2.0**-15, 65520.0])
def test_scales_outside_float16_stay_in_float32(extreme):
    scales = torch.tensor([1.0, extreme])
    assert storable(scales).dtype == torch.float32 and torch.equal(storable(scales), scales)
    assert storable(torch.tensor([2.0**-14, 65504.0])).dtype == torch.float16


def test_codes_are_nearest_half_to_even_and_clipped():
    groups = torch.tensor([[0.5, 1.5, -0.5, 2.4, 99.0, -99.0]])
    scale, zero = torch.tensor([1.0]), torch.tensor([3], dtype=torch.uint8)
    assert to_codes(groups, scale, zero, Grid(3)).tolist() == [[3, 5, 3, 5, 7, 0]]
    middle = torch.tensor([4], dtype=torch.uint8)
    assert to_codes(groups, scale, middle, Grid(3, symmetric=True)).tolist() == [[4, 6, 4, 6, 7, 1]]
    assert from_codes(torch.tensor([[0, 7]], dtype=torch.uint8), scale, zero).tolist() == [[-3.0, 4.0]]


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([-1, 0, 4]),
    seed=st.integers(0, 2**16),
)
def test_rounding_is_idempotent_and_follows_the_scale_of_the_weight(bits, symmetric, group, seed):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    grid = Grid(bits, symmetric, group)
    once = nearest(weight, grid)
    assert torch.equal(nearest(weight * 4, grid), once * 4)  # a power of two moves no rounding
    assert torch.equal(nearest(weight.double(), grid), once.double())
    largest = in_groups(once - weight, group).abs().amax(1)
    scale, _ = scale_and_zero(*extent(in_groups(weight, group), symmetric), grid)
    assert (largest <= scale.float() * (0.5 + 2.0 ** (bits - 11))).all()


@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_packing_is_exact_little_endian_and_as_short_as_can_be(bits, count, seed):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(count, bits) == (count * bits + 7) // 8
    number = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    assert int.from_bytes(bytes(packed.tolist()), "little") == number
    assert torch.equal(unpack(packed, bits, count), codes)


def test_nonsense():
    for settings in ({"bits": 1}, {"bits": 9}, {"group": -2}):
        with pytest.raises(ValueError, match="=".join(map(str, *settings.items()))):
            Grid(**settings)
