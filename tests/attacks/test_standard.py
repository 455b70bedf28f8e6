"""The standard attacks: points inside, hits that are true, linear networks broken where they can be."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from torch import nn

from netweight.attacks.apgd import apgd, checkpoints, dlr, sparse, targeted_dlr
from netweight.attacks.deepfool import deepfool
from netweight.attacks.ensemble import ensemble
from netweight.attacks.fab import fab, nearest
from netweight.attacks.fgsm import fgsm
from netweight.attacks.hop_skip_jump import hop_skip_jump
from netweight.attacks.pgd import pgd
from netweight.attacks.square import side_share, square
from netweight.core.ascent import ascend
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import L1, L2, BitFlips, Box, Linf

CE, TARGETED = partial(apgd, loss="ce"), partial(apgd, loss="targeted")
SQUARE = partial(square, steps=400)
WHITE = {
    "fgsm": fgsm,
    "pgd": pgd,
    "apgd": apgd,
    "apgd-ce": CE,
    "targeted": TARGETED,
    "deepfool": deepfool,
    "fab": fab,
}
BLACK = {"square": SQUARE, "hop-skip-jump": hop_skip_jump}
ALL = {**WHITE, **BLACK, "ensemble": partial(ensemble, steps=30)}
BALLS = [Linf(0.2), Linf(0.25, 0.0, 1.0), L2(0.4), L2(0.4, 0.0, 1.0), L1(0.6), L1(0.6, 0.0, 1.0)]


def linear(seed: int = 3, classes: int = 2) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    model[1].weight.data, model[1].bias.data = torch.randn(classes, 16, generator=g), torch.zeros(classes)
    return model


def inputs(count: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def worst_margin(model: nn.Module, x: torch.Tensor, y: torch.Tensor, within) -> torch.Tensor:
    """max over the set and over j != y of z_j - z_y, exact for a linear network."""
    weight = model[1].weight.detach()
    slopes = (weight[None] - weight[y][:, None]).reshape(len(x), len(weight), *x.shape[1:])
    return within.support(slopes, x).scatter(1, y[:, None], -torch.inf).amax(1)


@pytest.mark.parametrize("within", BALLS, ids=repr)
@pytest.mark.parametrize("name", ALL)
def test_points_are_inside_and_hits_are_true_and_possible(name, within):
    model, x = linear(classes=3), inputs()
    y = model(x).argmax(1)
    y[:4] = (y[:4] + 1) % 3
    found, worst = ALL[name](model, x, y, within), worst_margin(model, x, y, within)
    assert within.contains(found.points, x).all()
    assert torch.equal(found.hit, model(found.points).argmax(1) != y)
    assert found.hit[:4].all() and torch.equal(found.points[:4], x[:4])  # wrong before anything moved
    assert not (found.hit & (worst <= -1e-5)).any()


@pytest.mark.parametrize("within", BALLS[:1] + BALLS[2:3] + BALLS[4:5], ids=repr)
@pytest.mark.parametrize("name", [name for name in ALL if name != "fgsm"])
def test_a_linear_network_is_broken_where_it_can_be(name, within):
    """Two classes: what lies clearly within reach is reached, but by decisions alone not in every L1 ball."""
    model, x = linear(), inputs(80)
    y = model(x).argmax(1)
    worst = worst_margin(model, x, y, within)
    clear = worst > 0.25 * (worst_margin(model, x, y, type(within)(2 * within.eps)) - worst)
    found = ALL[name](model, x, y, within)
    share = found.hit[clear].float().mean()
    assert clear.sum() >= 10
    by_decisions = 0.3 if isinstance(within, L1) else 0.75
    assert share >= {"hop-skip-jump": by_decisions, "square": 0.9}.get(name, 1)


def test_one_step_is_exact_where_two_classes_are_linear():
    model, x, within = linear(), inputs(), Linf(0.1)
    y = model(x).argmax(1)
    assert torch.equal(fgsm(model, x, y, within).hit, worst_margin(model, x, y, within) > 0)


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_points(name):
    """Dropout and batch norm stand still, modes and the global generator come back, no gradient stays."""
    inner = linear(classes=3)
    model = nn.Sequential(nn.Dropout(0.9), *inner).train()
    model[2].eval()
    x, y, before = inputs(12), inner(inputs(12)).argmax(1), torch.get_rng_state()
    runs = [ALL[name](model, x, y, L2(0.3), seed=seed) for seed in (0, 0)]
    assert torch.equal(runs[0].points, runs[1].points) and torch.equal(runs[0].hit, runs[1].hit)
    assert model.training and model[0].training and not model[2].training
    assert torch.equal(torch.get_rng_state(), before) and not runs[0].points.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [*BLACK, "ensemble"])
def test_black_boxes_need_no_gradient(name):
    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """One-hot of the sign of the sum."""
            positive = (x.detach().flatten(1).sum(1) > 8).long()
            return nn.functional.one_hot(positive, 2).float()

    x = inputs(60)
    reach = 16 * 0.1
    near = (x.flatten(1).sum(1) - 8).abs()
    found = ALL[name](Decides(), x, None, Linf(0.1))
    assert found.hit[near < 0.5 * reach].float().mean() >= (0.5 if name == "square" else 0.9)
    assert not found.hit[near > reach + 1e-4].any()


@pytest.mark.parametrize("name", WHITE)
def test_gradient_attacks_say_that_they_need_one(name):
    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Scores without a graph."""
            return linear()(x.detach()).detach()

    with pytest.raises(DoesNotFit, match="use one that needs none: square"):
        WHITE[name](Cut(), inputs(), None, Linf(0.1))


@pytest.mark.parametrize("name", ALL)
def test_bad_input(name):
    attack = ALL[name]
    with pytest.raises(DoesNotFit, match="whole numbers; attack embeddings"):
        attack(nn.Identity(), torch.zeros(2, 3, dtype=torch.long), None, Linf(0.1))
    with pytest.raises(DoesNotFit, match=r"class scores `b classes`, but the network gives \(2, 2, 4\)"):
        attack(nn.Linear(3, 4), torch.zeros(2, 2, 3), None, Linf(0.1))
    with pytest.raises(DoesNotFit, match="bitflips=2 is no set of inputs"):
        attack(nn.Linear(3, 4), torch.zeros(2, 3), None, BitFlips(2))
    for value in (torch.nan, torch.inf):
        with pytest.raises(BadInput, match="an input holds NaN or Inf"):
            attack(nn.Linear(3, 4), torch.tensor([[0.0, value, 1.0]]), None, Linf(0.1))


@pytest.mark.parametrize("name", ALL)
def test_tuples_rows_and_boxes(name):
    """Networks that give several things; inputs that are no images; boxes where an attack knows them."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Scores and something else."""
            return self.inner(x), x

    torch.manual_seed(0)
    model, x = Several(), inputs(9).reshape(9, 16)[:, :6]
    y = model(x)[0].argmax(1)
    found = ALL[name](model, x, y, Linf(0.3, 0.0, 1.0))
    assert torch.equal(found.hit, model(found.points)[0].argmax(1) != y) and found.hit.any()
    box = Box(0.0, 1.0)
    if name in ("deepfool", "fab", "hop-skip-jump"):
        with pytest.raises(DoesNotFit, match="a box has none"):
            ALL[name](model, x, y, box)
    else:
        found = ALL[name](model, x, y, box)
        assert box.contains(found.points, x).all() and found.hit.any()


def test_the_ensemble_is_never_weaker_than_its_first_attack():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
    x, within = inputs(60), Linf(0.05, 0.0, 1.0)
    first, all_ = pgd(model, x, None, within, steps=30), ALL["ensemble"](model, x, None, within)
    assert not (first.hit & ~all_.hit).any()
    assert all_.hit.sum() > fgsm(model, x, None, within).hit.sum()


@given(st.integers(3, 8), st.integers(0, 1000), st.floats(0.1, 50), st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_ratios_of_logits_do_not_change_with_scale_or_shift(classes, seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, classes, generator=g, dtype=torch.float64)
    y = torch.randint(0, classes, (4,), generator=g)
    other = (y + 1) % classes
    for ratio in (lambda z: dlr(z, y), lambda z: targeted_dlr(z, y, other)):
        if classes == 3 and ratio(scores).ndim and torch.equal(targeted_dlr(scores, y, other), ratio(scores)):
            continue  # without a fourth class the gap is not divided
        assert torch.allclose(ratio(scale * scores + shift), ratio(scores), atol=1e-6)
    assert torch.equal(dlr(scores, y) > 0, scores.argmax(1) != y)


def test_ratios_by_hand():
    scores = torch.tensor([[4.0, 3.0, 1.0, 0.0]])
    assert dlr(scores, torch.tensor([0])).item() == pytest.approx(-1 / 3)
    assert targeted_dlr(scores, torch.tensor([0]), torch.tensor([2])).item() == pytest.approx(-3 / 3.5)


def test_checkpoints_of_the_paper():
    """p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 (section 3.2), rounded up."""
    assert sorted(checkpoints(100))[:8] == [22, 41, 58, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(100, sparse=True))[:3] == [4, 8, 12]


def test_sparse_steps_by_hand():
    step = sparse(torch.tensor([[3.0, -2.0, 1.0, 0.0]]), torch.tensor([0.5]), 2.0)
    assert torch.equal(step, torch.tensor([[1.0, -1.0, 0.0, 0.0]]))


@given(st.integers(0, 10_000), st.sampled_from([Linf, L2, L1]), st.floats(-3, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_nearest_point_of_a_plane_within_a_range_is_the_nearest(seed, kind, rise, bounded):
    """Against scipy: linear programmes for Linf and L1, the root of the multiplier for L2."""
    g = torch.Generator().manual_seed(seed)
    w, s = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    w, s = w.where(torch.rand(5, generator=g) < 0.8, 0.0), s.sigmoid()
    within = kind(1.0, 0.0, 1.0) if bounded else kind(1.0)
    d = nearest(s[None], w[None], torch.tensor([rise], dtype=torch.float64), within)[0]
    low, high = (-s, 1 - s) if bounded else (torch.full_like(s, -1e3), torch.full_like(s, 1e3))
    most = torch.where(w * rise > 0, high, low) @ w
    assert (d >= low - 1e-9).all() and (d <= high + 1e-9).all()
    if abs(most) <= abs(rise) + 1e-6 or w.abs().max() < 1e-3:
        assert not bounded or abs(d @ w - most) < 1e-6 or abs(most) > abs(rise)
        return
    assert float(d @ w) == pytest.approx(rise, abs=1e-6)
    length = float(torch.linalg.vector_norm(d, within.norm))
    assert length == pytest.approx(shortest(w, rise, low, high, within.norm), rel=1e-5, abs=1e-6)


def shortest(w, rise, low, high, norm) -> float:
    """The least |d|_p with <w, d> = rise and low <= d <= high."""
    if norm == 2:
        along = lambda t: float((t * w).clamp(low, high) @ w) - rise  # noqa: E731
        t = brentq(along, -1e7, 1e7, xtol=1e-14)
        return float((t * w).clamp(low, high).norm())
    w, low, high, n = w.numpy(), low.numpy(), high.numpy(), 5
    eye, count = np.eye(n), 1 if norm == float("inf") else n
    size = np.ones((n, 1)) if count == 1 else eye  # |d_i| <= t, or its own t_i
    above = np.block([[eye, -size], [-eye, -size]])
    sides = [*zip(low, high), *[(0, None)] * count]
    equal = np.r_[w, np.zeros(count)][None]
    return linprog(np.r_[np.zeros(n), np.ones(count)], above, np.zeros(2 * n), equal, [rise], sides).fun


def test_fab_ends_nearer_than_deepfool_goes():
    """Along curved boundaries: the wrong points it finds lie nearer, and more of them in the set."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
    x, within = inputs(80), L2(0.25, 0.0, 1.0)
    hits = [attack(model, x, None, within).hit.sum() for attack in (deepfool, fab)]
    assert hits[1] >= hits[0] > 0


def test_squares_shrink_as_in_the_paper():
    assert [side_share(step, 10000) for step in (0, 11, 51, 201, 9000)] == [0.8, 0.4, 0.2, 0.1, 0.8 / 256]


def test_apgd_refuses_other_losses_and_keeps_the_largest_margin():
    model, x = linear(classes=4), inputs()
    y = model(x).argmax(1)
    with pytest.raises(BadInput, match="unknown loss 'hinge'"):
        apgd(model, x, y, Linf(0.1), loss="hinge")
    few, many = (apgd(model, x, y, L2(0.05), steps=steps) for steps in (1, 60))

    def margins(found):
        scores = model(found.points)
        return scores.scatter(1, y[:, None], -torch.inf).amax(1) - scores.gather(1, y[:, None])[:, 0]

    assert margins(many).mean() > margins(few).mean()


def test_ascent_needs_a_graph():
    x = inputs().flatten(1)
    with pytest.raises(DoesNotFit, match="passes none on"):
        ascend(lambda s, rows: (s.detach().sum(1), rows > 99), x, Linf(0.1), steps=1, restarts=1, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL)
def test_it_runs_on_the_device_of_the_model(name):
    model, x, within = linear(classes=3).cuda(), inputs(), Linf(0.1, 0.0, 1.0)
    found = ALL[name](model, x, None, within)
    assert found.points.is_cuda and within.contains(found.points, x.cuda()).all()
