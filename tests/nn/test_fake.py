"""Rounding inside a forward pass: exactly on the grid, straight-through gradients, ranges that hold zero."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netweight.nn.fake import DynamicRounding, StaticRounding, fake_round, grid_of, round_between


def test_by_hand():
    rounding = StaticRounding.of(-1.0, 6.5, 4).module()
    assert (float(rounding.scale), float(rounding.zero)) == (0.5, 2.0)
    x = torch.tensor([-9.0, -1.0, -0.75, -0.25, 0.0, 0.24, 0.75, 6.3, 9.0])
    assert rounding(x).tolist() == [-1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 6.5, 6.5]  # half to even
    assert (
        StaticRounding.of(-1.0, 6.5).bits == StaticRounding(*grid_of(x[0], x[1], 8)).bits == 8
        and DynamicRounding().bits == 8
    )


@given(
    lo=st.floats(-100, 100), width=st.floats(1e-3, 100), bits=st.integers(2, 16), seed=st.integers(0, 2**16)
)
def test_values_lie_on_the_grid_to_the_last_bit_and_are_the_nearest(lo, width, bits, seed):
    rounding = StaticRounding.of(lo, lo + width, bits)
    x = lo + width * (2 * torch.rand(50, generator=torch.Generator().manual_seed(seed)) - 0.5)
    y = rounding.module()(x)
    codes = ((x.clamp(*ends(rounding)) / rounding.scale).round() + rounding.zero).clamp(0, 2**bits - 1)
    assert torch.equal(y, (codes - rounding.zero) * rounding.scale)
    low, high = ends(rounding)
    assert ((y - x.clamp(low, high)).abs() <= rounding.scale * (0.5 + 2.0 ** (bits - 22))).all()
    assert rounding.module()(torch.zeros(1)) == 0
    assert torch.equal(rounding.module()(y), y)


def ends(rounding):
    low, high = -rounding.zero * rounding.scale, (2**rounding.bits - 1 - rounding.zero) * rounding.scale
    return float(low), float(high)


@pytest.mark.parametrize(("lo", "hi"), [(1.0, 3.0), (-3.0, -1.0), (0.0, 0.0)])
def test_the_range_is_widened_to_zero(lo, hi):
    scale, zero = grid_of(torch.tensor(lo), torch.tensor(hi), 4)
    assert zero == (15 if hi < 0 else 0) and scale == (1.0 if lo == hi else pytest.approx(3.0 / 15))


def test_gradients_pass_inside_and_stop_outside():
    x = torch.tensor([-2.0, -0.3, 0.1, 0.9, 5.0], requires_grad=True)
    StaticRounding.of(-1.0, 1.0, 3).module()(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    x = torch.tensor([-0.01, 0.01, 14.99, 15.01], requires_grad=True)
    StaticRounding.of(0.0, 15.0, 4).module()(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    x = torch.tensor([[-2.0, 0.3, 1.0], [0.0, 0.1, 0.2]], requires_grad=True)
    (DynamicRounding(4).module()(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad[:, 1].tolist() == [2.0, 2.0]


def test_each_token_has_its_own_range():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0], [-1.0, 2.0, 0.0, 0.0]])
    assert torch.equal(DynamicRounding(2).module()(x), x)
    assert not torch.equal(StaticRounding.of(-1.0, 30.0, 2).module()(x), x)
    each = torch.stack([DynamicRounding(3).module()(row[None])[0] for row in x])
    assert torch.equal(DynamicRounding(3).module()(x), each)
    assert (DynamicRounding(4).module()(torch.zeros(2, 3)) == 0).all()


def test_tensors_are_buffers_that_state_leaves_out():
    module = StaticRounding.of(-1.0, 1.0).module()
    assert module.state_dict() == {} and {name for name, _ in module.named_buffers()} == {"scale", "zero"}
    assert DynamicRounding().module().state_dict() == {}


def test_scale_and_zero_broadcast():
    x = torch.tensor([[1.2, 1.2], [3.3, 3.3]])
    y = fake_round(x, torch.tensor([[1.0], [0.5]]), torch.tensor([[0.0], [2.0]]), 4)
    assert y.tolist() == [[1.0, 1.0], [3.5, 3.5]]


class Straight(torch.autograd.Function):
    """round, which counts as the identity in gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8))
def test_learnt_ranges_have_the_gradients_of_the_formula(seed, bits):
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(4, 20, generator=g, dtype=torch.float64)
    lo, hi = -0.5 - torch.rand(4, 1, generator=g).double(), 0.5 + torch.rand(4, 1, generator=g).double()
    weights = torch.randn(4, 20, generator=g, dtype=torch.float64)

    def formula(x, lo, hi, bits):
        s = (hi - lo) / (2**bits - 1)
        z = Straight.apply(-lo / s)
        return ((Straight.apply(x / s) + z).clamp(0, 2**bits - 1) - z) * s

    found = []
    for way in (formula, round_between):
        inputs = [t.clone().requires_grad_() for t in (x, lo, hi)]
        y = way(*inputs, bits)
        found.append((y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found))


def test_learnt_ranges_round_tokens_as_the_dynamic_rounding_does():
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    y = round_between(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), 4)
    assert torch.allclose(y, DynamicRounding(4).module()(x), atol=1e-6)
    zeros = torch.zeros(2, 3, requires_grad=True)
    round_between(zeros, zeros.amin(-1, keepdim=True), zeros.amax(-1, keepdim=True), 4).sum().backward()
    assert zeros.grad.isfinite().all()
