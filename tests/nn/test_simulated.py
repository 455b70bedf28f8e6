"""Simulated layers: equal to what is packed from them bit for bit, gradients straight through, odd rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.core.grid import Grid
from netweight.nn.fake import StaticRounding
from netweight.nn.quantizer import straight
from netweight.nn.simulated import MOST, Simulated, pack, rounded_bias, row_scales

STEP = torch.tensor(0.05)


def layer(kind, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {
            "linear": lambda: (nn.Linear(6, 5), torch.rand(3, 6)),
            "conv": lambda: (nn.Conv2d(4, 6, 3, 2, 1, groups=2), torch.rand(3, 4, 5, 5)),
            "conv1d": lambda: (nn.Conv1d(4, 6, 3), torch.rand(3, 4, 7)),
            "table": lambda: (nn.Embedding(7, 4), torch.randint(7, (3, 5))),
        }
        return made[kind]()


@settings(deadline=None)
@given(
    kind=st.sampled_from(["linear", "conv", "conv1d", "table"]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_gives_what_the_packed_layer_gives(kind, bits, symmetric, seed):
    like, x = layer(kind, seed)
    grid = Grid(bits, symmetric, 0)
    rounding = None if kind == "table" else StaticRounding(STEP, torch.tensor(0.0), 4)
    step = None if rounding is None else STEP
    bias = getattr(like, "bias", None)
    form = pack(like.weight, grid, bias, step)
    packed = form.layer(like)
    if bias is not None:
        packed.like.bias = nn.Parameter(rounded_bias(bias, form.scale.reshape(-1), step))
    with torch.no_grad():
        expected = packed(x if rounding is None else rounding.module()(x))
        assert torch.equal(Simulated(like, grid, rounding)(x), expected)


def test_scales_and_codes_by_hand():
    weight = torch.tensor([[7.0, -3.6, 0.4], [0.7, 0.0, -0.33]])
    form = pack(weight, Grid(4, True, 0))
    assert form.scale.reshape(-1).tolist() == pytest.approx([1.0, 0.1], rel=1e-3)
    assert (form.integers().int() - 8).tolist() == [[7, -4, 0], [7, 0, -3]]


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8))
def test_biases_are_the_nearest_multiples_of_the_accumulators_step(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 6), (5,)))
    scale, _ = row_scales(weight, Grid(bits, True, 0), bias, STEP)
    unit = scale.double() * STEP.double()
    rounded = rounded_bias(bias, scale, STEP).double()
    assert ((rounded - bias.double()).abs() <= unit / 2 + 1e-6 * bias.abs()).all()
    steps = rounded / unit
    assert ((steps - steps.round()).abs() < 1e-3 + 1e-6 * steps.abs()).all()
    assert torch.equal(rounded_bias(bias, scale, None), bias)


def test_dead_rows_keep_their_bias_and_tiny_rows_do_not_overflow():
    weight = torch.tensor([[1.0, -0.5], [0.0, 0.0], [1e-12, 0.0]])
    bias = torch.tensor([0.3, 0.123, 2.0])
    for symmetric in (True, False):
        scale, _ = row_scales(weight, Grid(8, symmetric, 0), bias, STEP)
        rounded = rounded_bias(bias, scale, STEP)
        assert ((rounded - bias).abs() < 1e-3).all()
        assert ((bias.double() / (scale.double() * STEP)).abs() <= 1.01 * MOST).all()
    nothing, _ = row_scales(torch.zeros(2, 3), Grid(4, True, 0))
    assert (nothing > 0).all() and nothing.isfinite().all()


def test_gradients_pass_straight_through():
    like, x = layer("linear", 0)
    module = Simulated(like, Grid(3, True, 0), None)
    module(x).sum().backward()
    assert torch.allclose(like.weight.grad, x.sum(0).expand(5, 6))
    assert torch.allclose(like.bias.grad, torch.full((5,), 3.0))
    value = torch.tensor([1.4], requires_grad=True)
    rounded = straight(value, value.round())
    rounded.sum().backward()
    assert rounded.tolist() == [1.0] and value.grad.tolist() == [1.0]
