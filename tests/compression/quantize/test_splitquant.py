"""SplitQuant against a hand example, its definition, the laws of its room, and nonsense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.compression.quantize.splitquant import (
    SplitQuant,
    between,
    cuts,
    encode,
    partition,
    pieces,
    split,
    splitquant,
)
from netweight.core.compressed import weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid
from netweight.core.task import outputs
from netweight.nn.split import Summed
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


def test_by_hand():
    weight = torch.tensor([[-3.0, -2.0, 0.0, 0.25], [0.5, 0.75, 6.0, 4.0]])
    assert partition(weight, 3).tolist() == [[0, 0, 1, 1], [1, 1, 2, 2]]
    form = encode(weight, 3, Grid(2, False, -1))
    assert form.scale.flatten().tolist() == [1.0, 0.25, 2.0]  # 3 steps over [-3, 0], [0, 0.75], [0, 6]
    assert form.decode().tolist() == weight.tolist()
    whole = encode(weight, 1, Grid(2, False, -1))
    assert whole.decode().tolist() == [[-3.0, -3.0, 0.0, 0.0], [0.0, 0.0, 6.0, 3.0]]


def test_the_lower_cut_belongs_below_and_the_upper_above():
    cut = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert between(torch.tensor([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5]), cut).tolist() == [0, 0, 1, 1, 2, 2]
    assert cuts(torch.tensor([0.0, 4.0, 5.0, 9.0]), 3).tolist() == [2.25, 6.75]


@given(parts=st.integers(1, 4), kernel=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 2**16))
def test_parts_are_intervals_and_their_sum_is_the_weight_bit_for_bit(parts, kernel, seed):
    weight = torch.randn(4, 6, *kernel, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    which = partition(weight, parts)
    assert torch.equal(torch.stack(pieces(weight, parts)).sum(0), weight)
    for row, member in zip(weight, which) if kernel else [(weight, which)]:
        for c in range(parts - 1):
            if (member <= c).any() and (member > c).any():
                assert row[member <= c].max() <= row[member > c].min()


@given(bits=st.integers(2, 6), seed=st.integers(0, 2**16))
def test_each_weight_is_off_by_half_a_step_of_its_own_part(bits, seed):
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
    weight[0, 0] = 9.0
    form = encode(weight, 3, Grid(bits, False, -1))
    step = form.scale.float().flatten()[form.parts().long()]
    slack = 1 + 2.0**-11 * 2**bits  # float16 scales: the range's end; and the rounded zero point
    assert ((form.decode() - weight).abs() <= step * slack).all()
    inside = (form.integers() > 0) & (form.integers() < 2**bits - 1)
    assert ((form.decode() - weight).abs() <= step * (0.5 + 1e-3))[inside].all()


def test_one_part_is_plain_rounding_and_three_are_better_with_outliers():
    model, task = tiny_model(), tiny_task()
    model[7].weight.data[0, 0] = 5.0
    one = splitquant(model, task, weighted(model), SplitQuant(2, parts=1))
    plain = rtn(model, task, weighted(model), RTN(2, False, -1))
    three = splitquant(model, task, weighted(model), SplitQuant(2))
    for layer in weighted(model):
        assert torch.equal(one.packed[layer].decode(), plain.packed[layer].decode())
        weight = weight_of(model, layer)
        errors = [(c.packed[layer].decode() - weight).square().sum() for c in (three, plain)]
        assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    "settings", [SplitQuant(), SplitQuant(2), SplitQuant(3, 2, 0), SplitQuant(2, 4, 8)], ids=repr
)
def test_laws(settings):
    check_compressor(splitquant, settings)
    check_compressor(
        splitquant, settings, model=tiny_language_model(), task=tiny_text_task(), layers=["query", "down"]
    )


def test_all_kinds_of_layers_and_hard_weights():
    model = nn.ModuleDict(
        {
            "line": nn.Conv1d(4, 6, 3, groups=2, stride=2),
            "volume": nn.Conv3d(2, 3, 2),
            "few": nn.Linear(8, 2),
            "zero": nn.Linear(5, 4),
            "constant": nn.Linear(5, 4),
            "nan": nn.Linear(5, 4),
        }
    )
    model["zero"].weight.data.zero_()
    model["constant"].weight.data.fill_(-0.25)
    model["nan"].weight.data[0, 0] = torch.nan
    model["line"].weight.data[2] = 0.0  # a dead channel
    change = splitquant(model, tiny_task(), list(model), SplitQuant(4))
    assert change.left.keys() == {"nan"} and "NaN" in change.left["nan"]
    assert [len(change.packed[layer].scale) for layer in ("line", "volume", "few", "zero")] == [3, 3, 1, 3]
    for layer in ("zero", "constant"):
        assert torch.allclose(change.packed[layer].decode(), model[layer].weight, atol=1e-4)
    assert (change.packed["line"].decode()[2] == 0).all()


def test_the_float_split_is_the_same_function():
    model, task = tiny_model().double(), tiny_task()
    data = task.calibration.rows(slice(None))
    data = type(data)(data.x.double(), data.y, 10)
    parted = split(model, weighted(model))
    assert sum(isinstance(module, Summed) for module in parted.modules()) == 4
    assert float((outputs(parted, data) - outputs(model, data)).abs().max()) <= 1e-12
    summed = parted[7].layers
    assert torch.equal(sum(layer.bias for layer in summed), model[7].bias)
    assert all((layer.bias == 0).any() for layer in summed)
    assert not any(isinstance(module, Summed) for module in split(model, weighted(model), 100).modules())


def test_refuses_what_does_not_fit_and_nonsense():
    with pytest.raises(DoesNotFit, match="^7: rows of 144 weights are not a multiple of group=7$"):
        splitquant(tiny_model(), tiny_task(), ["7"], SplitQuant(group=7))
    with pytest.raises(DoesNotFit, match="^embedding: .*Embedding"):
        splitquant(tiny_language_model(), tiny_text_task(), ["embedding"], SplitQuant())
    for settings in ({"bits": 1}, {"bits": 9}, {"group": -2}, {"parts": 0}, {"parts": 257}):
        with pytest.raises(ValueError, match=repr(*settings.values())):
            SplitQuant(**settings)
