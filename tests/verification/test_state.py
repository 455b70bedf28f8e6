"""What rounding costs a row: sums of many constants, of many coefficients, of many ends of intervals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.perturbation import Linf
from netweight.verification import ibp
from netweight.verification.backward import terms
from netweight.verification.bounds import bounds, captured
from netweight.verification.problem import Region, pose
from netweight.verification.rows import BLOCK, total
from netweight.verification.state import readers, transposed_terms

MANY = [2**12, 2**16, 2**18]


class Ones(nn.Module):
    """0 x + 0.1 ..., N times: all that a row adds up is constant."""

    def __init__(self, count, weight=0.0, bias=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.full((count, 1), weight))
        self.bias = nn.Parameter(torch.full((count,), bias))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def of_all(model, x, eps, count):
    """float32 bounds of the sum of all outputs, in float64."""
    objective = torch.ones(1, 1, count)
    found = bounds(model.eval(), x, Linf(eps), objective=objective, arithmetic="float32")
    return float(found.lower.double()), float(found.upper.double())


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("bias", [0.1, 0.7, 1.1])
def test_a_sum_of_equal_biases(count, bias):
    """Each addition in float32 rounds to the same side: plain sums drift by more than any fan-in of 1."""
    exact = float(torch.full((count,), bias).double().sum())
    lower, upper = of_all(Ones(count, bias=bias), torch.zeros(1, 1), 0.0, count)
    assert lower <= exact <= upper
    assert upper - lower <= 2e-5 * exact  # BLOCK roundings, not `count` of them


@pytest.mark.parametrize("count", MANY)
def test_a_sum_of_intercepts(count):
    """N open ReLUs, each at most e where x = e: the chord's intercepts are half of the bound."""
    x, eps = torch.zeros(1, count), 0.3
    upper_end = float(torch.full((count,), eps).double().sum())
    lower, upper = of_all(nn.ReLU(), x, eps, count)
    assert lower <= 0 and upper_end <= upper <= upper_end * (1 + 2e-5 + 3 * count * 2**-24)


@pytest.mark.parametrize("count", MANY)
def test_a_sum_of_coefficients(count):
    """One input, read by N outputs: its coefficient is a sum of N weights, which the network never adds."""
    exact = float(torch.full((count,), 0.1).double().sum())
    lower, upper = of_all(Ones(count, weight=0.1, bias=0.0), torch.ones(1, 1), 0.0, count)
    assert lower <= exact <= upper


@given(count=st.integers(1, 700), seed=st.integers(0, 99), same=st.booleans())
def test_a_total_is_off_by_one_block(count, seed, same):
    x = torch.randn(2, 3, count, generator=torch.Generator().manual_seed(seed))
    x = x[..., :1].expand(x.shape) if same else x
    lost = (BLOCK + 1) * 2.0**-24 * x.double().abs().sum(2)
    assert ((total(x).double() - x.double().sum(2)).abs() <= lost).all()


OPERATORS = {
    "linear": (lambda x: F.linear(x, torch.ones(5, 6)), (4, 6)),
    "convolution": (lambda x: F.conv2d(x, torch.ones(6, 2, 3, 3), groups=2, padding=1), (1, 4, 5, 5)),
    "strided": (lambda x: F.conv2d(x, torch.ones(3, 2, 3, 3), stride=2, padding=1), (1, 2, 7, 7)),
    "transposed": (lambda x: F.conv_transpose2d(x, torch.ones(2, 3, 3, 3), stride=2), (1, 2, 4, 4)),
    "addmm": (lambda x: torch.addmm(torch.ones(3), x, torch.ones(40, 3)), (2, 40)),
    "matmul": (lambda x: torch.ones(3, 5, 4) @ x, (4, 6)),
    "expand": (lambda x: x.expand(7, 4), (1, 4)),
    "index": (lambda x: x[:, torch.tensor([0, 1, 1, 1, 2])], (2, 3)),
    "permute": (lambda x: x.permute(1, 0), (2, 3)),
    "mean": (lambda x: x.mean(1), (3, 8)),
    "cumsum": (lambda x: x.cumsum(1), (2, 5)),
    "overlapping": (lambda x: F.avg_pool2d(x, 3, 1), (1, 2, 6, 6)),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, 3), (1, 1, 7, 7)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=3, mode="bilinear"), (1, 1, 3, 3)),
    "broadcast": (lambda x: x + torch.ones(5, 1, 4), (1, 4)),
}


class Only(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x[0]).unsqueeze(0)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_terms_of_both_sums_are_counted(name):
    """Against the Jacobian: entries of a row in the network's sums, of a column in the proof's."""
    f, shape = OPERATORS[name]
    x = torch.randn(1, *shape)
    graph = captured(Only(f), x)
    problem = pose(graph, [Region.of(x, Linf(0.1))], "float32")
    values, inner, outer = ibp.inputs(problem), 1, 1
    for node in graph.nodes:
        values[node.name] = ibp.step(problem, node, values)
        p = problem.params(node, values)
        inner, outer = max(inner, terms(node, p)), max(outer, transposed_terms(problem, node, p))
    jacobian = torch.autograd.functional.jacobian(f, x[0]).reshape(-1, x.numel()) != 0
    assert jacobian.sum(1).max() <= inner
    assert jacobian.sum(0).max() <= outer
    assert name not in ("permute", "mean") or outer == 1


def test_readers_are_counted():
    class Twice(nn.Module):
        def forward(self, x):
            y = x * 2
            return torch.cat([y + y, y.relu()], 1)

    x = torch.randn(1, 4)
    graph = captured(Twice(), x)
    problem = pose(graph, [Region.of(x, Linf(0.1))], "float32")
    assert max(readers(problem, node) for node in graph.nodes) >= 2


def test_a_product_that_cancels_pays_for_its_summands():
    """x y = 0.1 k - 0.1 k + ..: the value is near 0, what is rounded is not."""
    count = 512
    left = torch.rand(count // 2, generator=torch.Generator().manual_seed(0)) * 1000
    both = torch.cat([left, left, torch.full((count // 2,), 0.1), torch.full((count // 2,), -0.1)])

    class Product(nn.Module):
        def forward(self, x):
            h = F.linear(x, both.unsqueeze(1))
            return h[:, :count].unsqueeze(1) @ h[:, count:].unsqueeze(2)

    found = bounds(Product(), torch.ones(1, 1), Linf(0.0), arithmetic="float32")
    lost = (count - 1) * 2.0**-24 * float((both[:count] * both[count:]).double().abs().sum())
    assert float(found.lower) <= -lost and float(found.upper) >= lost  # any order of summation
