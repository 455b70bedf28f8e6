"""NUPES: gradients against finite differences, what learning reaches, rounded inputs, laws, and nonsense."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.compression.quantize.nupes import NUPES, decoded, error, nupes
from netweight.compression.quantize.powerquant import PowerQuant, powerquant
from netweight.core.compressed import assemble, weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.moments import moments
from netweight.core.perturbation import Linf
from netweight.core.plan import Plan
from netweight.core.task import Data, Task, outputs
from netweight.nn.layers import run
from netweight.nn.power import Power, PowerRounding, levels
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.verification.bounds import bounds


@given(exponent=st.floats(0.3, 1.4), bits=st.integers(3, 5), seed=st.integers(0, 2**16))
def test_gradients_are_finite_differences_away_from_the_jumps(exponent, bits, seed):
    q, h = 2 ** (bits - 1) - 1, 1e-6
    g = torch.Generator().manual_seed(seed)
    u = (torch.rand(3, 5, generator=g, dtype=torch.float64) * 2 - 1) * q
    log_a = torch.tensor(exponent, dtype=torch.float64).log().requires_grad_()
    log_s = torch.randn(3, 1, generator=g, dtype=torch.float64).requires_grad_()
    out = torch.randn(3, 5, generator=g, dtype=torch.float64)
    latent = u.clone().requires_grad_()

    def total(a, s):
        with torch.no_grad():
            return (decoded(u, a, s, q) * out).sum()

    (decoded(latent, log_a, log_s, q) * out).sum().backward()
    by_a = (total(log_a + h, log_s) - total(log_a - h, log_s)) / (2 * h)
    assert log_a.grad.item() == pytest.approx(by_a.item(), rel=1e-4, abs=1e-6)
    for row in range(3):
        shift = torch.zeros(3, 1, dtype=torch.float64)
        shift[row] = h
        by_s = (total(log_a, log_s + shift) - total(log_a, log_s - shift)) / (2 * h)
        assert log_s.grad[row].item() == pytest.approx(by_s.item(), rel=1e-4, abs=1e-6)

    # straight through the rounding: the slope of the unrounded decode at the code, at 1/2 where the code is 0
    n = u.round()
    at = torch.where(n == 0, 0.5, n)

    def smooth(m):
        return m.sign() * (m.abs() / q).pow(1 / exponent) * q * log_s.detach().exp()

    slope = (smooth(at + h) - smooth(at - h)) / (2 * h) * out
    assert torch.allclose(latent.grad, slope, rtol=1e-4)
    assert latent.grad.isfinite().all() and (latent.grad != 0).all()


@given(exponent=st.floats(0.3, 1.4), seed=st.integers(0, 2**16))
def test_what_is_learnt_on_is_what_is_stored(exponent, seed):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    form = Power.nearest(weight, 3, 0, exponent)
    value = decoded(form.integers().float(), form.exponent.log(), form.scale.float().log(), form.q)
    assert torch.allclose(value, form.decode(), rtol=1e-5, atol=1e-6)


def hard():
    """One neuron whose inputs move together, so that errors of different weights should cancel."""
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 1, bias=False)).eval()
    x = torch.randn(200, 1, generator=g) + 0.2 * torch.randn(200, 6, generator=g)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.45, 0.43, 0.12, 0.47, 0.44]]))
    return model, Task(Data(x), Data(x))


def test_finds_what_exhaustive_search_over_the_whole_grid_finds():
    model, task = hard()
    weight, x = weight_of(model, "0"), task.calibration.x
    start = Power.nearest(weight, 3, 0, 0.6)

    def losses(codes):
        decoded_ = levels(0.6, 3)[codes + 3] * start.scale.float()
        return (x @ (decoded_ - weight).T).pow(2).mean(0)

    best = losses(torch.tensor([*itertools.product(range(-1, 4), repeat=6)])).min().item()
    settings = NUPES(3, 0, 0.6, steps=400, rate=0.02, rate_exponent=0, rate_scale=0)
    form = nupes(model, task, ["0"], settings).packed["0"]
    assert float(form.exponent) == float(start.exponent) and torch.equal(form.scale, start.scale)
    found = (x @ (form.decode() - weight).T).pow(2).mean().item()
    assert best <= found * (1 + 1e-6) and found <= 2 * best
    assert found < 0.2 * losses(start.integers().long()).item()


def test_learning_moves_codes_exponent_and_scale_and_none_where_their_rates_are_zero():
    model, task = tiny_model(), tiny_task()
    start = nupes(model, task, ["7"], NUPES(3, steps=0)).packed["7"]
    moved = nupes(model, task, ["7"], NUPES(3, steps=60, rate_exponent=1e-2)).packed["7"]
    assert float(moved.exponent) != float(start.exponent)
    assert not torch.equal(moved.scale, start.scale) and not torch.equal(moved.codes, start.codes)
    assert (moved.integers() - start.integers()).abs().max() >= 1
    kept = nupes(model, task, ["7"], NUPES(3, steps=60, rate_exponent=0, rate_scale=0)).packed["7"]
    assert torch.equal(kept.exponent, start.exponent) and torch.allclose(kept.scale, start.scale, rtol=1e-3)


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_what_is_learnt_is_never_worse_than_the_start(activation_bits):
    model, task = tiny_model(), tiny_task()
    x, y = first_layer(model, task)
    losses = []
    for steps, rate in ((0, 0.01), (80, 0.01), (80, 10.0)):  # the last rate breaks everything
        settings = NUPES(3, -1, None, activation_bits, steps=steps, rate=rate, rate_exponent=rate / 10)
        change = nupes(model, task, ["0"], settings)
        rounding = change.activations.get("0")
        seen = x if rounding is None else rounding.module()(x)
        losses.append(float(error(model[0], seen, y, change.packed["0"].decode()).detach()))
    share = 0.9 if activation_bits is None else 0.95  # what the inputs lose cannot be learnt back
    assert losses[1] < share * losses[0] and losses[2] <= losses[0] * (1 + 1e-6)


def first_layer(model, task):
    x = task.calibration.x
    return x, run(model[0], x, weight_of(model, "0")).detach()


def test_later_layers_see_the_rounded_inputs():
    model, task = tiny_model(), tiny_task()
    settings = NUPES(2, steps=60, rate=0.05)
    alone = nupes(model, task, ["9"], settings).packed["9"].decode()
    after = nupes(model, task, ["0", "3", "7", "9"], settings).packed["9"].decode()
    assert not torch.equal(alone, after)


def test_seed_examples_and_steps_count():
    model, task = tiny_model(), tiny_task()
    usual = NUPES(3, steps=20, rate=0.05, batch=4)
    base = nupes(model, task, ["7"], usual).packed["7"].decode()
    for other in ({"seed": 1}, {"examples": 5}, {"steps": 10}, {"batch": 8}, {"exponent": 1.0}):
        changed = nupes(model, task, ["7"], NUPES(**{**vars(usual), **other})).packed["7"].decode()
        assert not torch.equal(changed, base), other


def test_without_steps_it_is_the_data_free_method():
    model, task = tiny_language_model(), tiny_text_task()
    layers = weighted(model, embeddings=True)
    plain = nupes(model, task, layers, NUPES(3, steps=0)).packed
    free = powerquant(model, task, layers, PowerQuant(3)).packed
    assert all(torch.equal(plain[layer].decode(), free[layer].decode()) for layer in layers)


def test_inputs_are_rounded_with_the_exponent_of_the_weight_to_the_range_seen():
    model, task = tiny_model(), tiny_task()
    layers = weighted(model)
    change = nupes(model, task, layers, NUPES(4, -1, activation_bits=4, steps=5, rate_exponent=1e-2))
    seen = moments(model, task.calibration, layers)
    for layer in layers:
        rounding = change.activations[layer]
        assert isinstance(rounding, PowerRounding) and rounding.bits == 4
        assert float(rounding.exponent) == float(change.packed[layer].exponent)
        assert rounding.signed == (seen[layer].low < 0)
        assert float(rounding.scale * rounding.q) == pytest.approx(max(-seen[layer].low, seen[layer].high))


@pytest.mark.parametrize(
    "settings",
    [
        NUPES(steps=0),
        NUPES(3, 8, steps=3),
        NUPES(3, -1, 0.6, 4, steps=3),
        NUPES(4, activation_bits=8, steps=0),
    ],
    ids=repr,
)
def test_laws(settings):
    check_compressor(nupes, settings)


def test_language_models():
    model, task = tiny_language_model(), tiny_text_task()
    check_compressor(nupes, NUPES(4, steps=3), model=model, task=task)


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_bounds_of_a_network_with_power_codes_on_both_sides_hold(method):
    model, task = tiny_model(), tiny_task()
    small = assemble(model, nupes(model, task, weighted(model), NUPES(4, -1, None, 4, steps=0)), Plan())
    x, twin = task.test.x[:4], small.plain()
    proven = bounds(small, x, Linf(0.05), method=method)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        with torch.no_grad():
            y = twin(x + 0.05 * (2 * torch.rand(x.shape, generator=g) - 1))
        assert ((proven.lower <= y) & (y <= proven.upper)).all()
    assert (proven.upper - proven.lower).mean() < 20


def test_bad_calibration_data():
    model = tiny_model()
    for x in (torch.zeros(1, 4, 7, 7), torch.full((3, 4, 7, 7), 0.5)):
        task = Task(Data(x), Data(x))
        change = nupes(model, task, weighted(model), NUPES(3, steps=3, activation_bits=4))
        assert outputs(assemble(model, change, Plan()).model, task.calibration).isfinite().all()


def test_dead_channels_zero_and_nan_weights():
    model, task = tiny_model(), tiny_task()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[3].weight.zero_()
        model[7].weight.fill_(0.25)
        model[9].weight[0, 0] = torch.nan
    change = nupes(model, task, weighted(model), NUPES(3, steps=3))
    assert set(change.left) == {"9"} and "NaN" in change.left["9"]
    assert (change.packed["3"].decode() == 0).all() and (change.packed["0"].decode()[:3] == 0).all()


def test_inputs_that_are_not_finite_leave_the_layer():
    model, task = tiny_model(), tiny_task()
    model[5] = nn.Threshold(1e9, torch.inf)  # everything behind it is infinite
    change = nupes(model, task, ["0", "7"], NUPES(3, steps=2))
    assert set(change.packed) == {"0"} and "NaN or Inf" in change.left["7"]


class Idle(nn.Module):
    """Holds a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = tiny_model(), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_refuses_what_does_not_fit_and_nonsense():
    with pytest.raises(DoesNotFit, match="^7: rows of 144"):
        nupes(tiny_model(), tiny_task(), ["7"], NUPES(group=7, steps=1))
    with pytest.raises(DoesNotFit, match="^embedding: .*Embedding"):
        nupes(tiny_language_model(), tiny_text_task(), ["embedding"], NUPES(steps=1))
    with pytest.raises(DoesNotFit, match="^spare: the layer is never called"):
        nupes(Idle(), tiny_task(), ["spare"], NUPES(steps=1))
    for wrong in (
        {"bits": 9}, {"group": -2}, {"exponent": 0.2}, {"activation_bits": 9}, {"steps": -1}, {"batch": 0},
        {"examples": 0}, {"rate": 0.0}, {"rate_exponent": -1.0}, {"rate_scale": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="need"):
            NUPES(**wrong)
