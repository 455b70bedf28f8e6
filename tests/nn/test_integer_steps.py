"""Integer steps against float64 operators of torch on the same whole numbers, and against their ranges."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.nn.dyadic import Dyadic
from netweight.nn.integer_steps import (
    Clip,
    Concat,
    Entrance,
    Join,
    Move,
    Negate,
    Pool,
    Product,
    Rescale,
    summed,
)

CASES = [  # in, out, groups, kernel, stride, padding, dilation
    (4, 6, 1, (3,), (2,), (1,), (1,)),
    (4, 6, 2, (3, 2), (2, 1), (1, 0), (1, 2)),
    (6, 6, 6, (3, 3), (1, 1), (2, 2), (2, 2)),
    (2, 4, 1, (2, 2, 2), (1, 2, 1), (0, 1, 0), (1, 1, 1)),
    (3, 5, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
]


def numbers(shape, low, high, seed=0, dtype=torch.int32):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(case, dtype=torch.int8):
    before, after, groups, kernel, stride, padding, dilation = case
    edge = 127 if dtype == torch.int8 else 255
    weight = numbers((after, before // groups, *kernel), -edge, edge, 1, dtype)
    return Product(weight, numbers((after,), -9999, 9999, 2), stride, padding, dilation, groups)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_convolution_is_that_of_float64_on_the_same_integers(case, dtype, monkeypatch):
    step = product(case, dtype)
    axes = len(step.stride)
    q = numbers((5, case[0], 7, 6, 5)[: axes + 2], -130, 255)
    wanted = torch.convolution(
        q.double(), step.weight.double(), step.bias.double(), step.stride, step.padding, step.dilation,
        False, [0] * axes, step.groups,
    )  # fmt: skip
    found = step.run(q)
    assert found.dtype == torch.int32 and torch.equal(found.double(), wanted)
    monkeypatch.setattr("netweight.nn.integer_steps.COLUMNS", 500)  # example by example
    monkeypatch.setattr("netweight.nn.integer_steps.multiplied", summed)  # as on other devices
    assert torch.equal(step.run(q), found)
    low, high = step.reach(-130, 255)
    assert low <= int(found.min()) and int(found.max()) <= high


def test_a_linear_layer_is_that_of_float64_on_any_leading_axes():
    step = Product(numbers((6, 9), -127, 127, 1, torch.int8), numbers((6,), -99, 99, 2))
    q = numbers((4, 3, 9), 0, 255)
    assert torch.equal(step.run(q).double(), F.linear(q.double(), step.weight.double(), step.bias.double()))


@given(low=st.integers(-200, 0), width=st.integers(0, 300), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_the_range_of_a_product_is_reached_and_never_left(low, width, seed):
    step = Product(numbers((3, 5), -127, 127, seed, torch.int8), numbers((3,), -500, 500, seed))
    high = low + width
    worst = torch.where(step.weight > 0, high, low).to(torch.int32)  # one row for each output
    assert int(step.run(worst).diagonal().max()) == step.reach(low, high)[1]
    best = torch.where(step.weight > 0, low, high).to(torch.int32)
    assert int(step.run(best).diagonal().min()) == step.reach(low, high)[0]
    size = step.largest(low, high)
    assert size >= max(abs(end) for end in step.reach(low, high))
    assert size == int((step.weight.int().abs().sum(1) * max(abs(low), abs(high)) + step.bias.abs()).max())


def test_padding_is_zero_and_part_of_the_range():
    step = Product(torch.ones(1, 1, 3, dtype=torch.int8), torch.zeros(1, dtype=torch.int32), (1,), (1,), (1,))
    assert step.run(torch.full((1, 1, 4), 5, dtype=torch.int32)).flatten().tolist() == [10, 15, 15, 10]
    assert step.reach(5, 5) == (0, 15)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 2, 3)], ids=str)
def test_windows_are_those_of_torch(kernel):
    axes = len(kernel)
    q = numbers((2, 3, 7, 6, 5)[: axes + 2], -50, 50)
    by = {"kernel": kernel, "stride": (2,) * axes, "padding": (1,) * axes, "dilation": (1,) * axes}
    largest = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1](q.double(), kernel, 2, 1)
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1](q.double(), kernel, 2, 1)
    assert torch.equal(Pool("max", **by).run(q).double(), largest)
    count = torch.Size(kernel).numel()
    assert torch.equal(Pool("sum", **by).run(q).double(), (average * count).round())
    assert Pool("sum", **by).reach(3, 5, count) == (0, 5 * count)
    assert Pool("max", **by).reach(3, 5, count) == (3, 5)


def test_windows_of_a_dilated_max_pool():
    q = numbers((2, 3, 9, 9), -50, 50)
    step = Pool("max", kernel=(3, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 2))
    assert torch.equal(step.run(q).double(), F.max_pool2d(q.double(), 3, (1, 2), (1, 0), 2))


def test_elementwise_steps_by_hand():
    q = torch.tensor([[-7, 0, 9]], dtype=torch.int32)
    low, high = torch.tensor([0], dtype=torch.int32), torch.tensor([[1, 2, 5]], dtype=torch.int32)
    assert Clip(low).run(q).tolist() == [[0, 0, 9]] and Clip(low).reach(-7, 9) == (0, 9)
    assert Clip(low, high).run(q).tolist() == [[0, 0, 5]] and Clip(low, high).reach(-7, 9) == (0, 5)
    assert (
        Clip().run(q) is q and Negate().run(q).tolist() == [[7, 0, -9]] and Negate().reach(-7, 9) == (-9, 7)
    )
    assert Join().run(q, q, q).tolist() == [[-21, 0, 27]] and Join().reach((-7, 9), (1, 2)) == (-6, 11)
    assert Concat(1).run(q, q).shape == (1, 6) and Concat(1).reach((-7, 9), (1, 20)) == (-7, 20)
    assert Pool("sum", (1,)).run(q).tolist() == [2] and Pool("max", (1,), True).run(q).tolist() == [[9]]
    rescale = Rescale(Dyadic.of(torch.tensor([0.5, 0.25], dtype=torch.float64)), -2, 3)
    assert rescale.image(-7, 9) == (-3, 5) and rescale.reach(-7, 9) == (-2, 3)


def test_an_entrance_rounds_half_to_even():
    one = torch.ones(1, dtype=torch.float64)
    step = Entrance(one * 2, one * 0.5, -3, 4)
    x = torch.tensor([[-9.0, 0.0, 0.5, 1.0, 9.0]])
    assert step.run(x).tolist() == [[-3, 0, 2, 2, 4]] and step.run(x).dtype == torch.int32


@pytest.mark.parametrize(
    ("how", "by", "wanted"),
    [
        ("reshape", {"shape": [12]}, lambda q: q.flatten(1)),
        ("permute", {"dims": [0, 2, 1]}, lambda q: q.transpose(1, 2)),
        ("select", {"dim": 2, "index": -1}, lambda q: q[:, :, -1]),
        ("slice", {"dim": 1, "start": 1, "end": 2**31 - 1, "step": 2}, lambda q: q[:, 1::2]),
        ("flip", {"dims": [1]}, lambda q: q.flip(1)),
        ("pad", {"pad": [1, 0, 0, 2]}, lambda q: F.pad(q, (1, 0, 0, 2))),
    ],
)
def test_movements(how, by, wanted):
    q = numbers((2, 3, 4), -9, 9)
    assert torch.equal(Move(how, by).run(q), wanted(q))
    assert Move(how, by).reach(2, 5) == ((0, 5) if how == "pad" else (2, 5))


def test_refuses_forms_that_are_none():
    weight, bias = torch.ones(2, 3, 3, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    good = {"stride": (1,), "padding": (0,), "dilation": (1,)}
    bad = [
        lambda: Product(weight.float(), bias, **good),
        lambda: Product(weight, bias.long(), **good),
        lambda: Product(weight, bias[:1], **good),
        lambda: Product(weight, bias, **{**good, "stride": (0,)}),
        lambda: Product(weight, bias, **{**good, "padding": (1 << 40,)}),
        lambda: Product(weight, bias, **good, groups=3),
        lambda: Entrance(torch.ones(1), torch.ones(1), 0, 1),
        lambda: Entrance(torch.full((1,), torch.nan).double(), torch.ones(1).double(), 0, 1),
        lambda: Rescale(Dyadic.of(torch.ones(1).double()), 5, 4),
        lambda: Rescale(Dyadic.of(torch.ones(1).double()), 0, 2**31),
        lambda: Concat(0),
        lambda: Clip(torch.zeros(1)),
        lambda: Pool("mean", (1,)),
        lambda: Pool("sum", (0,)),
        lambda: Pool("sum"),
        lambda: Move("resize", {}),
        lambda: Move("pad", {"pad": [1 << 40, 0]}),
    ]
    for make in bad:
        with pytest.raises(ValueError):
            make()
