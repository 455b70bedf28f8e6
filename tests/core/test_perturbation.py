"""Sets against their definitions in rationals and by enumeration: points inside, bounds never too small."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core import grid
from netweight.core.ascent import ascend
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import (
    L1,
    L2,
    BitFlips,
    Box,
    EdgeFlips,
    Linf,
    Perturbation,
    Rounding,
    WeightLinf,
    parse,
    with_range,
)

BALLS = (Linf, L2, L1)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RADII = (0.0, 1e-9, 3e-4, 2 / 255, 0.1, 1 / 3, 2.5)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def exactly_inside(ball, s, x):
    """The definition, in rationals."""
    verdicts = []
    for u, v in zip(s.flatten(1).tolist(), x.flatten(1).tolist()):
        moved = [abs(Fraction(a) - Fraction(b)) for a, b in zip(u, v)]
        eps = Fraction(ball.eps)
        near = {Linf: lambda m, e: max(m) <= e, L1: lambda m, e: sum(m) <= e}.get(type(ball))
        inside = near(moved, eps) if near else sum(m * m for m in moved) <= eps * eps
        low, high = (
            (-math.inf if ball.low is None else ball.low),
            (math.inf if ball.high is None else ball.high),
        )
        verdicts.append(inside and all(low <= a <= high for a in u))
    return verdicts


@st.composite
def cases(draw):
    """(ball, x, s, seed): x valid, s anywhere, sometimes just at the edge of the ball."""
    g = generator(draw(st.integers(0, 2**20)))
    dtype, ranged = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    kind, eps = draw(st.sampled_from(BALLS)), draw(st.sampled_from(RADII))
    ball = kind(eps, 0.0, 1.0) if ranged else kind(eps)
    shape = (3, *draw(st.sampled_from([(1,), (5,), (2, 4)])))
    x = torch.rand(shape, generator=g, dtype=torch.float64).mul(draw(st.sampled_from([1.0, 1e-4]))).to(dtype)
    if draw(st.booleans()):
        x = x.round()
    reach = draw(st.sampled_from([0.5, 1.0, 20.0]))
    s = x + (torch.randn(shape, generator=g, dtype=torch.float64) * max(eps, 1e-3) * reach).to(dtype)
    return ball, x, s, g


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_points_of_a_ball_are_inside_to_the_last_bit(case):
    ball, x, s, g = case
    assert ball.contains(s, x).tolist() == exactly_inside(ball, s, x)
    for point in (ball.project(s, x), ball.sample(x, g)):
        assert point.dtype == x.dtype and point.shape == x.shape
        assert all(exactly_inside(ball, point, x)) and ball.contains(point, x).all()
        assert torch.equal(ball.project(point, x), point)
        further = torch.nextafter(point, point + (point - x).sign())
        assert ball.contains(further, x).tolist() == exactly_inside(ball, further, x)
    inside = ball.contains(s, x)
    assert torch.equal(ball.project(s, x)[inside], s[inside])


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_corners_and_support_of_a_ball_are_never_too_small_nor_far_off(case):
    ball, x, s, g = case
    a = torch.randn((len(x), 2, *x.shape[1:]), generator=g, dtype=torch.float64).to(x.dtype)
    lower, upper, high = *ball.corners(x), ball.support(a, x)
    for v, left, right in zip(*(t.flatten().tolist() for t in (x, lower, upper))):
        down, up = Fraction(v) - Fraction(ball.eps), Fraction(v) + Fraction(ball.eps)
        if ball.low is not None:
            down, up = max(down, Fraction(0)), min(up, Fraction(1))
        assert left <= down and up <= right
        for edge, inward, bound in ((left, math.inf, down), (right, -math.inf, up)):
            step = torch.nextafter(torch.tensor(edge, dtype=x.dtype), torch.tensor(inward, dtype=x.dtype))
            assert edge == bound or (step.item() > bound if inward > 0 else step.item() < bound)
    for point in (ball.project(s, x), ball.sample(x, g), x):
        for row, value in itertools.product(range(len(x)), range(2)):
            pairs = zip(a[row, value].flatten().tolist(), point[row].flatten().tolist())
            assert sum(Fraction(u) * Fraction(v) for u, v in pairs) <= high[row, value].item()


@pytest.mark.parametrize("kind", BALLS)
def test_support_is_reached_at_the_point_it_is_named_for(kind):
    g = generator(0)
    x, a = torch.randn(4, 6, generator=g), torch.randn(4, 1, 6, generator=g)
    slope = a[:, 0]
    spike = torch.nn.functional.one_hot(slope.abs().argmax(1), 6) * slope.sign()
    best = {Linf: slope.sign(), L2: slope / slope.norm(dim=1, keepdim=True), L1: spike}[kind]
    reached = (slope * (x + 0.3 * best)).sum(1)
    assert torch.allclose(kind(0.3).support(a, x)[:, 0], reached, atol=1e-5)
    assert torch.allclose(
        (kind(0.3).steepest(slope, x) * slope).sum(1), 0.3 * (slope * best).sum(1), atol=1e-5
    )
    cut = kind(0.3, -0.5, 0.5)
    near = x.clamp(-0.5, 0.5)
    assert (
        cut.support(a, near) <= torch.maximum(slope * -0.5, slope * 0.5).sum(1, keepdim=True) + 1e-5
    ).all()


@given(seed=st.integers(0, 2**16), eps=st.floats(0.05, 3))
@settings(max_examples=40, deadline=None)
def test_projections_are_the_nearest_points(seed, eps):
    """Linf clips; L2 keeps the direction; L1 moves what is not x by one amount, the rest by less."""
    g = generator(seed)
    x, s = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(Linf(eps).project(s, x), x + (s - x).clamp(-eps, eps))
    scale = (eps / (s - x).norm(dim=1, keepdim=True)).clamp(max=1)
    assert torch.allclose(L2(eps).project(s, x), x + scale * (s - x))
    point = L1(eps).project(s, x)
    left, moved = (s - point).abs(), (point - x).abs() > 1e-9
    most = left.amax(1, keepdim=True)
    assert torch.allclose(torch.where(moved, left, most), most.expand_as(left), atol=1e-9)
    assert torch.allclose((point - x).abs().sum(1), (s - x).abs().sum(1).clamp(max=eps))


def test_samples_fill_the_ball_by_seed_and_leave_the_global_state_alone():
    x, before = torch.zeros(4000, 3), torch.get_rng_state()
    radius = {Linf: lambda d: d.abs().amax(1), L2: lambda d: d.norm(dim=1), L1: lambda d: d.abs().sum(1)}
    for kind, size in radius.items():
        points = kind(2.0).sample(x, generator(1))
        assert torch.equal(points, kind(2.0).sample(x, generator(1)))
        assert not torch.equal(points, kind(2.0).sample(x, generator(2)))
        share = (size(points) / 2.0) ** 3  # of the volume within that radius: uniform
        assert abs(share.mean() - 0.5) < 0.02 and abs(share.var() - 1 / 12) < 0.01
        assert points.mean(0).abs().max() < 0.1
    assert torch.equal(torch.get_rng_state(), before)


def test_a_ball_refuses_tokens_and_inputs_that_are_not_valid():
    for kind in BALLS:
        with pytest.raises(DoesNotFit, match="whole numbers"):
            kind(0.1).project(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))
        with pytest.raises(BadInput, match="holds 1.5, outside its valid range 0.0 to 1.0"):
            kind(0.1, 0.0, 1.0).corners(torch.tensor([[0.5, 1.5]]))
        nonsense = torch.tensor([[math.nan], [math.inf], [0.0]])
        assert kind(9.0).contains(nonsense, torch.zeros(3, 1)).tolist() == [False, False, True]


def test_rationals_decide_where_float64_rounds_the_sum_onto_the_edge():
    zero = torch.zeros(3, 2)
    s = torch.tensor([[1.0, 2.0**-60], [1.0, 0.0], [-(2.0**-60), -1.0]])
    assert L1(1.0).contains(s, zero).tolist() == L2(1.0).contains(s, zero).tolist() == [False, True, False]
    assert L2(5.0).contains(torch.tensor([[3.0, 4.0]]), zero[:1]).all()
    assert Linf(1.0).contains(1 + s, torch.ones(3, 2)).tolist() == [True, True, True]  # 1 + 2^-60 is 1 here


def test_box_is_its_bounds_in_every_dtype():
    lower, upper = torch.tensor([-0.1, 0.3]), torch.tensor([0.2, 0.3])
    box, x = Box(lower, upper), torch.full((50, 2), 7.0)
    points = box.sample(x, generator(0))
    assert box.contains(points, x).all() and (points[:, 0].max() - points[:, 0].min()) > 0.25
    assert box.project(x, x)[0].tolist() == upper.tolist() and not box.contains(x, x).any()
    assert not box.contains(torch.nextafter(points, x), x).any()  # the second bound leaves one number
    assert torch.equal(box.corners(x)[0], lower.expand(50, 2))
    slope = torch.tensor([[[1.0, -1.0]]]).expand(50, 1, 2)
    assert torch.allclose(box.support(slope, x), torch.tensor(0.2 - 0.3), atol=1e-6)
    low, high = Box(0.1, 0.3).corners(x)
    assert low[0, 0].item() <= 0.1 and high[0, 0].item() >= 0.3
    inside = Box(0.1, 0.3).sample(x, generator(0)).double()
    assert ((inside >= 0.1) & (inside <= 0.3)).all()
    assert torch.allclose(box.steepest(-torch.ones(1, 2), x[:1]), torch.tensor([[-0.15, 0.0]]))
    with pytest.raises(DoesNotFit, match="widen the box"):
        Box(0.1, 0.1).project(x, x)
    for bounds in [(1.0, 0.0), (0.0, math.nan), (-math.inf, 0.0)]:
        with pytest.raises(BadInput, match="lower <= upper"):
            Box(*bounds)


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([-1, 0, 4]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_rounding_holds_what_rounds_to_the_same_codes(bits, symmetric, group, seed):
    weight = torch.randn(3, 8, generator=generator(seed))
    cell, how = Rounding(bits, symmetric, group), grid.Grid(bits, symmetric, group)
    groups = grid.in_groups(weight, group)
    scale, zero = grid.scale_and_zero(*grid.extent(groups, symmetric), how)
    codes = grid.to_codes(groups, scale, zero, how)
    assert cell.contains(weight, weight).all() and cell.contains(grid.nearest(weight, how), weight).all()
    points = cell.sample(weight, generator(seed))
    assert cell.contains(points, weight).all()
    # sampled points round to the code but for ties at the very edge
    again = grid.to_codes(grid.in_groups(points, group), scale, zero, how)
    edge = (points - grid.nearest(weight, how)).abs().reshape(codes.shape) > 0.4999 * scale.float()[:, None]
    assert ((again == codes) | edge).all()
    lower, upper = cell.corners(weight)
    width = (upper - lower).reshape(codes.shape) / scale.float()[:, None]
    assert (width > 0.999).all() and (width < 1.51).all()
    far = cell.project(weight + 100, weight)
    assert cell.contains(far, weight).all() and torch.equal(cell.project(far, weight), far)
    above = torch.nextafter(upper, torch.full_like(upper, math.inf))
    assert not cell.contains(above, weight).any()


def test_weights_move_by_eps():
    weight = torch.randn(4, 3, generator=generator(0))
    near = WeightLinf(0.25).project(weight + 1, weight)
    assert torch.allclose(near, weight + 0.25) and WeightLinf(0.25).contains(near, weight).all()
    assert not WeightLinf(0.2).contains(near, weight).any()
    assert torch.allclose(WeightLinf(0.25).corners(weight)[0], weight - 0.25)


@given(k=st.integers(0, 3), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_bit_flips_by_enumeration(k, seed):
    g = generator(seed)
    x = torch.randint(0, 256, (2, 2), generator=g, dtype=torch.uint8)
    a = torch.randn(2, 2, 2, generator=g)
    flips, memory = BitFlips(k), x.tolist()
    everything = []
    for row in memory:
        word = row[0] | row[1] << 8
        reached = [
            word ^ sum(1 << bit for bit in chosen)
            for count in range(k + 1)
            for chosen in itertools.combinations(range(16), count)
        ]
        everything.append(torch.tensor([[w & 255, w >> 8] for w in reached]))
    best = torch.stack([(points.double() @ slope.double().T).amax(0) for points, slope in zip(everything, a)])
    high = flips.support(a, x).double()
    assert (high >= best).all() and torch.allclose(high, best, rtol=1e-5)
    lower, upper = flips.corners(x)
    assert lower.tolist() == [points.amin(0).tolist() for points in everything]
    assert upper.tolist() == [points.amax(0).tolist() for points in everything]
    other = torch.randint(0, 256, (2, 2), generator=g, dtype=torch.uint8)
    for point in (flips.sample(x, g), flips.project(other, x)):
        differing = [sum((u ^ v).bit_count() for u, v in zip(*rows)) for rows in zip(point.tolist(), memory)]
        assert differing == [k, k] or (point is not None and max(differing) <= k)
        assert flips.contains(point, x).all()
    assert flips.contains(x ^ 1, x).tolist() == [k >= 2] * 2


def test_bit_flips_by_hand():
    x = torch.tensor([[0b00000000, 0b11111111]], dtype=torch.uint8)
    s = torch.tensor([[0b10000001, 0b01111111]], dtype=torch.uint8)
    assert BitFlips(2).project(s, x).tolist() == [[0b10000000, 0b01111111]]
    assert [BitFlips(k).contains(s, x).item() for k in (2, 3)] == [False, True]
    flipped = BitFlips(2).sample(x.expand(500, 2), generator(0)) ^ x
    assert {sum(v.bit_count() for v in row) for row in flipped.tolist()} == {2}
    assert (flipped.sum(0) > 0).all() and torch.equal(BitFlips(99).sample(x, generator(0)), ~x)


@given(k=st.integers(0, 3), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_edge_flips_by_enumeration(k, seed):
    g = generator(seed)
    x = (torch.rand(1, 4, 4, generator=g) < 0.5).float().triu(1)
    x = x + x.mT + torch.eye(4) * (torch.rand(4, generator=g) < 0.5)
    a, flips = torch.randn(1, 2, 4, 4, generator=g), EdgeFlips(k)
    reached = []
    for count in range(k + 1):
        for chosen in itertools.combinations(itertools.combinations(range(4), 2), count):
            graph = x[0].clone()
            for i, j in chosen:
                graph[i, j] = graph[j, i] = 1 - graph[i, j]
            reached.append(graph)
    graphs = torch.stack(reached)
    best = (graphs[:, None] * a[0]).sum((2, 3)).amax(0)
    assert torch.allclose(flips.support(a, x)[0], best, atol=1e-5)
    assert (
        flips.support(a, x)[0].double() >= (graphs[:, None].double() * a[0].double()).sum((2, 3)).amax(0)
    ).all()
    lower, upper = flips.corners(x)
    assert torch.equal(lower[0], graphs.amin(0)) and torch.equal(upper[0], graphs.amax(0))
    assert all(flips.contains(graph[None], x).item() for graph in graphs)
    point = flips.sample(x, g)
    assert flips.contains(point, x).all() and (point != x).sum() == 2 * k
    soft = torch.rand(1, 4, 4, generator=g)
    assert flips.contains(flips.project(soft, x), x).all()
    whole = flips.sample(x, g)
    assert torch.equal(flips.project(whole, x), whole) and torch.equal(EdgeFlips(0).project(whole, x), x)


def test_edge_flips_by_hand():
    x = torch.zeros(1, 3, 3)
    s = torch.tensor([[[0.0, 0.9, 0.4], [0.9, 0.0, 0.7], [0.4, 0.7, 0.0]]])
    assert EdgeFlips(1).project(s, x).nonzero()[:, 1:].tolist() == [[0, 1], [1, 0]]
    assert EdgeFlips(9).project(s, x).sum() == 4
    one_way, loop = x.clone(), x.clone()
    one_way[0, 0, 1], loop[0, 1, 1] = 1, 1
    assert not EdgeFlips(5).contains(one_way, x).any() and not EdgeFlips(5).contains(loop, x).any()
    assert not EdgeFlips(5).contains(s, x).any()
    for graph in (one_way, s):
        with pytest.raises(BadInput, match="symmetric matrix of 0 and 1"):
            EdgeFlips(1).sample(graph, generator(0))


def test_sets_from_words():
    assert parse("linf=0.01") == Linf(0.01) and parse(" L2 = 0.5") == L2(0.5) and parse("l1=3") == L1(3.0)
    assert parse("linf=2/255") == Linf(2 / 255) and parse("weightlinf=0.1") == WeightLinf(0.1)
    assert parse("rounding") == Rounding() and parse("rounding=3") == Rounding(3)
    assert parse("bitflips=3") == BitFlips(3) and parse("edgeflips=2") == EdgeFlips(2)
    assert (
        str(Linf(0.01, 0.0, 1.0)) == "linf=0.01"
        and str(BitFlips(3)) == "bitflips=3"
        and str(Box(0.0, 1.0)) == "box"
    )
    for text in ("linf=0.01", "l2=0.5", "l1=3", "weightlinf=0.1", "rounding=4", "bitflips=3", "edgeflips=2"):
        assert isinstance(parse(text), Perturbation) and str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lnif=0.1", "unknown set 'lnif'; did you mean 'linf'?"),
        ("linf", "'linf': '' is not a number; write for example linf=0.01"),
        ("l2=big", "'l2=big': 'big' is not a number; write for example l2=0.01"),
        ("linf=1/0", "'linf=1/0': '1/0' is not a number"),
        ("bitflips=1.5", "'bitflips=1.5': '1.5' is not a whole number; write for example bitflips=3"),
        ("linf=-1", "linf=-1.0: the radius is a number of at least 0"),
        ("l1=nan", "l1=nan: the radius is a number"),
        ("l2=inf", "l2=inf: the radius is a number"),
        ("edgeflips=-1", "edgeflips=-1: the number of flips"),
        ("rounding=9", "rounding=9, group=0: give 2 to 8 bits"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(BadInput) as refusal:
        parse(text)
    assert str(refusal.value).startswith(sentence)


def test_the_valid_range_cuts_sets_of_inputs_alone():
    assert with_range(Linf(0.1), 0.0, 1.0) == Linf(0.1, 0.0, 1.0)
    assert with_range(L2(0.1, 0.2, 0.8), 0.0, 0.5) == L2(0.1, 0.2, 0.5)
    assert with_range(L1(0.1, 0.2), None, None) == L1(0.1, 0.2)
    assert with_range(BitFlips(1), 0.0, 1.0) == BitFlips(1) and with_range(
        WeightLinf(1.0), 0.0, 1.0
    ) == WeightLinf(1.0)
    cut = with_range(Box(-1.0, torch.tensor([0.5, 2.0])), 0.0, 1.0)
    assert cut.corners(torch.zeros(1, 2))[0].tolist() == [[0, 0]]
    assert cut.corners(torch.zeros(1, 2))[1].tolist() == [[0.5, 1]]
    with pytest.raises(BadInput):
        with_range(Box(2.0, 3.0), 0.0, 1.0)
    with pytest.raises(BadInput, match="not below high"):
        Linf(0.1, 1.0, 0.0)


@pytest.mark.parametrize("within", [Linf(0.3), L2(0.3), L1(0.3), Linf(0.3, 0.0, 1.0), Box(-0.3, 0.3)])
def test_ascent_reaches_the_maximum_of_a_linear_function(within):
    g = generator(0)
    slope, x = torch.randn(5, generator=g), torch.rand(3, 5, generator=g)

    def score(s, rows):
        return s @ slope, torch.zeros(len(s), dtype=torch.bool)

    found = ascend(score, x, within, steps=60, restarts=2, seed=0)
    best = within.support(slope.expand(3, 1, 5), x)[:, 0]
    assert within.contains(found.points, x).all() and not found.hit.any()
    assert torch.allclose(found.points @ slope, best, atol=2e-3)
    again = ascend(score, x, within, steps=60, restarts=2, seed=0)
    assert torch.equal(found.points, again.points)


def test_ascent_stops_where_it_has_reached_and_keeps_the_best_elsewhere():
    x, asked = torch.zeros(3, 1), []

    def score(s, rows):
        asked.append(rows.tolist())
        return -(s[:, 0] - 0.05).abs(), (rows == 1) & (s[:, 0] != 0)

    found = ascend(score, x, Linf(0.1), steps=20, restarts=1, seed=0)
    assert found.hit.tolist() == [False, True, False]
    assert (
        asked[0] == asked[1] == [0, 1, 2] and all(rows == [0, 2] for rows in asked[2:]) and len(asked) == 22
    )
    assert (found.points[[0, 2], 0] - 0.05).abs().max() < 0.01
    assert torch.equal(ascend(score, x, Linf(0.1), steps=20, restarts=0, seed=0).points, x)
    with pytest.raises(DoesNotFit, match="bitflips=1 is no set of inputs"):
        ascend(score, x, BitFlips(1), steps=1, restarts=1, seed=0)
