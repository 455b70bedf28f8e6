"""Rows through largest, smallest and sorted values never exceed the sampled values; known planes come out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.graph import Node, Ref
from netweight.verification.order import RULES, windows
from netweight.verification.relax import Interval

B, S = 2, 3


def node_of(op, shape, names=("self",), overload="", **params):
    refs = {name: Ref(name) for name in names}
    return Node(op, f"aten.{op}", overload, tuple(names), {**params, **refs}, tuple(shape), torch.float64, "")


def each(function):
    """The function of one example, for samples of a batch of boxes: three axes in front."""
    return torch.vmap(torch.vmap(torch.vmap(function)))


def boxes(shapes, generator, width=1.0):
    """Boxes `b 1 *shape`; some elements are points, some dominate, some values are equal."""
    centre = [torch.randn(B, 1, *shape, generator=generator).double().round(decimals=1) for shape in shapes]
    radius = [width * torch.rand(c.shape, generator=generator).double() for c in centre]
    for r, c in zip(radius, centre):
        r[torch.rand(r.shape, generator=generator) < 0.15] = 0.0
        c[torch.rand(c.shape, generator=generator) < 0.1] += 3.0
    return [Interval(c - r, c + r) for c, r in zip(centre, radius)]


def inside(x, count, generator):
    share = torch.rand(count, *x.lower.shape, generator=generator).double()
    corner = torch.rand(count, 1, *[1] * (x.lower.ndim - 1), generator=generator) < 0.5
    share = torch.where(corner, share.round(), share)
    return x.lower + share * (x.upper - x.lower)


def value_of(a, result):
    return (a * result).flatten(3).sum(3) if result.ndim > 3 else a * result


def check(node, function, boxes, generator, alpha=None, count=150, a=None):
    """<a, f(values)> >= sum <rows, value> + bias at sampled values; gives the least gap of each row."""
    a = torch.randn(B, S, *node.shape, generator=generator).double() if a is None else a
    p = {**node.params, **dict(zip(node.inputs, boxes))}
    rows, bias = RULES[node.op](node, a, p, alpha)
    samples = [inside(x, count, generator) for x in boxes]
    found = bias
    for name, x, sample in zip(node.inputs, boxes, samples):
        assert rows[name].shape == (B, S, *x.lower.shape[2:])
        found = found + value_of(rows[name], sample)
    true = value_of(a, function(*samples))
    assert (found <= true + 1e-9 * (1 + true.abs())).all()
    return (true - found).amin(0)


def choices(node, generator):
    return tuple(torch.rand(B, S, *node.shape, generator=generator).double() for _ in range(2))


def pooled(name, shape, **settings):
    """(node, function, shape) of a pool of one example of `shape`."""
    count = int(name[-2])
    defaults = {"stride": [], "padding": [0] * count, "dilation": [1] * count, "ceil_mode": False}
    p = {**defaults, **settings}

    def function(x):
        lead = x.shape[: -len(shape)]
        return getattr(F, name)(
            x.reshape(-1, *shape[-count - 1 :]), p["kernel_size"], p["stride"] or None, p["padding"],
            p["dilation"], p["ceil_mode"],
        ).unflatten(0, (*lead, *shape[: -count - 1]))  # fmt: skip

    return node_of(name, function(torch.zeros(shape)).shape, **p), function, shape


POOLS = {
    "plain": pooled("max_pool2d", (1, 2, 6, 4), kernel_size=[2, 2]),
    "stride and padding": pooled(
        "max_pool2d", (1, 2, 7, 5), kernel_size=[3, 2], stride=[2, 3], padding=[1, 1]
    ),
    "dilated": pooled("max_pool2d", (1, 1, 7, 6), kernel_size=[2, 3], stride=[1, 2], dilation=[3, 2]),
    "ceil": pooled(
        "max_pool2d", (2, 1, 6, 5), kernel_size=[3, 3], stride=[2, 2], padding=[1, 0], ceil_mode=True
    ),
    "one axis": pooled("max_pool1d", (1, 2, 9), kernel_size=[3], stride=[2], padding=[1], ceil_mode=True),
    "three axes": pooled(
        "max_pool3d", (1, 2, 4, 3, 5), kernel_size=[2, 2, 3], stride=[2, 1, 2], padding=[1, 0, 1]
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_no_values_leave_the_planes_of_a_pool(name):
    node, function, shape = POOLS[name]
    generator = torch.Generator().manual_seed(0)
    for width in (0.0, 0.3, 2.0):
        for alpha in (None, choices(node, generator)):
            gap = check(node, function, boxes([shape], generator, width), generator, alpha)
            assert width > 0 or gap.abs().max() < 1e-9


@pytest.mark.parametrize(("size", "out"), [((7, 5), (3, 2)), ((4, 4), (4, 2)), ((3, 5), (5, 1))])
def test_no_values_leave_the_planes_of_an_adaptive_pool(size, out):
    node = node_of("adaptive_max_pool2d", (1, 2, *out), output_size=list(out))
    generator = torch.Generator().manual_seed(1)

    def function(x):
        return F.adaptive_max_pool2d(x.flatten(0, 3), out).unflatten(0, x.shape[:4])

    for width in (0.0, 1.0):
        gap = check(node, function, boxes([(1, 2, *size)], generator, width), generator)
        assert width > 0 or gap.abs().max() < 1e-9


def test_windows_are_those_of_unfold():
    node, _, shape = POOLS["stride and padding"]
    p = node.params
    index = windows(shape[-2:], node.shape[-2:], p)
    plane = torch.arange(1.0, 36.0).reshape(1, 1, 7, 5)
    unfolded = F.unfold(plane, p["kernel_size"], p["dilation"], p["padding"], p["stride"])[0].T
    assert torch.equal(index.float() + 1, unfolded)  # 0 where unfold pads


AXES = {
    "amax": (node_of("amax", (2, 1, 4), dim=[-2], keepdim=True), lambda x: x.amax(-2, keepdim=True)),
    "amax of two axes": (node_of("amax", (3,), dim=[0, 2], keepdim=False), lambda x: x.amax((3, 5))),
    "amin": (node_of("amin", (2, 3), dim=[2], keepdim=False), lambda x: x.amin(-1)),
    "max": (node_of("max", (3, 4), overload="dim", dim=0, keepdim=False), lambda x: x.amax(3)),
    "max of all": (node_of("max", ()), lambda x: x.flatten(3).amax(3)),
    "min": (node_of("min", (2, 4), overload="dim", dim=1, keepdim=False), lambda x: x.amin(4)),
}


@pytest.mark.parametrize("name", AXES)
def test_no_values_leave_the_planes_of_the_largest_along_axes(name):
    node, function = AXES[name]
    generator = torch.Generator().manual_seed(2)
    for width in (0.0, 0.5, 2.0):
        for alpha in (None, choices(node, generator)):
            gap = check(node, function, boxes([(2, 3, 4)], generator, width), generator, alpha)
            assert width > 0 or gap.abs().max() < 1e-9


@pytest.mark.parametrize("shapes", [[(2, 4), (2, 4)], [(2, 1, 4), (3, 1)], [(4,), (1,)]])
@pytest.mark.parametrize("name", ["maximum", "minimum", "max", "min"])
def test_no_values_leave_the_planes_of_the_larger_of_two(name, shapes):
    out = torch.broadcast_shapes(*shapes)
    node = node_of(name, out, ("self", "other"), "other" if name in ("max", "min") else "default")
    generator = torch.Generator().manual_seed(3)
    for width in (0.0, 0.5, 2.0):
        for alpha in (None, choices(node, generator)):
            box = boxes(shapes, generator, width)
            gap = check(node, each(getattr(torch, name)), box, generator, alpha)
            assert width > 0 or gap.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_one_of_two_may_be_constant(name):
    floor = torch.tensor([-0.5, 0.0, 0.3, 9.0]).double()
    node = node_of(name, (2, 4), ("other",), self=floor)
    generator = torch.Generator().manual_seed(4)
    for alpha in (None, choices(node, generator)):
        check(node, lambda x: getattr(torch, name)(floor, x), boxes([(2, 4)], generator), generator, alpha)


def test_relu_is_the_larger_of_x_and_0():
    """With 0 as the other value the planes are the lines of relu."""
    x = Interval(*(torch.tensor([[[v]]]).double() for v in (-1.0, 3.0)))
    node = node_of("maximum", (1,), ("self",), other=torch.tensor(0.0).double())
    a = torch.tensor([[[1.0], [-1.0]]]).double()
    rows, bias = RULES["aten.maximum"](node, a, {"self": x, "other": torch.tensor(0.0).double()}, None)
    assert rows["self"].flatten().tolist() == pytest.approx([0.0, -0.75])  # 0 has the larger lower bound
    assert bias.flatten().tolist() == pytest.approx([0.0, -0.75])
    half = (torch.full((1, 1, 1), 1.0).double(),) * 2
    rows, _ = RULES["aten.maximum"](node, a, {"self": x, "other": torch.tensor(0.0).double()}, half)
    assert rows["self"].flatten().tolist() == pytest.approx([1.0, -0.75])  # x has the larger centre


def test_the_smallest_takes_the_upper_choice():
    """min(x, 0) <= alpha x above, which is minus the line below max(-x, 0)."""
    x = Interval(*(torch.tensor([[[v]]]).double() for v in (-3.0, 1.0)))
    zero = torch.tensor(0.0).double()
    node = node_of("minimum", (1,), ("self",), other=zero)
    alpha = (torch.full((1, 1, 1), 0.0).double(), torch.full((1, 1, 1), 0.7).double())
    rows, _ = RULES["aten.minimum"](
        node, torch.tensor([[[-1.0]]]).double(), {"self": x, "other": zero}, alpha
    )
    assert float(rows["self"]) == pytest.approx(-0.7)


def test_never_looser_than_intervals_when_read_off_at_once():
    node = node_of("amax", (2, 3), dim=[-1], keepdim=False)
    generator = torch.Generator().manual_seed(5)
    (x,) = boxes([(2, 3, 4)], generator, 2.0)
    middle = x.centre
    for sign, end in ((1.0, x.lower), (-1.0, x.upper)):
        a = sign * torch.eye(6).double().reshape(1, 6, 2, 3).expand(B, 6, 2, 3)
        rows, bias = RULES["aten.amax"](node, a, {**node.params, "self": x}, None)
        rows = rows["self"]
        constant = sign * end.amax(-1).flatten(2).expand(B, 1, 6).squeeze(1)
        if sign > 0:
            found = (rows * x.lower).flatten(2).sum(2) + bias
        else:
            found = (rows * middle).flatten(2).sum(2) + bias
        assert (found >= constant - 1e-12).all()


def test_what_dominates_is_exact():
    x = Interval(torch.tensor([[[1.0, -2.0, 0.5]]]).double(), torch.tensor([[[2.0, 1.0, 0.9]]]).double())
    node = node_of("amax", (), dim=[0], keepdim=False)
    a = torch.tensor([[3.0, -2.0]]).double()
    rows, bias = RULES["aten.amax"](node, a, {**node.params, "self": x}, None)
    assert rows["self"].tolist() == [[[3.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]] and bias.abs().max() == 0


def test_infinite_ends_give_constants_and_no_nan():
    inf = torch.inf
    x = Interval(torch.tensor([[[[-inf, -1.0, 0.0], [-inf, -inf, -inf]]]]).double(),
                 torch.tensor([[[[1.0, 2.0, inf], [1.0, -inf, 0.5]]]]).double())  # fmt: skip
    node = node_of("amax", (2,), dim=[1], keepdim=False)
    a = torch.tensor([[[1.0, 1.0], [0.0, -1.0], [-1.0, 0.0]]]).double()
    rows, bias = RULES["aten.amax"](node, a, {**node.params, "self": x}, None)
    assert rows["self"].isfinite().all() and bias[0, 1] == -1.0 and bias[0, 2] == -inf
    p = {"kernel_size": [2, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "ceil_mode": False}
    pool = node_of("max_pool2d", (1, 3, 3), **p)
    generator = torch.Generator().manual_seed(6)
    a = torch.randn(1, 4, 1, 3, 3, generator=generator).double()
    alpha = tuple(torch.rand(1, 4, 1, 3, 3, generator=generator).double() for _ in range(2))
    plane = Interval(x.lower.unsqueeze(2), x.upper.unsqueeze(2))
    rows, bias = RULES[pool.op](pool, a, {**p, "self": plane}, alpha)
    assert rows["self"].isfinite().all() and not bias.isnan().any()


SORTS = {
    "sort": (node_of("sort", (2, 5), dim=-1, descending=False), lambda x: x.sort(-1).values),
    "sort, falling": (
        node_of("sort", (5, 2), dim=0, descending=True), lambda x: x.sort(-2, descending=True).values,
    ),
    "topk": (node_of("topk", (2, 3), dim=1, k=3, largest=True, sorted=True), lambda x: x.topk(3, -1).values),
    "topk, smallest": (
        node_of("topk", (2, 2), dim=1, k=2, largest=False, sorted=True),
        lambda x: x.topk(2, -1, False).values,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SORTS)
def test_no_values_leave_the_bounds_of_sorted_ones(name):
    node, function = SORTS[name]
    shape = (5, 2) if name == "sort, falling" else (2, 5)
    generator = torch.Generator().manual_seed(7)
    for width in (0.0, 0.2, 0.2, 1.0):
        gap = check(node, function, boxes([shape], generator, width), generator)
        assert width > 0 or gap.abs().max() < 1e-9


def test_what_is_surely_at_a_place_keeps_its_rows():
    x = Interval(
        torch.tensor([[[5.0, 0.0, 0.5, -9.0]]]).double(), torch.tensor([[[6.0, 1.0, 1.5, -8.0]]]).double()
    )
    node = node_of("sort", (4,), dim=0, descending=True)
    a = torch.tensor([[[1.0, 2.0, -3.0, 4.0]]]).double()
    rows, bias = RULES["aten.sort"](node, {0: a}, {**node.params, "self": x}, None)
    assert rows["self"].tolist() == [[[1.0, 0.0, 0.0, 4.0]]]
    assert float(bias) == 2 * 0.5 - 3 * 1.0  # the second is at least 0.5, the third at most 1


@given(seed=st.integers(0, 2**20), width=st.floats(0, 5), name=st.sampled_from(sorted(POOLS)))
@settings(max_examples=15, deadline=None)
def test_no_values_leave_the_planes_of_any_draw(seed, width, name):
    node, function, shape = POOLS[name]
    generator = torch.Generator().manual_seed(seed)
    alpha = choices(node, generator) if seed % 2 else None
    check(node, function, boxes([shape], generator, width), generator, alpha, 60)
