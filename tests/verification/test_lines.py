"""No point leaves the lines; they touch; they are no looser than intervals; a kink's best line is known."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.graph import Node, Ref
from netweight.verification.lines import SCALAR, lines, start, undecided
from netweight.verification.relax import Interval
from netweight.verification.rules import rule_of


def op(name, overload="default", **params):
    """(node, params) of one elementwise operator; its first param is x."""
    shape = (1, 1200)
    return Node(
        name, f"aten.{name}", overload, ("x",), {"self": Ref("x"), **params}, shape, torch.float64, ""
    )


def gelu(kind):
    return op("gelu", approximate=kind), lambda x: F.gelu(x, approximate=kind), 4.0


POSITIVE = ("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "power 1.5", "power 0.3", "power -1.5",
            "power -1", "power -2", "power -3")  # fmt: skip
SMOOTH = {
    "sigmoid": (op("sigmoid"), torch.sigmoid, 8.0),
    "tanh": (op("tanh"), torch.tanh, 4.0),
    "erf": (op("erf"), torch.erf, 3.0),
    "atan": (op("atan"), torch.atan, 6.0),
    "asinh": (op("asinh"), torch.asinh, 6.0),
    "sinh": (op("sinh"), torch.sinh, 4.0),
    "exp": (op("exp"), torch.exp, 5.0),
    "expm1": (op("expm1"), torch.expm1, 5.0),
    "log": (op("log"), torch.log, 5.0),
    "log2": (op("log2"), torch.log2, 5.0),
    "log10": (op("log10"), torch.log10, 5.0),
    "log1p": (op("log1p"), torch.log1p, 0.4),
    "sqrt": (op("sqrt"), torch.sqrt, 5.0),
    "rsqrt": (op("rsqrt"), torch.rsqrt, 5.0),
    "reciprocal": (op("reciprocal"), torch.reciprocal, 5.0),
    "square": (op("square"), torch.square, 5.0),
    **{
        f"power {e:g}": (op("pow", "Tensor_Scalar", exponent=e), lambda x, e=e: x**e, 3.0)
        for e in (0, 1, 2, 3, 4, 5, 1.5, 0.3, -1.5, -1, -2, -3)
    },
    "gelu": gelu("none"),
    "gelu tanh": gelu("tanh"),
    "silu": (op("silu"), F.silu, 8.0),
    "mish": (op("mish"), F.mish, 6.0),
    "hardswish": (op("hardswish"), F.hardswish, 6.0),
    "softplus": (op("softplus", beta=2.0, threshold=20.0), lambda x: F.softplus(x, 2.0), 4.0),
    "softplus cut early": (op("softplus", beta=1.0, threshold=1.5), lambda x: F.softplus(x, 1, 1.5), 4.0),
    "elu": (op("elu", alpha=1.0, scale=1, input_scale=1), F.elu, 4.0),
    "elu 0.5": (op("elu", alpha=0.5, scale=1, input_scale=1), lambda x: F.elu(x, 0.5), 4.0),
    "selu": (
        op("elu", alpha=1.6732632423543772, scale=1.0507009873554805, input_scale=1), F.selu, 4.0,
    ),
    "sin": (op("sin"), torch.sin, 5.0),
    "cos": (op("cos"), torch.cos, 5.0),
}  # fmt: skip
KINKS = {
    "relu": (op("relu"), F.relu, 2.0),
    "leaky relu": (op("leaky_relu", negative_slope=0.1), lambda x: F.leaky_relu(x, 0.1), 2.0),
    "leaky relu that falls": (op("leaky_relu", negative_slope=-0.3), lambda x: F.leaky_relu(x, -0.3), 2.0),
    "leaky relu, concave": (op("leaky_relu", negative_slope=1.7), lambda x: F.leaky_relu(x, 1.7), 2.0),
    "prelu": (
        op("prelu", weight=torch.tensor([-0.4], dtype=torch.float64)),
        lambda x: torch.where(x > 0, x, -0.4 * x), 2.0,
    ),
    "relu6": (op("hardtanh", min_val=0.0, max_val=6.0), F.relu6, 5.0),
    "hardtanh": (op("hardtanh", min_val=-1.0, max_val=1.0), F.hardtanh, 2.0),
    "clamp": (op("clamp", min=-0.3, max=0.6), lambda x: x.clamp(-0.3, 0.6), 1.0),
    "clamp from below": (op("clamp", min=0.2, max=None), lambda x: x.clamp(min=0.2), 1.0),
    "clamp, wrong way round": (op("clamp", min=0.6, max=-0.3), lambda x: x.clamp(0.6, -0.3), 1.0),
    "clamp by tensors": (
        op("clamp", "Tensor", min=torch.tensor(-0.25), max=torch.tensor(0.5)),
        lambda x: x.clamp(-0.25, 0.5), 1.0,
    ),
    "clamp_min": (op("clamp_min", min=0.5), lambda x: x.clamp(min=0.5), 2.0),
    "clamp_max": (op("clamp_max", max=-0.5), lambda x: x.clamp(max=-0.5), 2.0),
    "abs": (op("abs"), torch.abs, 2.0),
    "hardsigmoid": (op("hardsigmoid"), F.hardsigmoid, 5.0),
}  # fmt: skip
STEPS = {
    "round": (op("round"), torch.round, 2.0),
    "round to decimals": (op("round", "decimals", decimals=1), lambda x: torch.round(x, decimals=1), 0.3),
    "floor": (op("floor"), torch.floor, 2.0),
    "ceil": (op("ceil"), torch.ceil, 2.0),
    "trunc": (op("trunc"), torch.trunc, 2.0),
    "sign": (op("sign"), torch.sign, 1.0),
    "heaviside": (
        op("heaviside", values=torch.tensor(0.3)), lambda x: torch.heaviside(x, torch.tensor(0.3).to(x)), 1.0,
    ),
    "gt": (op("gt", "Scalar", other=0.25), lambda x: (x > 0.25).to(x), 1.0),
    "ge": (op("ge", "Scalar", other=0.0), lambda x: (x >= 0).to(x), 1.0),
    "lt": (op("lt", "Tensor", other=torch.tensor(-0.5)), lambda x: (x < -0.5).to(x), 1.0),
    "le": (op("le", "Scalar", other=0.0), lambda x: (x <= 0).to(x), 1.0),
}  # fmt: skip
ALL = {**SMOOTH, **KINKS, **STEPS}
QUANTIZED = Node(
    "q", "netweight.quantized", "", ("x",), {"self": Ref("x"), "low": -2.0, "high": 5.0}, (1, 1200),
    torch.float64, "",
)  # fmt: skip
FLOORED = replace(QUANTIZED, op="netweight.floored")


def intervals(scale, positive, seed, count=1200):
    """Narrow, wide, one-sided, crossing, of one point, large; with ends on whole and half numbers."""
    g = torch.Generator().manual_seed(seed)
    centre = scale * torch.randn(1, count, generator=g, dtype=torch.float64)
    width = scale * 10 ** (torch.rand(1, count, generator=g, dtype=torch.float64) * 6 - 5)
    kind = torch.randint(8, (1, count), generator=g)
    width = torch.where(kind == 0, 0.0, width)
    centre = torch.where(kind == 1, centre * 30, centre)
    lower, upper = centre - width, centre + width
    lower = torch.where(kind == 2, lower.round(), lower)
    upper = torch.where(kind == 3, lower + (upper - lower).ceil() / 2, upper)
    lower = torch.where(kind == 4, torch.zeros_like(lower), lower)
    upper = torch.where(kind == 5, torch.zeros_like(upper), upper)
    lower, upper = torch.minimum(lower, upper), torch.maximum(lower, upper)
    if positive:
        lower, upper = lower.abs().clamp(min=1e-3), upper.abs().clamp(min=1e-3)
        lower, upper = torch.minimum(lower, upper), torch.maximum(lower, upper)
    return lower, upper


def cases(name, seed):
    node, f, scale = ALL[name]
    lower, upper = intervals(scale, name in POSITIVE, seed)
    if name == "log1p":
        lower, upper = lower.clamp(min=-0.95), upper.clamp(min=-0.95)
    return node, f, Interval(lower, upper)


def params(node, x):
    return {**node.params, "self": x}


def values(found, x):
    lower = found.lower_slope * x + (0.0 if found.lower is None else found.lower)
    return lower, found.upper_slope * x + (0.0 if found.upper is None else found.upper)


def points(x, generator, count=32):
    share = torch.rand(count, *x.lower.shape, generator=generator, dtype=torch.float64)
    share[0], share[1] = 0.0, 1.0
    share[2:8] = share[2:8] ** 6  # close to an end
    share[8:12] = 1 - share[8:12] ** 6
    s = x.lower + share * (x.upper - x.lower)
    return torch.minimum(torch.maximum(s, x.lower), x.upper)


def covered(found, f, s):
    """Whether lower <= f <= upper at the points, up to a few roundings."""
    low, high = values(found, s)
    y = f(s)
    slack = 1e-13 * (1 + y.abs() + (found.lower_slope * s).abs() + (found.upper_slope * s).abs())
    return bool((low <= y + slack).all()) and bool((y <= high + slack).all())


@pytest.mark.parametrize("name", ALL)
def test_no_point_leaves_the_lines_whichever_is_chosen(name):
    node, f, x = cases(name, 0)
    generator = torch.Generator().manual_seed(1)
    s = points(x, generator)
    assert covered(lines(node, params(node, x), x), f, s)
    for draw in (torch.rand, lambda *n, **kw: torch.randint(2, n, **kw)):
        alpha = tuple(draw(1, 1200, generator=generator, dtype=torch.float64) for _ in range(2))
        assert covered(lines(node, params(node, x), x, alpha), f, s)


@pytest.mark.parametrize("name", ALL)
def test_on_one_point_the_lines_meet_the_value(name):
    node, f, x = cases(name, 2)
    point = Interval(x.lower, x.lower)
    found, y = lines(node, params(node, point), point), f(point.lower)
    slack = 2e-9 if name == "softplus" else 0.0  # 10 lies on the threshold, where the network may round
    slack = slack + 1e-13 * (1 + y.abs() + (found.upper_slope.abs() + found.lower_slope.abs()) * point.size)
    for value in values(found, point.lower):
        assert ((value - y).abs() <= slack).all()


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("heaviside", "softplus cut early")])
def test_the_mean_gap_is_not_larger_than_that_of_the_interval(name):
    node, f, x = cases(name, 3)
    boxed = rule_of(node)(node, params(node, x), 0.0)
    boxed = Interval(boxed.lower.double(), boxed.upper.double())
    width = boxed.upper - boxed.lower
    middle = (x.lower + x.upper) / 2
    found = lines(node, params(node, x), x)
    low, high = values(found, middle)
    size = 1 + width + boxed.size + (found.lower_slope.abs() + found.upper_slope.abs()) * x.size
    assert (high - low <= width + 2e-11 * size).all()


@pytest.mark.parametrize("name", ALL)
def test_each_line_touches_and_the_one_without_alpha_is_the_lowest_over_the_middle(name):
    node, f, x = cases(name, 4)
    x = Interval(x.lower, torch.maximum(x.upper, x.lower + 1e-3))
    p, middle = params(node, x), (x.lower + x.upper) / 2
    s = x.lower + (x.upper - x.lower) * torch.linspace(0, 1, 301, dtype=torch.float64).reshape(-1, 1, 1)
    best = lines(node, p, x)
    low, high = values(best, s)
    size = f(s).abs().amax(0) + (best.lower_slope.abs() + best.upper_slope.abs()) * x.size
    slack = (
        1e-9 * (1 + size)
        + 0.02 * (f(s).amax(0) - f(s).amin(0))
        + (0.012 if name == "softplus cut early" else 0)
    )
    if name not in STEPS:  # a step touches its line between two points of the grid
        slack = slack + (0.25 if name == "softplus cut early" else 0)
        assert ((f(s) - low).amin(0) <= slack).all() and ((high - f(s)).amin(0) <= slack).all()
    given = start(node, p, x)
    again = values(lines(node, p, x, given), middle)
    for one, two in zip(values(best, middle), again):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    for choice in (0.0, 0.3, 0.8, 1.0):
        alpha = torch.full_like(middle, choice)
        other = values(lines(node, p, x, (alpha, alpha)), middle)
        tiny = 1e-7 * (1 + size)
        assert (other[0] <= values(best, middle)[0] + tiny).all()
        assert (other[1] >= values(best, middle)[1] - tiny).all()


def hull_over_the_middle(f, lower, upper):
    """The least concave function above f at the middle, by all chords of a fine grid."""
    kinks = torch.arange(-200, 201, dtype=torch.float64) / 20
    x = torch.cat([torch.linspace(lower, upper, 1501, dtype=torch.float64), kinks.clamp(lower, upper)])
    y, m = f(x), (lower + upper) / 2
    left, right = x <= m, x >= m
    xl, yl, xr, yr = x[left][:, None], y[left][:, None], x[right][None], y[right][None]
    share = torch.where(xr > xl, (m - xl) / (xr - xl).clamp(min=1e-300), 0.0)
    return float((yl + share * (yr - yl)).amax())


@pytest.mark.parametrize("name", [n for n in (*SMOOTH, *KINKS) if n != "softplus cut early"])
def test_the_lines_are_the_hull_over_the_middle(name):
    node, f, scale = ALL[name]
    g = torch.Generator().manual_seed(5)
    for _ in range(6):
        lower, upper = sorted((scale * torch.randn(2, generator=g, dtype=torch.float64)).tolist())
        if name in (*POSITIVE, "log1p"):
            lower, upper = sorted((abs(lower) + 0.1, abs(upper) + 0.3))
        x = Interval(*(torch.full((1, 1), v, dtype=torch.float64) for v in (lower, upper)))
        low, high = values(lines(node, params(node, x), x), torch.tensor((lower + upper) / 2))
        size = float(f(torch.linspace(lower, upper, 99, dtype=torch.float64)).abs().amax())
        assert float(high) == pytest.approx(hull_over_the_middle(f, lower, upper), abs=2e-5 * (1 + size))
        assert float(low) == pytest.approx(
            -hull_over_the_middle(lambda x: -f(x), lower, upper), abs=2e-5 * (1 + size)
        )


@pytest.mark.parametrize("name", ALL)
def test_float32_lines_hold_in_real_arithmetic(name):
    node, f, x = cases(name, 6)
    single = Interval(x.lower.float(), torch.maximum(x.upper.float(), x.lower.float()))
    alpha = tuple(torch.rand(1, 1200, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    wide = Interval(single.lower.double(), single.upper.double())
    s = points(wide, torch.Generator().manual_seed(8))
    for choice in (None, alpha):
        found = lines(node, params(node, single), single, choice)
        parts = [found.lower_slope, found.lower, found.upper_slope, found.upper]
        assert all(t is None or t.dtype == torch.float32 for t in parts)
        double = type(found)(*(None if t is None else t.double() for t in parts))
        if name == "relu":  # written out in float32; the engine pays for its rounding
            double = type(found)(
                double.lower_slope, None, double.upper_slope, double.upper + 3e-7 * single.size.double()
            )
        assert covered(double, f, s)


@pytest.mark.parametrize("name", ALL)
def test_infinite_ends_leave_constants_or_infinities_and_never_nan(name):
    node, f, _ = ALL[name]
    inf = math.inf
    ends = torch.tensor([[-inf, inf], [-inf, 1.0], [-1.0, inf], [-inf, -1.0], [1.0, inf]]).double()
    x = Interval(*(end.reshape(1, -1) for end in ends.unbind(1)))
    alpha = (torch.full((1, 5), 0.5).double(),) * 2
    for choice in (None, alpha):
        found = lines(node, params(node, x), x, choice)
        for part in (found.lower_slope, found.lower, found.upper_slope, found.upper):
            assert part is None or not part.isnan().any()
        assert found.lower_slope.isfinite().all() and found.upper_slope.isfinite().all()
        s = torch.tensor([1e6, 1e3, 3.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, -1e3, -1e6]).double().reshape(-1, 1)
        if name in (*POSITIVE, "log1p"):
            continue
        inside = (s >= x.lower) & (s <= x.upper)
        low, high = values(found, s)
        assert ((low <= f(s) + 1e-9) | ~inside).all() and ((high >= f(s) - 1e-9) | ~inside).all()


def test_relu_by_hand():
    x = Interval(
        torch.tensor([[-1.0, -3.0, 1.0, -2.0, 0.0, -2.0]]), torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.0, 0.0]])
    )
    found = lines(op("relu"), {"self": x}, x)
    assert found.lower is None
    assert found.lower_slope.tolist() == [[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert found.upper_slope.tolist() == [[0.75, 0.25, 1.0, 0.0, 0.0, 0.0]]
    assert found.upper.tolist() == [[0.75, 0.75, 0.0, 0.0, 0.0, 0.0]]
    chosen = lines(op("relu"), {"self": x}, x, (torch.tensor(0.4), torch.tensor(0.0)))
    torch.testing.assert_close(chosen.lower_slope, torch.tensor([[0.4, 0.4, 1.0, 0.0, 0.0, 0.0]]))


def test_a_clamp_that_is_crossed_on_both_sides_has_two_candidates():
    node, x = (
        op("clamp", min=0.0, max=1.0),
        Interval(torch.tensor([[-1.0]]).double(), torch.tensor([[4.0]]).double()),
    )
    p, end = params(node, x), torch.tensor([[1.0]]).double()
    first, last = (lines(node, p, x, (end * a, end * a)) for a in (0.0, 1.0))
    assert (float(first.upper_slope), float(last.upper_slope)) == pytest.approx(
        (0.5, 0.0)
    )  # (1 - 0) / (1 + 1)
    assert float(first.upper) == pytest.approx(0.5) and float(last.upper) == pytest.approx(1.0)
    assert (float(first.lower_slope), float(last.lower_slope)) == pytest.approx(
        (0.0, 0.25)
    )  # (1 - 0) / (4 - 0)


def test_rounding_of_one_cell_is_a_constant_and_of_many_has_slope_one():
    x = Interval(torch.tensor([[0.6, -99.7]]).double(), torch.tensor([[1.4, 100.2]]).double())
    found = lines(op("round"), {"self": x}, x)
    assert found.lower_slope[0, 0] == 0 and float(found.upper[0, 0]) == pytest.approx(1.0)
    assert float(found.upper_slope[0, 1]) == pytest.approx(1.0, abs=0.01)
    assert float(found.upper[0, 1]) == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("node", [QUANTIZED, FLOORED], ids=lambda node: node.op)
def test_rounding_that_is_clamped_lies_within_its_own_lines(node):
    lower, upper = intervals(4.0, False, 9)
    x = Interval(lower, upper)
    s = points(x, torch.Generator().manual_seed(10))

    def f(x):
        return (x.floor() if node is FLOORED else x.round()).clamp(-2, 5)

    for alpha in (None, (torch.rand(1, 1200).double(), torch.rand(1, 1200).double())):
        assert covered(lines(node, {**node.params, "self": x}, x, alpha), f, s)
    wide = Interval(torch.tensor([[-10.0]]).double(), torch.tensor([[10.0]]).double())
    found = lines(node, {**node.params, "self": wide}, wide)
    assert float(found.upper_slope * 0 + found.upper) < 5.0 < 5.6  # the hull, not round's line through 10.5


@pytest.mark.parametrize("name", ["gt", "ge", "lt", "le"])
def test_a_constant_may_stand_on_either_side_of_a_comparison(name):
    x = Interval(torch.tensor([[-1.0, 0.0, 0.5]]).double(), torch.tensor([[2.0, 0.0, 1.0]]).double())
    node = Node(name, f"aten.{name}", "Tensor", ("x",), {}, (1, 3), torch.bool, "")
    found = lines(node, {"self": torch.zeros(1, 3).double(), "other": x}, x)
    compare = getattr(torch, name)
    s = points(x, torch.Generator().manual_seed(0))
    assert covered(found, lambda s: compare(torch.zeros_like(s), s).to(s), s)


@given(seed=st.integers(0, 2**20), name=st.sampled_from(sorted(ALL)))
@settings(max_examples=40, deadline=None)
def test_no_point_leaves_the_lines_of_any_draw(seed, name):
    node, f, scale = ALL[name]
    lower, upper = intervals(scale, name in POSITIVE, seed, 300)
    if name == "log1p":
        lower, upper = lower.clamp(min=-0.95), upper.clamp(min=-0.95)
    x = Interval(lower, upper)
    g = torch.Generator().manual_seed(seed)
    alpha = tuple(torch.rand(3, *lower.shape, generator=g, dtype=torch.float64) for _ in range(2))
    s = points(x, g).unsqueeze(1)
    assert covered(lines(node, params(node, x), x, alpha), f, s)


@pytest.mark.parametrize("name", ["relu", "tanh", "exp", "silu", "abs", "clamp", "sin", "hardswish"])
def test_lines_follow_the_choice_and_the_ends_differentiably(name):
    node, f, _ = ALL[name]
    lower = torch.tensor([[-1.0, -0.2, 0.4]], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([[0.8, 0.9, 1.5]], dtype=torch.float64, requires_grad=True)
    alpha = tuple(torch.full((2, 1, 3), a, dtype=torch.float64, requires_grad=True) for a in (0.3, 0.6))
    x = Interval(lower, upper)
    found = lines(node, {**node.params, "self": x}, x, alpha)
    total = sum(v.sum() for v in values(found, torch.tensor(0.3).double()))
    total.backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (lower, upper))
    assert alpha[0].grad.abs().sum() + (alpha[1].grad.abs().sum() if alpha[1].grad is not None else 0) > 0


def test_what_is_undecided():
    x = Interval(torch.tensor([[-1.0, 0.0, -1.0, 0.2, 0.6]]), torch.tensor([[1.0, 1.0, 0.0, 0.3, 2.0]]))

    def found(name, node=None):
        node = node or ALL[name][0]
        return undecided(node, {**node.params, "self": x}, x)[0].tolist()

    assert found("relu") == [True, False, False, False, False]
    assert found("leaky relu") == [True, False, False, False, False]
    assert found("clamp") == [True, True, True, False, False]  # kinks at -0.3 and 0.6
    assert found("round") == [True, True, True, False, True]
    assert found("sign") == [True, True, True, False, False]
    assert found("gt") == [True, True, False, True, False]
    assert found("tanh") == [True] * 5
    assert found("", QUANTIZED) == [True, True, True, False, True]
    point = Interval(x.lower, x.lower)
    for node, _, _ in ALL.values():
        assert not undecided(node, {**node.params, "self": point}, point).any()


def test_every_operator_is_tried():
    tried = {node.op for node, _, _ in ALL.values()} | {QUANTIZED.op, FLOORED.op}
    assert {"aten.relu6", "aten._prelu_kernel"} == SCALAR - tried  # names of two that are
