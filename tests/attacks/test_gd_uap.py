"""GD-UAP: the paper's invariants, that no data is looked at, the saturation control, and nonsense."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight.attacks import gd_uap as file
from netweight.attacks.gd_uap import center, changed, gd_uap, objective, universal, varied
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.activations import energy
from netweight.core.compressed import assemble, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import L2, Linf
from netweight.core.plan import Plan
from netweight.nn.normalize import Normalize
from netweight.testing import tiny_model, tiny_task

WITHIN = Linf(0.1, 0.0, 1.0)
X = tiny_task().test.x


@given(eps=st.floats(1e-4, 0.5), prior=st.sampled_from(file.PRIORS), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_no_number_leaves_xi_and_the_same_seed_gives_the_same(eps, prior, seed):
    model, within = tiny_model(), Linf(eps, 0.0, 1.0)
    before = copy.deepcopy(model.state_dict())
    made = universal(model, X[:1], within, prior=prior, images=X, steps=6, seed=seed)
    assert made.d.shape == (1, *X.shape[1:])
    assert Linf(eps).contains(made.d, torch.zeros_like(made.d)).all()
    again = universal(model, X[:1], within, prior=prior, images=X, steps=6, seed=seed)
    assert torch.equal(made.d, again.d) and made.checks == again.checks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@given(k=st.integers(1, 6), seed=st.integers(0, 99))
def test_doubled_activations_raise_the_objective_by_ln_4_each(k, seed):
    energies = torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.1
    assert float(objective(4 * energies) - objective(energies)) == pytest.approx(k * math.log(4), rel=1e-4)
    assert float(objective(torch.tensor([2.0, 3.0]))) == pytest.approx(math.log(6))  # a product, no sum


def test_permuted_channels_change_nothing():
    model = tiny_model()
    turned, order = copy.deepcopy(model), torch.randperm(8)  # the second convolution has two groups
    order = torch.cat([order, order + 8])
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        turned.state_dict()[name].copy_(model.state_dict()[name][order])
    turned[3].weight.data.copy_(model[3].weight.data[:, order[:8]])
    x = torch.rand(2, 4, 7, 7)
    assert torch.allclose(model(x), turned(x), atol=1e-5)
    assert torch.allclose(objective(energy(model, x)), objective(energy(turned, x)))


def test_it_climbs_the_objective_beyond_noise_of_the_same_size():
    model = tiny_model()
    made = universal(model, X[:1], WITHIN, steps=40)
    mean = torch.full_like(X[:1], 0.5)

    @torch.no_grad()
    def value(d: torch.Tensor) -> float:
        return float(objective(energy(model, mean + d)))

    generator = torch.Generator().manual_seed(0)
    signs = [0.1 * (2.0 * torch.randint(0, 2, mean.shape, generator=generator) - 1) for _ in range(50)]
    assert value(made.d) > max(value(d) for d in signs) > value(torch.zeros_like(mean))


def test_no_data_is_looked_at_but_by_the_prior_data():
    model = tiny_model()
    for prior in ("none", "range"):
        one, other = (universal(model, like, WITHIN, prior=prior, steps=5).d for like in (X[:1], 0 * X[:1]))
        assert torch.equal(one, other)
    one, other = (
        universal(model, X[:1], WITHIN, prior="data", images=images, steps=5).d for images in (X, 1 - X)
    )
    assert not torch.equal(one, other)


def test_points_are_one_change_within_the_range_and_hits_are_true():
    model, x = tiny_model(), X.clamp(0.05, 0.95)
    found = gd_uap(model.train(), x, None, WITHIN, steps=10, seed=3)
    assert model.training
    model.eval()
    assert WITHIN.contains(found.points, x).all()
    d = universal(model, x[:1], WITHIN, steps=10, seed=3).d
    assert torch.equal(found.points, WITHIN.project(x + d, x))
    assert torch.equal(found.hit, model(found.points).argmax(1) != model(x).argmax(1))
    assert found.hit.float().mean() == pytest.approx(changed(model, x, found.points))


def test_labels_say_what_a_hit_is():
    model = tiny_model()
    y = (model(X).argmax(1) + 1) % 4
    found = gd_uap(model, X, y, Linf(0.0, 0.0, 1.0), steps=2)
    assert torch.equal(found.points, X) and found.hit.all()
    assert not gd_uap(model, X, None, Linf(0.0, 0.0, 1.0), steps=2).hit.any()


def test_another_seed_begins_elsewhere():
    one, other = (universal(tiny_model(), X[:1], Linf(0.3), steps=0, seed=seed).d for seed in (0, 1))
    assert not torch.equal(one, other) and 0.2 < float(one.abs().max()) <= 0.3


def test_what_is_changed_is_counted_in_predictions_or_in_length():
    model = tiny_model()
    assert changed(model, X, X) == 0
    image = nn.Conv2d(4, 2, 1)
    assert changed(image, X, X) == 0
    nn.init.zeros_(image.bias)
    assert changed(image, X, 3 * X) == pytest.approx(2)


class Bright(nn.Module):
    """All its slopes are positive, so that everything is at +xi after a step."""

    def forward(self, x):
        """Two scores."""
        y = torch.relu(torch.conv2d(x, torch.ones(1, x.shape[1], 1, 1))).flatten(1)
        return torch.stack([y.sum(1), -y.sum(1)], 1)


def test_where_nothing_can_move_the_change_is_halved_and_the_full_one_kept(monkeypatch):
    seen = []

    def spied(model, x):
        seen.append(float((x.detach() - 0.5).abs().max()))
        return energy(model, x)

    monkeypatch.setattr(file, "energy", spied)
    made = universal(Bright(), X[:1], WITHIN, steps=5)
    assert seen[1] == pytest.approx(0.1)  # at the edge, and after the second step still there
    assert seen[2] == pytest.approx(0.05)  # halved
    assert made.saturated == 1 and torch.allclose(made.d, torch.full_like(made.d, 0.1))


def test_checks_come_after_200_steps_if_it_stands_still_else_after_400_and_the_best_is_kept(monkeypatch):
    rates = iter([0.3, 0.2, 0.1])
    at = []

    def rated(model, x, s):
        at.append(s)
        return next(rates)

    monkeypatch.setattr(file, "changed", rated)
    made = universal(Bright(), X[:1], WITHIN, steps=450)
    steps = [step for step, _ in made.checks]
    assert 200 <= steps[0] < 210 and 400 <= steps[1] < 420 and len(at) == 3  # two checks and the end
    assert made.changed == 0.3 and [rate for _, rate in made.checks] == [0.3, 0.2]
    monkeypatch.setattr(file, "changed", lambda model, x, s: 0.5)
    monkeypatch.setattr(file, "CHECK", 3)
    with monkeypatch.context() as never:
        never.setattr(file, "SATURATED", 2.0)
        assert [step for step, _ in universal(Bright(), X[:1], WITHIN, steps=14).checks] == [6, 12]
    made = universal(Bright(), X[:1], WITHIN, steps=500)
    assert len(made.checks) == 11 and made.checks[-1][0] < 60  # ten checks without gain


def test_of_several_searches_the_one_that_changes_most_is_kept():
    model = tiny_model()
    tried = [universal(model, X[:1], WITHIN, steps=4, seed=seed) for seed in range(5)]
    best = max(tried, key=lambda one: one.changed)
    found = gd_uap(model, X, None, WITHIN, steps=4, restarts=5)
    assert torch.equal(found.points, WITHIN.project(X + best.d, X))


def test_backgrounds():
    like = torch.zeros(1, 3, 4, 4)
    net = nn.Sequential(Normalize([0.2, 0.3, 0.4], [1.0, 1.0, 1.0]), nn.Flatten())
    assert center(net, like, WITHIN)[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert center(nn.Flatten(), like, Linf(0.1, 0.0, 3.0)).unique().tolist() == [1.5]
    assert center(nn.Flatten(), like, Linf(0.1)).unique().tolist() == [0.0]
    draw = file._drawing(center(net, like, WITHIN), WITHIN)
    pixels = draw(4000, torch.Generator().manual_seed(0))
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.2, 0.3, 0.4], abs=0.01)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx([0.1, 0.15, 0.2], abs=0.01)
    inside = ((pixels > 0) & (pixels < 1)).float().mean()
    assert 0.95 < float(inside) < 0.99 and pixels.min() == 0


@given(side=st.integers(2, 20), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_varied_images_stay_images(side, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 2, side, side + 1, generator=generator)
    y = varied(x, generator)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 + 1e-6
    assert torch.allclose(varied(torch.full_like(x, 0.7), generator), torch.full_like(x, 0.7), atol=1e-5)
    flat = torch.rand(3, 5)
    assert varied(flat, generator) is flat


def test_variations_each_happen_about_half_the_time():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 15).expand(400, 1, 15, 15)
    y = varied(ramp, generator)
    flipped = (y[:, 0, 7, 12] < y[:, 0, 7, 2]).float().mean()
    assert 0.4 < float(flipped) < 0.6
    turned = ((y[:, 0, 2, 7] - y[:, 0, 12, 7]).abs() > 0.01).float().mean()
    assert 0.35 < float(turned) < 0.65


def test_a_compressed_network_is_fooled_by_what_was_made_on_the_float_one():
    model, task = tiny_model(), tiny_task()
    small = assemble(model, rtn(model, task, weighted(model), RTN(8)), Plan({}))
    d = universal(model, X[:1], WITHIN, steps=20).d
    moved = WITHIN.project(X + d, X)
    assert changed(small.model, X, moved) == changed(small.plain(), X, moved)
    own = universal(small.plain(), X[:1], WITHIN, steps=20).d
    assert Linf(0.1).contains(own, torch.zeros_like(own)).all()


def test_bad_input():
    model = tiny_model()
    with pytest.raises(BadInput, match="unknown prior 'rnge'; did you mean 'range'"):
        gd_uap(model, X, None, WITHIN, prior="rnge")
    with pytest.raises(DoesNotFit, match="not within l2=1; give linf"):
        gd_uap(model, X, None, L2(1.0))
    with pytest.raises(BadInput, match="needs the valid range"):
        gd_uap(model, X, None, Linf(0.1), prior="range")
    with pytest.raises(BadInput, match="the prior data needs images"):
        universal(model, X[:1], WITHIN, prior="data")
    with pytest.raises(DoesNotFit, match="whole numbers"):
        gd_uap(model, X.long(), None, WITHIN)
    with pytest.raises(DoesNotFit, match="no nonlinearity follows"):
        gd_uap(nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), X, None, WITHIN)
    assert math.isnan(universal(model, X[:1], Linf(0.1), steps=2).changed)  # nothing to measure it on
