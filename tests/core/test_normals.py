"""Means told by batch norms against sampling, by hand, and on a residual network."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import weighted
from netweight.core.normals import Normal, clipped, expected_inputs
from netweight.core.task import Data
from netweight.models.resnet_cifar import architecture


def normal(mean: float, deviation: float) -> Normal:
    return Normal(*(torch.tensor([v], dtype=torch.float64) for v in (mean, deviation**2)))


def test_a_relu_by_the_formula_of_the_paper():
    beta, gamma = 0.7, 1.3
    pdf = math.exp(-((beta / gamma) ** 2) / 2) / math.sqrt(2 * math.pi)
    cdf = (1 + math.erf(-beta / gamma / math.sqrt(2))) / 2
    expected = gamma * pdf + beta * (1 - cdf)
    assert float(clipped(normal(beta, gamma), 0.0, math.inf).mean) == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(
    mean=st.floats(-3, 8),
    deviation=st.floats(0.05, 3),
    ends=st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)]),
)
def test_clips_are_those_of_samples(mean, deviation, ends):
    x = mean + deviation * torch.randn(200000, generator=torch.Generator().manual_seed(0)).double()
    y = x.clamp(*(e if math.isfinite(e) else None for e in ends))
    found = clipped(normal(mean, deviation), *ends)
    assert float(found.mean) == pytest.approx(float(y.mean()), abs=0.02 * deviation)
    assert float(found.var) == pytest.approx(float(y.var()), abs=0.03 * deviation**2)


def test_a_channel_without_spread_is_a_constant():
    found = clipped(normal(2.0, 0.0), 0.0, 1.5)
    assert float(found.mean) == pytest.approx(1.5) and float(found.var) == pytest.approx(0, abs=1e-9)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.conv = nn.BatchNorm2d(4), nn.BatchNorm2d(2), nn.Conv2d(4, 3, 1)
        self.end = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        short = F.pad(torch.relu(self.bn2(x[:, 4:]))[:, :, ::2], (0, 0, 0, 0, 1, 1))
        y = torch.relu(self.bn1(x[:, :4])[:, :, :2] + short)
        return self.conv(y), self.end(F.adaptive_avg_pool2d(y, 1).flatten(1))


def test_sums_shortcuts_and_pools():
    g = torch.Generator().manual_seed(0)
    model = Branches().eval()
    for norm in (model.bn1, model.bn2):
        norm.weight.data.copy_(torch.randn(len(norm.weight), generator=g))
        norm.bias.data.copy_(torch.randn(len(norm.weight), generator=g))
    x = torch.randn(20000, 6, 4, 4, generator=g)
    found = expected_inputs(model, Data(x), ["conv", "end"])
    with torch.no_grad():
        short = F.pad(torch.relu(model.bn2(x[:, 4:]))[:, :, ::2], (0, 0, 0, 0, 1, 1))
        seen = torch.relu(model.bn1(x[:, :4])[:, :, :2] + short).mean((0, 2, 3))
    assert torch.allclose(found["conv"].float(), seen, atol=0.05)  # a clipped normal is not quite normal
    assert torch.allclose(found["conv"].float()[[0, 3]], seen[[0, 3]], atol=0.01)  # no shortcut there: exact
    assert torch.equal(found["end"], found["conv"])


def test_what_no_norm_tells_is_left_out():
    model = architecture(8).eval()
    data = Data(torch.rand(2, 3, 32, 32))
    assert set(expected_inputs(model, data, weighted(model))) == set(weighted(model)) - {"conv1"}
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(nn.BatchNorm1d(4), shared, shared).eval()
    assert not expected_inputs(twice, Data(torch.rand(2, 4)), ["1"])
    bare = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)).eval()
    assert expected_inputs(bare, Data(torch.rand(2, 4)), ["1"])["1"].tolist() == [0.0] * 4
