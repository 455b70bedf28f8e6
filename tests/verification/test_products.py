"""Rows through products, quotients and choices never exceed the sampled values; known planes come out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.graph import Node, Ref
from netweight.verification.products import RULES
from netweight.verification.relax import Interval

B, S = 2, 3


def node_of(op, shape, names=("self", "other"), **params):
    """One operator whose params of these names are perturbed."""
    refs = {name: Ref(name) for name in names}
    return Node(op, f"aten.{op}", "", tuple(names), {**params, **refs}, tuple(shape), torch.float64, "")


def each(function):
    """The function of one example, for samples of a batch of boxes: three axes in front."""
    return torch.vmap(torch.vmap(torch.vmap(function)))


def boxes(shapes, generator, width=1.0):
    centre = [torch.randn(B, 1, *shape, generator=generator).double() for shape in shapes]
    radius = [width * torch.rand(c.shape, generator=generator).double() for c in centre]
    for r in radius:
        r[torch.rand(r.shape, generator=generator) < 0.15] = 0.0
    return [Interval(c - r, c + r) for c, r in zip(centre, radius)]


def inside(x, count, generator):
    share = torch.rand(count, *x.lower.shape, generator=generator).double()
    corner = torch.rand(count, 1, *[1] * (x.lower.ndim - 1), generator=generator) < 0.5
    share = torch.where(corner, share.round(), share)
    return x.lower + share * (x.upper - x.lower)


def value_of(a, result):
    return (a * result).flatten(3).sum(3) if result.ndim > 3 else a * result


def check(node, function, boxes, names, generator, alpha=None, count=200, samples=None, a=None):
    """<a, f(values)> >= sum <rows, value> + bias at sampled values; gives the least gap of each row."""
    a = torch.randn(B, S, *node.shape, generator=generator).double() if a is None else a
    p = {**node.params, **dict(zip(names, boxes))}
    rows, bias = RULES[node.op](node, a, p, alpha)
    samples = [inside(x, count, generator) for x in boxes] if samples is None else samples
    found = bias
    for name, x, sample in zip(names, boxes, samples):
        if name in rows:
            assert rows[name].shape == (B, S, *x.lower.shape[2:])
            found = found + value_of(rows[name], sample)
    true = value_of(a, each(function)(*samples))
    assert (found <= true + 1e-9 * (1 + true.abs())).all()
    return (true - found).amin(0)


def choices(node, generator, rows=S):
    return tuple(torch.rand(B, rows, *node.shape, generator=generator).double() for _ in range(2))


PRODUCTS = {  # function, node, shapes
    "mul": (torch.mul, node_of("mul", (1, 4)), [(1, 4), (1, 4)]),
    "mul, broadcast": (torch.mul, node_of("mul", (3, 2, 4)), [(3, 1, 4), (2, 1)]),
    "mul by one number": (torch.mul, node_of("mul", (1, 5)), [(1, 5), (1, 1)]),
    "matmul": (torch.matmul, node_of("matmul", (3, 2)), [(3, 4), (4, 2)]),
    "matmul of stacks": (torch.matmul, node_of("matmul", (2, 3, 3, 2)), [(2, 1, 3, 4), (3, 4, 2)]),
    "vector and matrix": (torch.matmul, node_of("matmul", (3,)), [(4,), (4, 3)]),
    "matrix and vector": (torch.matmul, node_of("matmul", (3,)), [(3, 4), (4,)]),
    "vectors": (torch.matmul, node_of("matmul", ()), [(4,), (4,)]),
    "stack and vector": (torch.matmul, node_of("matmul", (2, 3)), [(2, 3, 4), (4,)]),
    "bmm": (torch.bmm, node_of("bmm", (2, 3, 3), ("self", "mat2")), [(2, 3, 4), (2, 4, 3)]),
    "mm": (torch.mm, node_of("mm", (3, 2), ("self", "mat2")), [(3, 4), (4, 2)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("chosen", [False, True])
def test_no_values_leave_the_planes_of_a_product(name, chosen):
    function, node, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    for width in (0.0, 1e-3, 1.0, 5.0):
        alpha = choices(node, generator) if chosen else None
        gap = check(node, function, boxes(shapes, generator, width), node.inputs, generator, alpha)
        assert width > 0 or gap.abs().max() < 1e-12  # products of points are exact


def test_sums_with_a_product():
    generator = torch.Generator().manual_seed(2)
    names, shapes = ("self", "mat1", "mat2"), [(1, 3), (2, 4), (4, 3)]
    node = node_of("addmm", (2, 3), names, beta=0.5, alpha=-2.0)
    check(node, lambda m, x, y: 0.5 * m - 2 * x @ y, boxes(shapes, generator), names, generator)
    names, shapes = ("self", "batch1", "batch2"), [(2, 3, 3), (2, 3, 4), (2, 4, 3)]
    node = node_of("baddbmm", (2, 3, 3), names, beta=1, alpha=1)
    check(node, torch.baddbmm, boxes(shapes, generator), names, generator)
    fixed = torch.randn(2, 3, 3, generator=generator).double()
    node = node_of("baddbmm", (2, 3, 3), names[1:], beta=1, alpha=1, self=fixed)
    function = lambda x, y: fixed + x @ y  # noqa: E731
    check(node, function, boxes(shapes[1:], generator), names[1:], generator)


def planes_of(a, x, y, alpha):
    node = node_of("mul", (1,))
    box = [Interval(*(torch.tensor(end).double().reshape(1, 1, 1) for end in ends)) for ends in (x, y)]
    alpha = None if alpha is None else (torch.tensor(alpha),) * 2
    rows, bias = RULES["aten.mul"](
        node, torch.tensor([[[a]]]).double(), dict(zip(("self", "other"), box)), alpha
    )
    return float(rows["self"]), float(rows["other"]), float(bias)


def test_the_planes_of_mccormick_by_hand():
    x, y = (-1.0, 3.0), (2.0, 5.0)
    assert planes_of(1.0, x, y, 0.0) == pytest.approx((2.0, -1.0, 2.0))  # lx y + ly x - lx ly
    assert planes_of(1.0, x, y, 1.0) == pytest.approx((5.0, 3.0, -15.0))  # ux y + uy x - ux uy
    assert planes_of(-1.0, x, y, 1.0) == pytest.approx((-2.0, -3.0, 6.0))  # -(ux y + ly x - ux ly)
    assert planes_of(-1.0, x, y, 0.0) == pytest.approx((-5.0, 1.0, -5.0))  # -(lx y + uy x - lx uy)
    assert planes_of(1.0, x, y, None) == pytest.approx((3.5, 1.0, -3.5 - 2.0 * 1.5))


@pytest.mark.parametrize("name", ["mul", "matmul"])
def test_each_plane_touches_at_corners(name):
    function, shapes = PRODUCTS[name][0], [(1, 1), (1, 1)]
    node = node_of(name, (1, 1))
    generator = torch.Generator().manual_seed(3)
    box = boxes(shapes, generator)
    corners = [torch.stack([x.lower, x.lower, x.upper, x.upper]) for x in box[:1]]
    corners.append(torch.stack([box[1].lower, box[1].upper] * 2))
    for end in (0.0, 0.5, 1.0):
        alpha = (torch.full((1, 1, *node.shape), end).double(),) * 2
        gap = check(node, function, box, node.inputs, generator, alpha, samples=corners)
        assert gap.abs().max() < 1e-9


def test_the_same_value_twice_is_a_square():
    node = node_of("mul", (1, 6))
    node.params["other"] = node.params["self"]
    generator = torch.Generator().manual_seed(4)
    (x,) = boxes([(1, 6)], generator, 2.0)
    for alpha in (None, choices(node, generator)):
        a = torch.randn(B, S, 1, 6, generator=generator).double()
        rows, bias = RULES["aten.mul"](node, a, {"self": x, "other": x}, alpha)
        assert set(rows) == {"self"}
        s = inside(x, 500, generator)
        found, true = value_of(rows["self"], s) + bias, value_of(a, s * s)
        assert (found <= true + 1e-9).all()
    least = Interval(*(torch.full((B, 1, 1, 6), v).double() for v in (-1.0, 1.0)))
    ones = torch.ones(B, S, 1, 6).double()
    rows, bias = RULES["aten.mul"](node, ones, {"self": least, "other": least}, None)
    assert bias - rows["self"].abs().sum((2, 3)) == pytest.approx(
        0.0, abs=1e-12
    )  # never below 0, where planes give -6


@pytest.mark.parametrize("chosen", [False, True])
def test_quotients(chosen):
    shapes, names = [(2, 4), (4,)], ("self", "other")
    node = node_of("div", (2, 4))
    generator = torch.Generator().manual_seed(5)
    for sign in (1, -1):
        for width in (0.0, 0.3, 2.0):
            x, y = boxes(shapes, generator, width)
            ends = torch.stack(
                [(y.lower.abs() + 0.2) * sign, (y.lower.abs() + 0.2 + (y.upper - y.lower)) * sign]
            )
            y = Interval(ends.amin(0), ends.amax(0))
            alpha = choices(node, generator) if chosen else None
            gap = check(node, torch.div, [x, y], names, generator, alpha)
            assert width > 0 or gap.abs().max() < 1e-9


def test_a_number_over_a_value():
    node = node_of("div", (1, 3), ("other",))
    fixed = torch.tensor([[2.0, -1.0, 0.5]]).double()
    generator = torch.Generator().manual_seed(6)
    (y,) = boxes([(1, 3)], generator)
    y = Interval(y.lower.abs() + 0.1, y.lower.abs() + 0.1 + (y.upper - y.lower))
    node.params["self"] = fixed
    check(node, lambda y: fixed / y, [y], ("other",), generator)


def test_a_divisor_that_can_be_zero_leaves_no_bound_where_it_counts():
    node = node_of("div", (2,))
    x = Interval(torch.ones(1, 1, 2).double(), 2 * torch.ones(1, 1, 2).double())
    y = Interval(torch.tensor([[[-1.0, 1.0]]]).double(), torch.tensor([[[1.0, 2.0]]]).double())
    a = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]]).double()
    rows, bias = RULES["aten.div"](node, a, {"self": x, "other": y}, None)
    assert bias[0, 0].isfinite() and bias[0, 1] == bias[0, 2] == -torch.inf
    assert all(r.isfinite().all() for r in rows.values())


def test_unbounded_factors_leave_no_bound_where_they_count_and_no_nan():
    inf = torch.inf
    for node in (node_of("mul", (2, 2)), node_of("matmul", (2, 2))):
        x = Interval(torch.zeros(1, 1, 2, 2).double(), torch.ones(1, 1, 2, 2).double())
        y = Interval(x.lower.clone(), x.upper.clone())
        y.upper[..., 0] = inf
        a = torch.zeros(1, 2, *node.shape).double()
        a[0, 0, ..., 1] = a[0, 1, ..., 0] = 1.0
        rows, bias = RULES[node.op](node, a, dict(zip(("self", "other"), (x, y))), None)
        assert bias[0, 0].isfinite() and bias[0, 1] == -inf
        assert all(r.isfinite().all() for r in rows.values())


def condition(generator, shape):
    state = torch.randint(3, (B, 1, *shape), generator=generator)  # certainly not, open, certainly
    return Interval(state == 2, state >= 1)


@pytest.mark.parametrize("shapes", [[(2, 4), (2, 4), (2, 4)], [(4,), (2, 1), (2, 4)]])
def test_a_choice_on_an_open_condition_is_either(shapes):
    node = node_of("where", (2, 4), ("condition", "self", "other"))
    generator = torch.Generator().manual_seed(7)
    for width in (0.0, 0.5, 3.0):
        open_, (x, y) = condition(generator, shapes[0]), boxes(shapes[1:], generator, width)
        a = torch.randn(B, S, *node.shape, generator=generator).double()
        rows, bias = RULES["aten.where"](node, a, {"condition": open_, "self": x, "other": y}, None)
        for _ in range(100):
            u, v = inside(x, 1, generator), inside(y, 1, generator)
            coin = torch.rand(open_.lower.shape, generator=generator) < 0.5
            truth = open_.lower | (open_.upper & coin)
            true = value_of(a, each(torch.where)(truth.unsqueeze(0), u, v))
            assert (value_of(rows["self"], u) + value_of(rows["other"], v) + bias <= true + 1e-9).all()


def test_an_open_choice_between_points_is_their_hull():
    node = node_of("where", (1,), ("condition", "self", "other"))
    point = [Interval(*(torch.tensor([[[v]]]).double(),) * 2) for v in (2.0, -1.0)]
    open_ = Interval(torch.tensor([[[False]]]), torch.tensor([[[True]]]))
    a = torch.tensor([[[1.0], [-1.0]]]).double()
    rows, bias = RULES["aten.where"](node, a, {"condition": open_, "self": point[0], "other": point[1]}, None)
    found = 2 * rows["self"].flatten() - rows["other"].flatten() + bias.flatten()
    assert found.tolist() == pytest.approx([-1.0, -2.0])


def test_a_choice_between_constants_is_linear_in_the_condition():
    node = node_of("where", (1, 3), ("condition",))
    a = torch.tensor([[[[1.0, -2.0, 3.0]]]]).double()
    open_ = Interval(torch.zeros(1, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1, 1, 3, dtype=torch.bool))
    p = {"condition": open_, "self": torch.tensor(2.0).double(), "other": torch.tensor(-1.0).double()}
    rows, bias = RULES["aten.where"](node, a, p, None)
    assert rows["condition"].flatten().tolist() == [3.0, -6.0, 9.0] and float(bias) == -2.0


def test_where_of_constants_in_part():
    node = node_of("where", (2, 4), ("condition", "self"))
    generator = torch.Generator().manual_seed(8)
    open_, (x,) = condition(generator, (2, 4)), boxes([(2, 4)], generator)
    a = torch.randn(B, S, 2, 4, generator=generator).double()
    p = {"condition": open_, "self": x, "other": torch.linspace(-1, 1, 4).double()}
    rows, bias = RULES["aten.where"](node, a, p, None)
    assert set(rows) == {"self"}
    u = inside(x, 300, generator)
    for truth in (open_.lower, open_.upper):
        true = value_of(a, torch.where(truth, u, p["other"]))
        assert (value_of(rows["self"], u) + bias <= true + 1e-9).all()


def test_rows_follow_the_choice_differentiably():
    _, node, shapes = PRODUCTS["matmul"]
    generator = torch.Generator().manual_seed(9)
    alpha = tuple(c.requires_grad_() for c in choices(node, generator))
    a = torch.randn(B, S, *node.shape, generator=generator).double()
    rows, bias = RULES[node.op](node, a, dict(zip(node.inputs, boxes(shapes, generator))), alpha)
    (bias.sum() + sum(r.abs().sum() for r in rows.values())).backward()
    assert all(c.grad.isfinite().all() and c.grad.abs().sum() > 0 for c in alpha)


@given(seed=st.integers(0, 2**20), name=st.sampled_from(sorted(PRODUCTS)), width=st.floats(0, 20))
@settings(max_examples=30, deadline=None)
def test_no_values_leave_the_planes_of_any_draw(seed, name, width):
    function, node, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(seed)
    alpha = choices(node, generator) if seed % 2 else None
    check(node, function, boxes(shapes, generator, width), node.inputs, generator, alpha, 100)
