"""Weights that move: exact on one layer, sound by sampling and by attack on several, and nonsense."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import live
from netweight.core.perturbation import L1, L2, BitFlips, Box, Linf, Rounding, WeightLinf
from netweight.verification.bounds import bounds, captured
from netweight.verification.weights import loosened

POINT = Linf(0.0)


def seeded(make, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4))


def convolution() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Flatten())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Sequential:
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def inputs(model: nn.Module, seed: int = 1) -> torch.Tensor:
    shape = (6,) if isinstance(model[0], nn.Linear | nn.Flatten) else (2, 6, 6)
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed)) - 0.3


@functools.cache
def graph_of(make):
    model = seeded(make)
    return captured(model, inputs(model))


def found(make, model, x, weights, within=POINT, **how):
    graph = live(graph_of(make), dict(model.named_parameters()))
    return bounds(loosened(graph, weights), x, within, **how)


def moved(model: nn.Module, change: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    weights = {name: p + change[name] if name in change else p for name, p in model.named_parameters()}
    return torch.func.functional_call(model, weights, (x,))


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith("weight")}


def worst(model, x, weights) -> torch.Tensor:
    """The smallest sum of the outputs of each example for a network of one layer, from the best dW."""
    (name, weight), lows = next(iter(matrices(model).items())), []
    for one in x:
        free = weight.clone().requires_grad_()
        torch.func.functional_call(model, {name: free}, (one[None],)).sum().backward()
        g = free.grad
        step = -weights.eps * (g / g.norm() if isinstance(weights, L2) else g.sign())
        lows.append(moved(model, {name: step}, one[None]).sum())
    return torch.stack(lows)


@pytest.mark.parametrize("make", [linear, convolution])
@pytest.mark.parametrize("weights", [L2(0.3), WeightLinf(0.05)])
@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
def test_one_layer_on_a_point_is_exact(make, weights, method):
    model = seeded(make)
    x = inputs(model)
    ones = torch.ones(3, 1, model(x).shape[1])
    lower = found(make, model, x, weights, objective=ones, method=method, arithmetic="float64").lower[:, 0]
    assert torch.allclose(lower.float(), worst(model, x, weights), atol=1e-4)
    assert (lower <= worst(model.double(), x.double(), weights) + 1e-9).all()


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("within", [POINT, L2(0.1)])
@pytest.mark.parametrize("weights", [L2(0.1), WeightLinf(0.02), Rounding(4)], ids=str)
def test_no_sampled_or_attacked_network_leaves_the_bounds(make, within, weights, method):
    model = seeded(make)
    x = inputs(model)
    proven = found(make, model, x, weights, within, method=method)
    generator = torch.Generator().manual_seed(2)
    for trial in range(24):
        change = {}
        for name, weight in matrices(model).items():
            if trial % 3 == 0 and not isinstance(weights, Rounding):  # to the edge, the way one output falls
                free = {n: p.clone().requires_grad_() for n, p in matrices(model).items()}
                row = torch.func.functional_call(model, free, (x,))[trial % 3, trial % 2]
                g = torch.autograd.grad(row * (1 - trial % 2 * 2), list(free.values()))
                g = dict(zip(free, g))[name]
                change[name] = weights.eps * (g / (g.norm() + 1e-9) if isinstance(weights, L2) else g.sign())
            elif isinstance(weights, L2):
                d = torch.randn(weight.shape, generator=generator)
                change[name] = 0.9999 * weights.eps * d / d.norm()
            else:
                change[name] = weights.sample(weight, generator) - weight
        out = moved(model, change, within.sample(x, generator))
        assert (out >= proven.lower).all()
        assert (out <= proven.upper).all()


@pytest.mark.parametrize("make", [linear, convolution])
@pytest.mark.parametrize("weights", [L2(0.3), WeightLinf(0.05)])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_the_change_alone_is_bounded_at_every_corner_of_the_inputs(make, weights, method):
    model = seeded(make)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x, within = torch.full_like(inputs(model), 0.2), Linf(0.5)
    ones = torch.ones(3, 1, model(x).shape[1])
    lower = found(make, model, x, weights, within, objective=ones, method=method).lower[:, 0]
    corners = [x + 0.5, x - 0.5]
    corners += [
        x + 0.5 * within.sample(x, torch.Generator().manual_seed(seed)).sub(x).sign() for seed in range(10)
    ]
    lowest = torch.stack([worst(model, s, weights) for s in corners]).amin(0)
    assert (lower <= lowest + 1e-6).all()
    if method == "crown-ibp":
        assert torch.allclose(lower.float(), lowest, rtol=1e-3)  # reached where every input is highest


def test_rows_are_tighter_than_intervals_and_sets_nest():
    model = seeded(mlp)
    x = inputs(model)
    for weights in (L2, WeightLinf):
        wide = found(mlp, model, x, weights(0.1), method="ibp")
        rows = found(mlp, model, x, weights(0.1), method="crown-ibp")
        assert (rows.upper - rows.lower).sum() < 0.9 * (wide.upper - wide.lower).sum()
        small = found(mlp, model, x, weights(0.05), method="ibp")
        assert (small.lower > wide.lower).all()
        assert (small.upper < wide.upper).all()
        nothing = found(mlp, model, x, weights(0.0), Linf(0.01), method="crown")
        plain = bounds(model, x, Linf(0.01), method="crown")
        assert torch.allclose(nothing.lower, plain.lower, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), eps=st.floats(0.0, 0.5), boxed=st.booleans())
def test_a_ball_and_a_box_of_one_linear_layer_by_formula(seed, eps, boxed):
    generator = torch.Generator().manual_seed(seed)
    model = seeded(linear, seed)
    x, a = torch.randn(2, 6, generator=generator), torch.randn(2, 1, 4, generator=generator)
    weights = WeightLinf(eps) if boxed else L2(eps)
    lower = (
        found(linear, model, x, weights, objective=a, method="crown", arithmetic="float64")
        .lower[:, 0]
        .float()
    )
    order = 1 if boxed else 2
    cost = eps * a[:, 0].norm(p=order, dim=1) * x.norm(p=order, dim=1)
    assert torch.allclose(lower, (a[:, 0] * model(x)).sum(1) - cost, atol=1e-4)


def test_sets_by_layer_leave_the_others_alone():
    model = seeded(mlp)
    x = inputs(model)
    both = found(mlp, model, x, {"0": L2(0.1), "4": WeightLinf(0.02)})
    one = found(mlp, model, x, {"4": WeightLinf(0.02)})
    reach = 0.02 * F.relu(model[:4](x)).norm(p=1, dim=1, keepdim=True)
    assert torch.allclose(one.upper.float(), model(x) + reach, atol=1e-4)
    assert (both.upper > one.upper).all()


def test_bounds_can_be_trained_on():
    model = seeded(mlp)
    x = inputs(model)
    from netweight.verification import crown
    from netweight.verification.problem import Region, pose

    def lower() -> torch.Tensor:
        graph = loosened(live(graph_of(mlp), dict(model.named_parameters())), L2(0.1))
        problem = pose(graph, [Region.of(x, POINT)], "float64")
        state = crown.intermediate(problem, tighten=False)
        rows = crown.objective_rows(problem, torch.ones(3, 1, 3, dtype=torch.float64))
        return crown.lowest(problem, state, rows).sum()

    lower().backward()
    model.double()
    weight = model[2].weight
    slope = weight.grad[1, 2].item()
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):
            weight[1, 2] += step
            ends.append(lower().item())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4)


def test_nonsense():
    graph = graph_of(mlp)
    with pytest.raises(BadInput, match="unknown layer with a weight '1'; did you mean|known are: 0, 2, 4"):
        loosened(graph, {"1": L2(0.1)})
    for other in (L1(0.1), BitFlips(2), Linf(0.1)):
        with pytest.raises(DoesNotFit, match="give l2, weightlinf or rounding"):
            loosened(graph, other)
    assert len(loosened(graph, Box(-1.0, 1.0)).nodes) == len(graph.nodes) + 6
