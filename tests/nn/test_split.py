"""The split form: places as digits, parts that add up, and hostile files."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import Change, assemble
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.grid import Grid
from netweight.core.plan import Plan
from netweight.core.stored import put_together, take_apart
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import Affine
from netweight.nn.split import Split, Summed, digits, opened, pack_places, unpack_places


def made(seed=0, shape=(6, 4), count=3, bits=2, group=-1):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g)
    parts = torch.randint(count, shape, generator=g).to(torch.uint8)
    return weight, parts, Split.nearest(weight, parts, count, Grid(bits, False, group))


@given(count=st.integers(1, 256), numbers=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_places_come_back_and_share_bytes(count, numbers, seed):
    parts = torch.randint(count, (numbers,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_places(parts, count)
    assert torch.equal(unpack_places(packed, count, numbers), parts)
    assert len(packed) == (0 if count == 1 else -(-numbers // digits(count)))


def test_five_of_three_go_into_a_byte():
    assert [digits(count) for count in (1, 2, 3, 4, 6, 7, 16, 17, 256)] == [0, 8, 5, 4, 3, 2, 2, 1, 1]
    assert pack_places(torch.tensor([1, 0, 2, 0, 1, 2]), 3).tolist() == [1 + 18 + 81, 2]


@given(
    count=st.integers(1, 4),
    bits=st.integers(2, 5),
    group=st.sampled_from([-1, 0, 2]),
    seed=st.integers(0, 99),
)
def test_the_sum_of_the_parts_is_the_weight_and_each_is_zero_elsewhere(count, bits, group, seed):
    weight, parts, form = made(seed, (5, 2, 4), count, bits, group)
    alone = [form.part(c).decode() for c in range(count)]
    assert torch.equal(torch.stack(alone).sum(0), form.decode())
    assert torch.equal(form.parts(), parts)
    for c, values in enumerate(alone):
        assert (values[parts != c] == 0).all()
        own = Affine.nearest(torch.where(parts == c, weight, 0), Grid(bits, False, group))
        if own.scale.dtype == form.scale.dtype:
            assert torch.equal(values, own.decode())  # what a quantizer makes of a layer of its own


@given(seed=st.integers(0, 99), count=st.integers(1, 4))
def test_projection_finds_the_nearest_of_all_values(seed, count):
    _, _, form = made(seed, count=count)
    other = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed + 1))
    values = torch.cat(
        [
            (torch.arange(4) - form.zeros()[c].flatten().float()) * form.scale[c].flatten().float()
            for c in range(count)
        ]
    )
    least = (other.flatten()[:, None] - values).abs().min(1).values
    projected = form.project(other)
    assert torch.allclose((projected.decode() - other).abs().flatten(), least, atol=1e-6)
    assert torch.equal(projected.scale, form.scale) and projected.bits() == form.bits()


def test_bits_by_hand():
    _, _, form = made(shape=(10, 10))
    assert form.bits() == 8 * 25 + 8 * 20 + 3 * 16 + 8  # codes, five places a byte, three scales, three zeros


def test_opened_runs_as_plain_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    x = torch.rand(7, 4, 3, 3)
    for count in (1, 3):
        packed = {}
        for name in ("0", "3"):
            weight = model.get_submodule(name).weight.detach()
            parts = torch.randint(count, weight.shape).to(torch.uint8)
            packed[name] = Split.nearest(weight, parts, count, Grid(3, False, -1))
        small = assemble(model, Change(packed), Plan()).model
        open_ = opened(small)
        assert isinstance(open_[0], Summed) and len(open_[0].layers) == count
        assert all(isinstance(layer.form, Affine) for layer in open_[3].layers)
        assert isinstance(small[0], PackedLayer), "the packed network stays as it is"
        assert torch.allclose(open_(x), small(x), atol=1e-5)


def test_hostile_files_and_nonsense():
    weight, parts, form = made()
    tensors, settings = take_apart(form)
    for change in (
        {"codes": tensors["codes"][1:]},
        {"places": tensors["places"][1:]},
        {"places": torch.full_like(tensors["places"], 250)},  # 250 is no five digits of base 3
        {"scale": tensors["scale"][:, 0]},
        {"scale": tensors["scale"].int()},
        {"zero": torch.zeros(9, dtype=torch.uint8)},
    ):
        with pytest.raises(BadInput, match="stored form Split"):
            put_together({**tensors, **change}, settings)
    for change in ({"shape": [5, 4]}, {"group": 3}, {"bits_per_code": 9}, {"dtype": "int8"}):
        with pytest.raises(BadInput, match="stored form Split"):
            put_together(tensors, {**settings, **change})
    with pytest.raises(ValueError, match="symmetric"):
        Split.nearest(weight, parts, 3, Grid(2, True, -1))
    with pytest.raises(DoesNotFit, match="^fc: rows of 4 weights are not a multiple of group=3"):
        Split.nearest(weight, parts, 3, Grid(2, False, 3), "fc")
    assert dataclasses.is_dataclass(form)
