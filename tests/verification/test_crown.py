"""Backward linear bounds: against a plain dense implementation, enumeration and a million sampled points."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import capture
from netweight.core.perturbation import L1, L2, Box, Linf
from netweight.verification import crown, walk
from netweight.verification.bounds import bounds, captured, certify, margins
from netweight.verification.problem import Region, pose
from netweight.verification.rows import dense

METHODS = ("ibp", "forward", "forward+backward", "crown-ibp", "crown", "alpha-crown")


def mlp(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


class Residual(nn.Module):
    """Convolutions with stride, groups and dilation, a batch norm, shortcuts, a concat, a padded slice."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.second = nn.Conv2d(4, 4, 3, 1, 2, dilation=2, groups=2)
        self.short = nn.Conv2d(2, 4, 1, 2)
        self.third = nn.Conv2d(4, 8, 3, 1, 1)
        self.last = nn.Linear(8 * 4, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(self.second(h) + self.short(x))
        skip = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        h = torch.relu(self.third(h)[:, :, ::2, ::2] + skip)
        return self.last(torch.cat([h[:, 4:], h[:, :4]], 1).flatten(1))


def plain_crown(model, lower, upper):
    """The bounds of an MLP by the textbook: all neurons of all layers, dense, one example."""
    linear = [m for m in model if isinstance(m, nn.Linear)]
    known = []  # bounds before each ReLU
    for depth, layer in enumerate(linear):
        low = high = None
        for sign in (1, -1):
            a, b = sign * layer.weight, sign * layer.bias
            for before, (least, most) in reversed(list(zip(linear[:depth], known))):
                slope = (most.clamp(min=0) / (most.clamp(min=0) - least.clamp(max=0))).nan_to_num(0.0)
                slope = torch.where(least >= 0, 1.0, torch.where(most <= 0, 0.0, slope))
                under = torch.where(least >= 0, 1.0, torch.where(most <= 0, 0.0, (most > -least).double()))
                b = b + a.clamp(max=0) @ (-slope * least.clamp(max=0))
                a = a.clamp(min=0) * under + a.clamp(max=0) * slope
                a, b = a @ before.weight, b + a @ before.bias
            found = a.clamp(min=0) @ lower + a.clamp(max=0) @ upper + b
            low, high = (found, high) if sign > 0 else (low, -found)
        known.append((low, high))
    return known[-1]


@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0])
def test_it_is_crown(eps):
    model, x = mlp(6, 20, 15, 10, 4), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        found = bounds(model, x, Linf(eps))
        for i in range(5):
            lower, upper = plain_crown(model, x[i] - eps, x[i] + eps)
            assert (found.lower[i] >= lower - 1e-9).all() and (found.upper[i] <= upper + 1e-9).all()
            # intervals over the bounds inside may be tighter on wide sets, never on narrow ones
            if eps == 0.01:
                torch.testing.assert_close(found.lower[i], lower, rtol=0, atol=1e-9)


def test_without_a_nonlinearity_it_is_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        rows = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x[:1])[:, 0]
        reach = 0.3 * rows.abs().flatten(1).sum(1)
        found = bounds(model, x, Linf(0.3))
        torch.testing.assert_close(found.lower, model(x) - reach, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.upper, model(x) + reach, rtol=0, atol=1e-9)


@pytest.mark.parametrize("within", [Linf(0.2), L2(0.2), L1(0.2), Box(-0.1, 0.3)], ids=str)
def test_the_least_of_a_linear_function_is_at_a_corner(within):
    """In 8 dimensions, over the vertices of the set (for L2: its closed form)."""
    x = torch.linspace(-0.05, 0.1, 8, dtype=torch.float64).reshape(1, 8)
    a = torch.randn(1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Region.of(x, within).to(torch.float64, (8,), x.device).lowest(a, 0.0)
    if isinstance(within, L2):
        expected = (a[0] @ x[0]) - 0.2 * a[0].norm(dim=1)
    else:
        if isinstance(within, L1):
            vertices = torch.cat([x + 0.2 * s * torch.eye(8, dtype=torch.float64) for s in (1, -1)])
        else:
            lower, upper = within.corners(x)
            choice = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=torch.float64)
            vertices = lower + choice * (upper - lower)
        expected = (a[0] @ vertices.T).amin(1)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_point_has_its_value(method):
    model, x = Residual().double().eval(), torch.rand(2, 2, 8, 8, dtype=torch.float64)
    found = bounds(model, x, Linf(0.0), method=method)
    torch.testing.assert_close(found.lower, model(x).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.upper, model(x).detach(), rtol=0, atol=1e-5)


def test_methods_are_ordered():
    """crown-ibp is never below ibp, alpha-crown never below crown."""
    width = {}
    for seed in range(5):
        model, x = Residual(seed).eval(), torch.rand(3, 2, 8, 8)
        found = {m: bounds(model, x, Linf(0.05), method=m, arithmetic="float64") for m in METHODS}
        for looser, tighter in (
            ("ibp", "crown-ibp"),
            ("crown", "alpha-crown"),
            ("forward", "forward+backward"),
        ):
            assert (found[tighter].lower >= found[looser].lower - 1e-9).all(), (looser, tighter)
            assert (found[tighter].upper <= found[looser].upper + 1e-9).all()
        for m, b in found.items():
            width[m] = width.get(m, 0.0) + float((b.upper - b.lower).mean())
    assert width["alpha-crown"] < 0.99 * width["crown"] < 0.5 * width["ibp"]


def test_rows_scale():
    model, x = Residual().eval(), torch.rand(2, 2, 8, 8)
    rows = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    one, three = (
        bounds(model, x, Linf(0.05), objective=by * rows, arithmetic="float64").lower for by in (1, 3)
    )
    torch.testing.assert_close(three, 3 * one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_windows_are_the_dense_rows_they_stand_for(monkeypatch, arithmetic):
    model, x = Residual(3).eval(), torch.rand(3, 2, 8, 8)
    windows = bounds(model, x, Linf(0.05), arithmetic=arithmetic)
    seen = []
    monkeypatch.setattr(walk, "back_window", lambda *args: seen.append(1))
    monkeypatch.setattr(walk, "back_unit", lambda *args: None)
    monkeypatch.setattr(walk, "planar", lambda shape: False)
    full = bounds(model, x, Linf(0.05), arithmetic=arithmetic)
    close = 1e-9 if arithmetic == "float64" else 1e-4
    torch.testing.assert_close(windows.lower, full.lower, rtol=0, atol=close)
    torch.testing.assert_close(windows.upper, full.upper, rtol=0, atol=close)


def test_settled_rows_are_dropped_and_nothing_changes(monkeypatch):
    model, x = Residual(2).eval(), torch.rand(4, 2, 8, 8)
    dropped = bounds(model, x, Linf(0.03), arithmetic="float64")
    monkeypatch.setattr(walk.Walk, "settle", lambda self: True)
    kept = bounds(model, x, Linf(0.03), arithmetic="float64")
    torch.testing.assert_close(dropped.lower, kept.lower, rtol=0, atol=1e-9)


def test_small_chunks_give_the_same(monkeypatch):
    model, x = Residual(2).eval(), torch.rand(4, 2, 8, 8)
    whole = bounds(model, x, Linf(0.03), arithmetic="float64")
    for room in (crown, walk):
        monkeypatch.setattr(room, "BUDGET", 5000)
    torch.testing.assert_close(
        bounds(model, x, Linf(0.03), arithmetic="float64").lower, whole.lower, rtol=0, atol=1e-9
    )


def test_any_choice_of_slopes_is_sound():
    model, x = mlp(4, 12, 12, 3), torch.randn(2, 4, dtype=torch.float64)
    problem = pose(capture(model, x[:1]), [Region.of(x, Linf(0.3))], "float64")
    s = x + 0.3 * (2 * torch.rand(2000, 2, 4, dtype=torch.float64) - 1)
    with torch.no_grad():
        state = crown.intermediate(problem)
        rows = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
        least = model(s).amin(0)
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            alphas = {
                node.name: (torch.rand(2, 3, *node.shape, generator=generator, dtype=torch.float64).round(),)
                * 2
                for node in problem.graph.nodes
                if node.op == "aten.relu"
            }
            found = walk.lowest(problem, state, crown.objective_rows(problem, rows), alphas=alphas)
            assert (found <= least).all()


def test_betas_are_added_to_coefficients():
    """min over x of a h - beta z with h = relu(z), z = x in [-1, 1]: by hand."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    for layer in (model[0], model[2]):
        layer.weight.data.fill_(1.0)
        layer.bias.data.zero_()
    x = torch.zeros(1, 1, dtype=torch.float64)
    problem = pose(capture(model, x), [Region.of(x, Linf(1.0))], "float64")
    state = crown.intermediate(problem)
    relu = next(node for node in problem.graph.nodes if node.op == "aten.relu")
    z = relu.inputs[0]
    alphas = {relu.name: (torch.full((1, 1, 1, 1), 0.5).double(),) * 2}
    rows = crown.objective_rows(problem, torch.ones(1, 1, 1).double())
    for beta, expected in ((0.0, -0.5), (-0.5, 0.0), (0.5, -1.0)):
        found = walk.lowest(
            problem, state, rows, alphas=alphas, betas={z: torch.full((1, 1, 1, 1), beta).double()}
        )
        assert found.item() == pytest.approx(expected, abs=1e-9)


def test_gradients_of_a_bound_are_those_of_finite_differences():
    model, x = mlp(3, 6, 2), torch.randn(1, 3, dtype=torch.float64)
    problem = pose(capture(model, x), [Region.of(x, Linf(0.5))], "float64")
    with torch.no_grad():
        state = crown.intermediate(problem)
    relu = next(node for node in problem.graph.nodes if node.op == "aten.relu")
    rows = crown.objective_rows(problem, torch.tensor([[[1.0, -1.0]]]).double())

    def lower(alpha):
        return walk.lowest(problem, state, rows, alphas={relu.name: (alpha, alpha)}).sum()

    start = torch.full((1, 1, *relu.shape), 0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lower, start)


class Branches(nn.Module):
    """Two inputs, a shared value, a product of both, a maximum, several heads in one output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(12, 4)

    def forward(self, x, y):
        h, g = torch.relu(self.a(x)), torch.sigmoid(self.b(y))
        shared = h * g
        return self.c(torch.cat([shared, torch.maximum(h, g) - shared], 1))


def test_two_inputs_with_sets_of_their_own():
    model = Branches().double()
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    graph, regions = capture(model, x[:1], y[:1]), [Region.of(x, Linf(0.2)), Region.of(y, L2(0.3))]
    problem = pose(graph, regions, "float64")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found, looser = crown.bound(problem, None), crown.bound(problem, None, tighten=False)
        for _ in range(300):
            s = model(Linf(0.2).sample(x, generator), L2(0.3).sample(y, generator))
            assert (found.lower.flatten(1) <= s).all() and (s <= found.upper.flatten(1)).all()
    assert float((found.upper - found.lower).sum()) <= float((looser.upper - looser.lower).sum())
    with pytest.raises(DoesNotFit, match="2 inputs, 1 regions"):
        pose(graph, regions[:1], "float64")


def random_network(generator):
    """A small network of random operators on 12 numbers, some of them with two branches."""

    def pick(n):
        return int(torch.randint(n, (1,), generator=generator))

    def weight(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    smooth = [torch.tanh, torch.sigmoid, F.gelu, F.silu, F.softplus, torch.sin, torch.exp, F.elu]
    kinked = [
        torch.relu,
        torch.abs,
        lambda h: F.leaky_relu(h, 0.2),
        lambda h: h.clamp(-0.5, 0.7),
        torch.round,
    ]
    steps = []
    for _ in range(2 + pick(3)):
        w, v, kind = weight(12, 12), weight(12, 12), pick(9)
        f = (smooth + kinked)[pick(len(smooth) + len(kinked))]
        steps.append(
            [
                lambda h, w=w, f=f: f(h @ w),
                lambda h, w=w, f=f: h + f(h @ w),
                lambda h, w=w, v=v, f=f: f(h @ w) * torch.relu(h @ v),
                lambda h, w=w: torch.softmax((h @ w).reshape(-1, 3, 4), 2).flatten(1),
                lambda h, w=w: F.layer_norm(h @ w, (12,)),
                lambda h, w=w: torch.relu(
                    F.conv1d(h.reshape(-1, 2, 6), w[:4, :6].reshape(4, 2, 3), padding=1)
                ).flatten(1)[:, ::2],
                lambda h, w=w: F.max_pool1d((h @ w).reshape(-1, 3, 4), 2, 1, 1)[:, :, :4].flatten(1),
                lambda h, w=w: torch.maximum(h @ w, h.flip(1)),
                lambda h, w=w, f=f: torch.cat([f(h[:, :5]), (h @ w)[:, 5:]], 1),
            ][kind]
        )
    last = weight(12, 3)

    class Network(nn.Module):
        def forward(self, x):
            for step in steps:
                x = step(x)
            return x @ last

    return Network()


def test_a_million_points_stay_inside():
    """40 random graphs, 3 sets, 9,000 points each, evaluated in float32."""
    generator = torch.Generator().manual_seed(0)
    points = 0
    for _ in range(40):
        model, x = random_network(generator), torch.randn(2, 12, generator=generator)
        graph = captured(model, x)
        for within in (Linf(0.02), L2(0.3), Linf(0.3)):
            found = bounds(graph, x, within)
            assert (found.lower <= found.upper).all()
            s = torch.stack([within.sample(x, generator) for _ in range(90)])
            share = torch.rand(49, 1, 2, 1, generator=generator)
            s = torch.cat([s, (x + share * (s - x)).flatten(0, 1)])
            y = model(s.flatten(0, 1)).double().reshape(len(s), 2, 3)
            points += len(s) * 2
            assert (found.lower <= y).all() and (y <= found.upper).all()
    assert points >= 1_000_000


def test_bounds_of_smaller_sets_with_ibp_are_nested_and_certificates_shrink():
    model = mlp(6, 20, 4).float()
    x = torch.randn(30, 6)
    from netweight.core.task import Data

    counts = [int(certify(model, Data(x), Linf(eps)).verified.sum()) for eps in (1e-4, 0.02, 0.1, 0.5, 5.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] >= 28 and counts[-1] == 0


def test_nonsense_is_one_sentence():
    model, x = mlp(6, 20, 4).float(), torch.randn(2, 6)
    with pytest.raises(BadInput, match="lower <= upper"):
        bounds(model, x, Box(0.3, 0.1))
    with pytest.raises(BadInput, match="linf=-0.1"):
        bounds(model, x, Linf(-0.1))
    with pytest.raises(DoesNotFit, match="does not fit the network's"):
        bounds(captured(model, x), torch.randn(2, 5), Linf(0.1))
    with pytest.raises(DoesNotFit, match="objective"):
        bounds(model, x, Linf(0.1), objective=margins(torch.tensor([0, 1]), 5))


def test_rows_as_full_tensors():
    from netweight.verification.rows import Unit, Window, added, windowed

    shape = (1, 2, 3, 3)
    unit = Unit(torch.tensor([[4, 13]]), torch.tensor([[1.0, -1.0]]))
    full = dense(unit, shape, torch.float32)
    assert full.flatten(2)[0, 0].nonzero().item() == 4 and full.flatten(2)[0, 1, 13] == -1
    window = windowed(unit, shape, torch.float32)
    torch.testing.assert_close(dense(window, shape, torch.float32), full)
    grown = Window(torch.ones(1, 2, 2, 3, 3), window.spots - torch.tensor([0, 1, 1]), window.which)
    both = added(window, grown, shape, torch.float32)
    assert isinstance(both, Window)
    torch.testing.assert_close(dense(both, shape, torch.float32), full + dense(grown, shape, torch.float32))
