"""Bounds on the difference of two networks: sampled points, exact cases, and plain subtraction beside it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.rtn import RTN, rtn
from netweight.compression.quantize.smoothquant import SmoothQuant, smoothquant
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.graph import Node, capture
from netweight.core.perturbation import L2, Linf
from netweight.core.plan import Plan
from netweight.testing import tiny_model, tiny_task
from netweight.verification import difference
from netweight.verification.bounds import _bounds, agreement, captured, equivalence
from netweight.verification.difference import joined
from netweight.verification.relax import Interval


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.LeakyReLU(0.1), nn.Linear(32, 16), nn.Hardtanh(),
        nn.Linear(16, 4),
    )  # fmt: skip


def rounded(model, step=2.0**-6):
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = (parameter.data / step).round() * step
    return twin


def widths(graph, x, within, arithmetic="float64"):
    found = _bounds(graph, x, within, None, ("crown", arithmetic))
    return float((found.upper - found.lower).mean())


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "real"])
@pytest.mark.parametrize("within", [Linf(0.02), L2(0.05)], ids=str)
def test_no_sampled_difference_leaves_the_bounds(within, arithmetic):
    model, x = mlp(), torch.randn(3, 8)
    twin, generator = rounded(model), torch.Generator().manual_seed(0)
    found = equivalence(model, twin, x, within, arithmetic=arithmetic)
    for _ in range(200):
        s = within.sample(x, generator)
        apart = (twin(s).double() - model(s).double()).detach()
        if arithmetic != "float32":
            precise = [copy.deepcopy(net).double()(s.double()).detach() for net in (twin, model)]
            apart = precise[0] - precise[1]
        assert (found.lower <= apart).all() and (apart <= found.upper).all()


def test_it_is_far_tighter_than_subtracting_where_networks_are_alike():
    model, x = mlp(), torch.randn(4, 8)
    f, g = captured(model, x), captured(rounded(model, 2.0**-10), x)
    together, side_by_side = (widths(joined(f, g, twins=twins), x, Linf(0.05)) for twins in (True, False))
    assert together < 0.1 * side_by_side


def test_equal_networks_do_not_differ():
    model, x = mlp(), torch.randn(2, 8)
    found = equivalence(model, copy.deepcopy(model), x, Linf(0.3), arithmetic="real")
    assert float(found.upper.abs().max()) < 1e-5 and float(found.lower.abs().max()) < 1e-5


def test_a_linear_network_has_its_exact_difference():
    model, x = nn.Linear(5, 3), torch.randn(2, 5)
    twin = rounded(model, 2.0**-3)
    found = equivalence(model, twin, x, Linf(0.1), arithmetic="float64")
    change = (twin.weight - model.weight).detach().double()
    middle = (twin(x) - model(x)).detach().double()
    reach = 0.1 * change.abs().sum(1)
    torch.testing.assert_close(found.upper, middle + reach, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.lower, middle - reach, rtol=0, atol=1e-6)


KINKS = {
    "aten.relu": (F.relu, {}),
    "aten.leaky_relu": (lambda x: F.leaky_relu(x, 0.2), {"negative_slope": 0.2}),
    "aten.abs": (torch.abs, {}),
    "aten.hardtanh": (F.hardtanh, {"min_val": -1.0, "max_val": 1.0}),
}


@pytest.mark.parametrize("op", KINKS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_chords_hold_for_every_pair_of_values(op, data):
    f, params = KINKS[op]
    low = torch.tensor([data.draw(st.floats(-3, 3)) for _ in range(4)]).double().reshape(2, 2)
    size = torch.tensor([data.draw(st.floats(0, 2)) for _ in range(4)]).double().reshape(2, 2)
    z, d = (Interval(low[i].reshape(1, 1, 2), (low[i] + size[i]).reshape(1, 1, 2)) for i in range(2))
    of = Node("f", op, "default", ("z",), {"self": None, **params}, (2,), torch.float64, "")
    node = Node("e", difference.GAP, "", ("z", "d"), {}, (2,), torch.float64, "")
    p = {"value": z, "difference": d, "of": of, **params}
    found = difference.gap(node, p, 0.0)
    share = torch.linspace(0, 1, 60, dtype=torch.float64)
    values = z.lower + share.reshape(-1, 1, 1, 1) * (z.upper - z.lower)
    steps = d.lower + share.reshape(1, -1, 1, 1) * (d.upper - d.lower)
    gap = f(values + steps) - f(values)
    assert (found.lower - 1e-12 <= gap).all() and (gap <= found.upper + 1e-12).all()
    for sign in (1.0, -1.0):
        a = sign * torch.eye(2, dtype=torch.float64).reshape(1, 2, 2)
        rows, bias = difference.gap_rows(node, a, p)
        bias = torch.as_tensor(bias).expand(1, 2)
        line = (rows["difference"] * torch.eye(2)).sum(2) * steps[0, :, 0] + bias  # per element
        assert (line <= sign * gap[:, :, 0] + 1e-9).all()


def test_packed_pruned_and_rounded_activations():
    """Networks as compressors leave them: weights rounded, zeroed, activations rounded on the way."""
    model, task = tiny_model(), tiny_task()
    x, within, generator = task.test.x[:2], Linf(0.01, 0.0, 1.0), torch.Generator().manual_seed(0)
    pruned = copy.deepcopy(model)
    pruned[7].weight.data[:, ::3] = 0
    small = assemble(model, rtn(model, task, weighted(model), RTN(4)), Plan())
    smooth = assemble(model, smoothquant(model, task, weighted(model), SmoothQuant()), Plan())
    for twin in (pruned, small, smooth):
        found = equivalence(model, twin, x, within)
        run = twin if isinstance(twin, nn.Module) else twin.plain()
        for _ in range(60):
            s = within.sample(x, generator)
            apart = (run(s).double() - model(s).double()).detach()
            assert (found.lower <= apart).all() and (apart <= found.upper).all()
        assert found.upper.isfinite().all()


def test_other_networks_are_subtracted():
    model, x = mlp(), torch.randn(2, 8)
    other = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
    found, generator = equivalence(model, other, x, Linf(0.1)), torch.Generator().manual_seed(0)
    for _ in range(50):
        s = Linf(0.1).sample(x, generator)
        apart = (other(s) - model(s)).detach().double()
        assert (found.lower <= apart).all() and (apart <= found.upper).all()


def test_the_class_that_two_networks_keep():
    model, x = mlp(), torch.randn(20, 8)
    close, far = rounded(model, 2.0**-10), rounded(model, 2.0**-1)
    kept = [int(agreement(model, twin, x, Linf(0.01)).sum()) for twin in (close, far)]
    assert 20 >= kept[0] > kept[1]
    sure, generator = agreement(model, far, x, Linf(0.01)), torch.Generator().manual_seed(0)
    for _ in range(50):
        s = Linf(0.01).sample(x, generator)
        same = (model(s).argmax(1) == model(x).argmax(1)) & (far(s).argmax(1) == model(x).argmax(1))
        assert same[sure].all()


def test_networks_of_other_shapes_are_refused():
    model, x = mlp(), torch.randn(2, 8)
    with pytest.raises(DoesNotFit, match="same inputs and outputs"):
        joined(capture(model, x[:1]), capture(nn.Linear(8, 5), x[:1]))
