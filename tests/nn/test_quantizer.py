"""Quantizers that are trained with: levels, gradients in closed form, and packing without a change."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.compressed import assemble
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.nn.codebook import Codebook
from netweight.nn.packed import Affine
from netweight.nn.quantized import Quantized, Roundings, attach, begin, finished, inner_layers, quantized
from netweight.nn.quantizer import FromMean, Learnt, Levels, codes, rounded, scaled_gradient, straight
from netweight.testing import tiny_model, tiny_task

LEVELS = [
    Levels.signed(4), Levels.unsigned(3), Levels.mid_rise(2), Levels.ternary(), Levels.signed(1),
    Levels(0, 2),
]  # fmt: skip


def values(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*shape or (8, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", LEVELS)
def test_every_value_goes_to_its_nearest_level(levels):
    x, step = values() * 2, torch.tensor(0.3)
    grid = (torch.arange(levels.low, levels.high + 1) + levels.offset) * step
    y = rounded(x, step, levels)
    assert len(grid) == levels.count <= 2**levels.bits
    nearest = (x[..., None] - grid).abs().amin(-1)
    assert torch.allclose((x - y).abs(), nearest, atol=1e-6)
    assert (0 in grid.tolist()) == (not levels.half)
    assert torch.equal(y, (codes(x, step, levels) + levels.offset) * step)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("rows", [False, True])
def test_gradients_are_those_of_the_paper(levels, rows):
    x = values(1).requires_grad_()
    step = (torch.full((8, 1), 0.3) if rows else torch.tensor(0.3)).requires_grad_()
    g = values(2)
    rounded(x, step, levels, 0.25).backward(g)
    u = x.detach() / 0.3 - levels.offset
    inside = (u >= levels.low) & (u <= levels.high)
    assert inside.any() and (~inside).any()
    assert torch.equal(x.grad, g * inside)
    by_step = torch.where(inside, u.round() - u, u.clamp(levels.low, levels.high) + levels.offset)
    wanted = 0.25 * (g * by_step)
    assert torch.allclose(step.grad, wanted.sum(1, keepdim=True) if rows else wanted.sum(), atol=1e-5)


def test_straight_and_scaled_gradients():
    x = values(3).requires_grad_()
    straight(x, x.round()).sum().backward()
    assert torch.equal(straight(x, x.round()), x.round()) and torch.equal(x.grad, torch.ones_like(x))
    x.grad = None
    assert torch.equal(scaled_gradient(x, 0.1), x)
    scaled_gradient(x, 0.1).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 0.1))


@given(c=st.floats(0.25, 64).map(lambda c: 2.0 ** round(math.log2(c))), seed=st.integers(0, 99))
def test_statistics_move_with_the_weights(c, seed):
    x = values(seed)
    for quantizer in (FromMean.stats(2), FromMean.stats(4), FromMean.ternary(), FromMean.binary()):
        y = quantizer(x)
        assert torch.allclose(quantizer(c * x), c * y, rtol=1e-6)
        off = (x / quantizer.size(x) - quantizer.levels.offset) % 1 != 0.5  # not on a threshold
        clipped = codes(x, quantizer.size(x), quantizer.levels) == quantizer.levels.low
        both = off & ~clipped & ~(codes(-x, quantizer.size(x), quantizer.levels) == quantizer.levels.low)
        assert torch.allclose(quantizer(-x)[both], -y[both])
        assert all(len(row.unique()) <= quantizer.levels.count for row in y)


def test_ternary_and_binary_steps_in_closed_form():
    x = torch.linspace(-1, 1, 30001)[None]  # uniform: the threshold is a third of the range
    y = FromMean.ternary()(x)
    shares = [(y == level).float().mean().item() for level in y.unique().tolist()]
    assert len(shares) == 3 and shares == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert y.max().item() == pytest.approx(2 / 3, abs=1e-3)
    w = values(5)
    y = FromMean.binary()(w)
    least = [(w[r] @ w[r].sign() / w.shape[1]).item() for r in range(len(w))]  # best s for s sign(w)
    assert y.abs().amax(1).tolist() == pytest.approx(least, rel=1e-3)
    assert torch.equal(y.sign(), w.sign())


def test_statistics_pass_the_gradient_everywhere():
    x = values(4).requires_grad_()
    g = values(5)
    FromMean.stats(2)(x * 10).backward(g)
    assert torch.allclose(x.grad, 10 * g)


def test_a_learnt_step_starts_from_the_first_values_and_is_kept():
    quantizer = Learnt(Levels.unsigned(4))
    x = values(6).abs()
    quantizer(x)
    assert quantizer.step.item() == pytest.approx(2 * x.mean().item() / math.sqrt(15), rel=1e-6)
    again = copy.deepcopy(quantizer)
    again(100 * x)
    assert again.step.item() == quantizer.step.item()
    fresh = Learnt(Levels.unsigned(4))
    fresh.load_state_dict(quantizer.state_dict())
    fresh(100 * x)
    assert fresh.step.item() == quantizer.step.item()
    with pytest.raises(BadInput, match="do not fit"):
        Learnt(Levels.signed(2), places=3, axis=0)(x)


def test_a_learnt_step_falls_where_that_lowers_the_error():
    torch.manual_seed(0)
    x = values(7, 4000)
    quantizer = Learnt(Levels.signed(3), start=4.0)
    quantizer.begin(x)
    start = (quantizer(x) - x).square().mean().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean().item() < 0.5 * start
    assert 0.4 < quantizer.step.item() < 0.75  # the best step for a normal variable at 8 levels is 0.586


def test_a_step_that_falls_below_the_least_counts_as_that_and_can_come_back():
    quantizer = Learnt(Levels.signed(4))
    quantizer.begin(values())
    quantizer.step.data.fill_(-1.0)
    y = quantizer(values())
    assert y.isfinite().all() and y.abs().max() < 1e-3
    y.sum().backward()
    assert quantizer.step.grad.isfinite() and quantizer.step.grad != 0


WEIGHTS = {
    "row": lambda layer: Learnt(Levels.signed(3), places=len(layer.weight), axis=0),
    "tensor": lambda layer: Learnt(Levels.signed(4)),
    "stats": lambda layer: FromMean.stats(2),
    "ternary": lambda layer: FromMean.ternary(),
    "binary": lambda layer: FromMean.binary(),
}


@pytest.mark.parametrize("kind", [*WEIGHTS])
def test_what_is_packed_computes_what_was_trained(kind):
    model, task = tiny_model(), tiny_task()
    layers = inner_layers(model)
    low = float(min(x.min() for x, _ in task.test)) < 0

    def rule(name, layer):
        levels = Levels.signed(8) if low else Levels.unsigned(8)
        return Roundings(WEIGHTS[kind](layer), Learnt(levels)) if name in layers else None

    net = attach(model, rule)
    assert list(quantized(net)) == layers and not any(isinstance(m, Quantized) for m in model.modules())
    begin(net, task.calibration.x)
    net.eval()
    plain, change = finished(net)
    small = assemble(plain, change, Plan({}))
    with torch.no_grad():
        assert torch.equal(small.model(task.test.x), net(task.test.x))
        assert torch.equal(small.plain()(task.test.x), net(task.test.x))
        assert not torch.allclose(net(task.test.x), model(task.test.x), atol=1e-4)
    wanted = Codebook if kind in ("stats", "binary") else Affine
    assert all(isinstance(form, wanted) for form in change.packed.values())
    assert {*change.packed} == {*change.activations} == {*layers}


def test_inputs_without_a_stored_form_are_named():
    net = attach(nn.Sequential(nn.Linear(4, 4)), lambda name, layer: Roundings(input=Learnt(Levels(0, 2))))
    begin(net, values(0, 3, 4))
    with pytest.raises(DoesNotFit, match="0: inputs on the levels"):
        finished(net)


def test_nonsense_is_refused():
    for wrong in (lambda: Levels(1, 1), lambda: Levels.signed(0), lambda: Levels.unsigned(17)):
        with pytest.raises(BadInput):
            wrong()
    with pytest.raises(DoesNotFit, match="LayerNorm"):
        Quantized(nn.LayerNorm(3), Roundings())
