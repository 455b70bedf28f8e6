"""Layers on integers: tables, sums, thresholds and whole networks against the float path."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from netweight.core.compressed import Change, assemble, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.plan import Plan
from netweight.core.rewrite import FoldBatchNorm, rewritten
from netweight.nn.packed import Dense
from netweight.nn.power import Power, PowerRounding
from netweight.nn.power_integer import (
    FRACTION,
    LAST,
    PowerInteger,
    accumulated,
    fraction_of,
    in_integers,
    requantized,
    table,
    thresholds,
)
from netweight.testing import tiny_model, tiny_task

G = torch.Generator().manual_seed(0)
LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 6)),
    "linear on sequences": (nn.Linear(6, 4, bias=False), (2, 5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d, groups, stride": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 7)),
    "conv2d, dilation": (nn.Conv2d(4, 3, 2, dilation=2, bias=False), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


def packed(layer: nn.Module, rounding: PowerRounding, bits: int = 4, group: int = 0):
    form = Power.nearest(layer.weight.detach(), bits, group, float(rounding.exponent))
    change = Change({"0": form}, activations={"0": rounding})
    return assemble(nn.Sequential(layer), change, Plan()).model[0]


def test_a_table_by_hand():
    assert table(0.5, 1, 3, 4).tolist() == [0, 2, 7, 16]  # 16 (p / 3)^2 = 0, 1.78, 7.11, 16
    assert len(table(0.6, 7, 15, 20)) == 106  # the brief's count at 4 bits
    assert table(1.0, 7, 15, 10)[105] == 1024


@given(exponent=st.floats(0.3, 1.5), bits=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_entries_are_products_of_decoded_codes(exponent, bits, seed):
    q, q_x = 2 ** (bits - 1) - 1, 2**bits - 1
    entries = table(exponent, q, q_x, 20).double() / 2**20
    for n_w in range(q + 1):
        for n_x in range(q_x + 1):
            product = (n_w / q) ** (1 / exponent) * (n_x / q_x) ** (1 / exponent)
            assert abs(entries[n_w * n_x] - product) <= 2.0**-21 + 1e-12


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signed", [False, True])
def test_sums_are_the_definition_at_every_kind_of_layer(name, signed):
    layer, shape = LAYERS[name]
    codes = torch.randint(-3 if signed else 0, 8, shape, generator=G, dtype=torch.int16)
    weight = torch.randint(-3, 4, layer.weight.shape, generator=G, dtype=torch.int32)
    entries = table(0.6, 3, 7, 12)
    found = accumulated(layer, codes, weight, entries)
    assert found.dtype == torch.int32
    rows = torch.zeros(found.shape, dtype=torch.int64)
    for index in range(weight.numel()):  # one weight alone reads one code at each output
        alone = torch.zeros(weight.numel(), dtype=torch.float64)
        alone[index] = 1
        twin = copy.deepcopy(layer).double()
        twin.weight.data, twin.bias = alone.reshape(weight.shape), None
        with torch.no_grad():
            products = twin(codes.double()).long() * int(weight.flatten()[index])
        rows += products.sign() * entries.long()[products.abs()]
    assert torch.equal(found.long(), rows)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_layer_on_integers_equals_the_decoded_float_layer(name, low):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=G).clamp(min=low)
    for group in (0, -1):
        small = packed(layer, PowerRounding.of(low, 1.5, 0.6, 4), group=group)
        whole = PowerInteger(small.layer, small.how)
        with torch.no_grad():
            y, wanted = whole(x), small(x)
        assert y.shape == wanted.shape and y.dtype == wanted.dtype
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_no_float_between_the_codes():
    small = packed(LAYERS["conv2d, groups, stride"][0], PowerRounding.of(0.0, 1.5, 0.6, 4))
    layer = PowerInteger(small.layer, small.how, PowerRounding.of(0.0, 0.5, 0.5, 4))
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in (*args, result):
                if isinstance(value, torch.Tensor):
                    seen.add(value.dtype)
            return result

    codes = torch.randint(0, 16, (2, 4, 7, 7), generator=G, dtype=torch.int16)
    with Watch():
        after = layer(codes)
    assert after.dtype == torch.int16 and after.min() >= 0 and after.max() == 15
    assert seen and not any(dtype.is_floating_point for dtype in seen)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("exponent", "bits"), [(0.6, 4), (1.0, 8), (0.4, 3)])
def test_thresholds_equal_the_float_rounding_for_all_16_bit_sums(signed, exponent, bits):
    then = PowerRounding.of(-1.0 if signed else 0.0, 1.0, exponent, bits)
    c = torch.tensor([1 / 30000, 1 / 2000, 1.0, 1e-9], dtype=torch.float64)
    first = -then.q if signed else 0
    codes = range(first, then.q + 1)
    steps = thresholds(lambda sums: then.integers(sums * c[:, None]), codes, len(c))
    sums = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None].expand(-1, len(c))
    found = requantized(sums, steps, first)
    wanted = torch.stack([then.integers(column.double() * k) for column, k in zip(sums.T, c)], 1)
    assert torch.equal(found, wanted)
    assert found[:, 0].unique().numel() == len(codes)  # the first channel reaches every code


@given(largest=st.floats(1e-3, 1e9), products=st.integers(1, 10**6))
def test_the_fraction_is_the_largest_that_leaves_room_in_32_bits(largest, products):
    f = fraction_of(largest, products)
    assert largest * 2**f + products / 2 < LAST
    assert f == FRACTION or largest * 2 ** (f + 1) + products / 2 + 1 >= LAST


def test_no_fraction_is_small_enough():
    with pytest.raises(DoesNotFit, match="do not fit 32 bits"):
        fraction_of(2.0**31, 1)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_worst_sum_does_not_overflow(value):
    layer = nn.Linear(5000, 2)
    nn.init.constant_(layer.weight, value)
    nn.init.constant_(layer.bias, 100.0 * value)
    small = packed(layer, PowerRounding.of(0.0, 1.0, 0.6, 4))
    whole = PowerInteger(small.layer, small.how)
    with torch.no_grad():
        y = whole(torch.ones(1, 5000))
    assert y.flatten().tolist() == pytest.approx([5100.0 * value] * 2, rel=1e-3)
    assert 5100 * 2 ** (whole.fraction + 1) > LAST  # nor is a bit given away


def test_zero_weights_give_the_bias():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    small = packed(layer, PowerRounding.of(0.0, 1.0, 0.6, 4))
    with torch.no_grad():
        y = PowerInteger(small.layer, small.how)(torch.rand(2, 4, generator=G))
    assert torch.allclose(y, layer.bias.expand(2, 3), atol=1e-4)


def integer_network(joined):
    model = rewritten(tiny_model(), [FoldBatchNorm("0", "1"), FoldBatchNorm("3", "4")])
    task, forms, roundings = tiny_task(), {}, {}
    for name in weighted(model):
        forms[name] = Power.nearest(model.get_submodule(name).weight.detach(), 4, -1, 0.6)
        roundings[name] = PowerRounding.of(0.0, 2.0, 0.6, 4)
    small = assemble(model, Change(forms, activations=roundings), Plan())
    return small.model, in_integers(small.model, joined), task.test.x


@pytest.mark.parametrize("joined", [{}, {"0": "3", "3": "7", "7": "9"}])
def test_a_network_on_integers_equals_the_float_network(joined):
    small, whole, x = integer_network(joined)
    before = small.state_dict()
    with torch.no_grad():
        y, wanted = whole(x), small(x)
    assert (y - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert sum(isinstance(module, PowerInteger) for module in whole.modules()) == 4
    assert before.keys() == small.state_dict().keys()  # a copy


def test_codes_are_handed_on_only_where_joined():
    _, whole, x = integer_network({"0": "3"})
    assert whole[0](x).dtype == torch.int16 and whole[3](whole[2](whole[0](x))).dtype == torch.float32


def test_refuses_what_does_not_fit():
    small, _, _ = integer_network({})
    with pytest.raises(DoesNotFit, match="^11: not a layer with power codes"):
        in_integers(small, {"0": "11"})
    layer = packed(nn.Linear(8, 4), PowerRounding.of(0.0, 1.0, 0.6, 4)).layer
    with pytest.raises(DoesNotFit, match="different exponents"):
        PowerInteger(layer, PowerRounding.of(0.0, 1.0, 0.7, 4))
    grouped = packed(nn.Linear(8, 4), PowerRounding.of(0.0, 1.0, 0.6, 4), group=4).layer
    dense = Dense(torch.ones(4, 8)).layer(nn.Linear(8, 4))
    for wrong in (grouped, dense):
        with pytest.raises(DoesNotFit, match="one scale per row or tensor"):
            PowerInteger(wrong, PowerRounding.of(0.0, 1.0, 0.6, 4))
    plain = nn.Sequential(nn.Linear(2, 2))
    assert type(in_integers(plain)[0]) is nn.Linear  # nothing to do
