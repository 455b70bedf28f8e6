"""Soft rounding starts at the weight, ends on the grid, and gradients reach V alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, nearest
from netweight.nn.fake import fake_round, grid_of, learnt_round
from netweight.nn.soft import SoftLayer, share, start


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), symmetric=st.booleans())
def test_the_start_is_the_weight_and_half_up_is_nearest(seed, bits, symmetric):
    g = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    weight = torch.randn(6, 2, 3, 3, generator=g)
    layer.weight = nn.Parameter(weight)
    grid = Grid(bits, symmetric, 6)
    soft = SoftLayer(layer, weight, grid)
    x = torch.randn(2, 4, 5, 5, generator=g)
    ends = (soft.low * soft.step, soft.high * soft.step)  # a rounded zero point moves them by half a step
    layer.weight = nn.Parameter(weight.reshape(-1, 6).clamp(*ends).reshape(weight.shape))
    assert torch.allclose(soft(x), layer(x), atol=1e-4)
    away = (soft.h - 0.5).abs() > 1e-3  # ties aside
    same = soft.form().decode() == nearest(weight, grid)
    assert same.reshape(away.shape)[away].all()


def test_gradients_reach_v_alone():
    layer = nn.Linear(4, 3)
    soft = SoftLayer(layer, layer.weight.detach(), Grid(3, True, 0))
    soft(torch.randn(5, 4)).sum().backward()
    assert soft.V.grad is not None and soft.V.grad.abs().sum() > 0
    assert layer.weight.grad is None


def test_decided_weights_are_those_stored():
    layer, g = nn.Linear(8, 3), torch.Generator().manual_seed(0)
    soft = SoftLayer(layer, layer.weight.detach(), Grid(2, False, 4))
    with torch.no_grad():
        soft.V.copy_(torch.where(torch.rand(soft.V.shape, generator=g) < 0.5, -20.0, 20.0))
    x = torch.randn(5, 8, generator=g)
    assert torch.allclose(soft(x), nn.functional.linear(x, soft.form().decode(), layer.bias), atol=1e-6)
    assert share(start(torch.tensor(0.3))).item() == pytest.approx(0.3)
    with pytest.raises(DoesNotFit, match="fc: rows of 8"):
        SoftLayer(layer, layer.weight.detach(), Grid(2, False, 3), "fc")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8))
def test_learnt_steps_round_as_fixed_ones_and_have_their_gradient(seed, bits):
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale, zero = grid_of(x.min() * 0.7, x.max() * 0.7, bits)
    assert torch.allclose(learnt_round(x, scale, zero, bits), fake_round(x, scale, zero, bits), atol=1e-12)
    scale.requires_grad_()
    x.requires_grad_()
    (to_x, to_scale) = torch.autograd.grad(learnt_round(x, scale, zero, bits).sum(), [x, scale])
    ratio = (x / scale).detach()
    code = ratio.round() + zero
    inside = (code >= 0) & (code <= 2**bits - 1)
    expected = torch.where(inside, ratio.round() - ratio, code.clamp(0, 2**bits - 1) - zero)
    assert torch.allclose(to_scale, expected.sum()) and torch.equal(to_x, inside.double())
