"""Certified training: schedule and bounds by hand, sound against attacks, true gradients, resuming."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.graph import capture, live
from netweight.core.perturbation import L2, Linf, WeightLinf
from netweight.core.task import Data, Task
from netweight.data import digits
from netweight.testing import tiny_model, tiny_task
from netweight.training.certified import (
    Certified,
    bounded_loss,
    certified,
    chord,
    differences,
    fused,
    objective,
    share_at,
    tensors,
    unfused,
)
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Moment, Training
from netweight.verification import crown, ibp
from netweight.verification.bounds import certify
from netweight.verification.problem import Region, pose
from netweight.verification.weights import loosened


def seeded(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, classes))


@functools.cache
def graph_of(classes: int = 4):
    return capture(seeded(lambda: mlp(classes)).eval(), torch.zeros(1, 5))


@functools.cache
def graph_of_tiny():
    return capture(tiny_model(), tiny_task().test.x[:1])


def inputs(count: int = 6, classes: int = 4, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 5, generator=generator)
    return x, torch.randint(classes, (count,), generator=generator)


def posed(eps: float, model: nn.Module | None = None, classes: int = 4, arithmetic: str = "float64"):
    graph = graph_of(classes)
    graph = graph if model is None else live(graph, dict(model.named_parameters()))
    return pose(graph, [Region.of(inputs()[0], Linf(eps))], arithmetic)


# The schedule --------------------------------------------------------------------------------------------


def by_definition(i: int, t: int, how: Certified) -> float:
    """The brief's formula, steps counted from 0, E = 1."""
    i0, i1 = how.natural * t, (how.natural + how.ramp) * t
    im = i0 + int(how.mid * how.ramp * t)
    a = 1 / ((i1 - im) * how.beta * (im - i0) ** (how.beta - 1) + (im - i0) ** how.beta)
    if i <= i0:
        return 0.0
    if i < im:
        return a * (i - i0) ** how.beta
    at_mid = a * (im - i0) ** how.beta
    return min(1.0, at_mid + (1 - at_mid) * (i - im) / (i1 - im))


@given(
    i=st.integers(0, 2000),
    t=st.integers(1, 20),
    natural=st.integers(0, 20),
    ramp=st.integers(5, 60),
    mid=st.sampled_from([0.25, 0.4, 0.5]),
    beta=st.sampled_from([2.0, 4.0]),
)
def test_the_set_grows_as_the_formula_says(i, t, natural, ramp, mid, beta):
    how = Certified(natural=natural, ramp=ramp, mid=mid, beta=beta)
    assert share_at(i, t, how) == pytest.approx(by_definition(i, t, how), abs=1e-9)
    assert share_at(i, t, how) <= share_at(i + 1, t, how) <= 1


def test_schedules_by_hand():
    official = Certified(natural=100, ramp=801, mid=0.4)
    assert share_at(100 * 196, 196, official) == 0
    assert share_at(901 * 196, 196, official) == 1
    slopes = [
        share_at(420 * 196 + k, 196, official) - share_at(420 * 196 + k - 1, 196, official) for k in (0, 200)
    ]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-2)  # the power goes over into the line without a kink
    line = Certified(natural=10, ramp=100, mid=0.0)
    assert [share_at(k * 5, 5, line) for k in (10, 60, 110)] == pytest.approx([0, 0.5, 1])
    assert [share_at(k, 4, Certified(natural=1, ramp=0)) for k in (3, 4)] == [0, 1]
    assert share_at(10**6, 4, Certified(natural=10**6, ramp=0)) == 0


# The bounds ----------------------------------------------------------------------------------------------


@given(st.floats(-30, 2), st.floats(0, 20), st.floats(0, 1))
def test_the_chord_lies_above_the_exponential_and_meets_it_at_the_ends(low, width, at):
    low, high = torch.tensor(low, dtype=torch.float64), torch.tensor(low + width, dtype=torch.float64)
    k, c = chord(low, high)
    v = low + (high - low) * at
    assert k * v + c >= v.exp() * (1 - 1e-7) - 1e-12
    for end in (low, high):
        assert torch.isclose(k * end + c, end.exp(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bound", [fused, unfused])
def test_a_set_of_one_point_gives_the_cross_entropy(bound):
    x, y = inputs()
    model = seeded(mlp)
    for mixed in (0.0, 0.3, 1.0):
        assert torch.allclose(
            bound(posed(0.0), y, mixed), F.cross_entropy(model(x), y, reduction="none").double(), atol=1e-5
        )


def worst_found(model, x, y, eps, steps=40):
    worst, s = torch.zeros(len(x)), x.clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if step % 10 == 0:
            s = x + eps * (2 * torch.rand(x.shape, generator=generator) - 1).sign()
        s.requires_grad_()
        losses = F.cross_entropy(model(s), y, reduction="none")
        worst = torch.maximum(worst, losses.detach())
        s = (s + 0.5 * eps * torch.autograd.grad(losses.sum(), s)[0].sign()).clamp(x - eps, x + eps).detach()
    return worst


@pytest.mark.parametrize("bound", [fused, unfused])
@pytest.mark.parametrize("mixed", [0.0, 0.5, 1.0])
def test_no_attack_finds_a_loss_above_the_bound(bound, mixed):
    model, task = tiny_model(), tiny_task()
    x, y = task.test.x, task.test.y
    for eps in (0.003, 0.03):
        problem = pose(graph_of_tiny(), [Region.of(x, Linf(eps))], "real")
        found = worst_found(model, x, y, eps)
        proven = bound(problem, y, mixed)
        assert (proven >= found - 1e-5).all()
        assert (proven > 0).all()
        assert (proven - found).mean() < (0.1 if eps < 0.01 else 20)


def test_differences_take_the_last_layer_as_one_and_meet_the_rows_of_the_objective():
    y = inputs()[1]
    problem = posed(0.1)
    state = crown.intermediate(problem, tighten=False)
    z = differences(problem, state, y)
    rows = ibp.propagate(problem, objective(y, 4).double())
    others = F.one_hot(y, 4) == 0
    assert torch.allclose(z.upper[others].reshape(6, 3), -rows.lower, atol=1e-6)
    assert torch.allclose(z.lower[others].reshape(6, 3), -rows.upper, atol=1e-6)
    assert (z.lower[~others].abs() < 1e-12).all()
    assert (z.upper[~others].abs() < 1e-12).all()
    f = state.values[problem.output.name]
    apart = (f.upper.flatten(1) - f.lower.flatten(1).gather(1, y[:, None]))[others]
    assert (apart > z.upper[others]).all()


def test_differences_of_a_network_that_does_not_end_in_a_layer_are_sound():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    x, y = inputs()
    problem = pose(capture(model, x[:1]), [Region.of(x, Linf(0.1))], "real")
    z = differences(problem, crown.intermediate(problem, tighten=False), y)
    for seed in range(50):
        s = Linf(0.1).sample(x, torch.Generator().manual_seed(seed))
        v = model(s) - model(s).gather(1, y[:, None])
        assert (z.lower <= v + 1e-6).all()
        assert (v <= z.upper + 1e-6).all()


@pytest.mark.parametrize(("weights", "order", "rows"), [(L2(0.2), 2, 2**0.5), (WeightLinf(0.1), 1, 2.0)])
def test_differences_hold_where_the_last_weight_moves(weights, order, rows):
    model = nn.Sequential(nn.Linear(5, 4))
    x, y = inputs()
    problem = pose(loosened(capture(model, x[:1]), weights), [Region.of(x, Linf(0.0))], "float64")
    z = differences(problem, crown.intermediate(problem, tighten=False), y)
    f = model(x)
    worst = f - f.gather(1, y[:, None]) + rows * weights.eps * x.norm(p=order, dim=1, keepdim=True)
    others = F.one_hot(y, 4) == 0
    assert (z.upper[others] >= worst[others].double() - 1e-6).all()
    assert torch.allclose(z.upper[others].float(), worst[others], atol=1e-4)
    assert (z.upper[~others] == 0).all()


def test_at_two_classes_the_fused_row_bounds_the_margin_as_the_unfused_one():
    y = inputs(classes=2)[1]
    problem = posed(0.1, classes=2)
    state = crown.intermediate(problem, tighten=False)
    z = differences(problem, state, y)
    rows = chord(z.lower, z.upper)[0]
    k = rows.sum(1)
    rows = rows - F.one_hot(y, 2) * k[:, None]
    one = crown.lowest(problem, state, crown.objective_rows(problem, -rows[:, None])).squeeze(1) / k
    alone = crown.lowest(problem, state, crown.objective_rows(problem, objective(y, 2))).squeeze(1)
    assert torch.allclose(one, alone, atol=1e-6)


def test_rows_tighten_what_intervals_give_and_one_row_is_tighter_than_the_sum_of_all():
    y = inputs()[1]
    problem = posed(0.1)
    assert (fused(problem, y, 1.0) < fused(problem, y, 0.0)).all()
    assert (unfused(problem, y, 1.0) < unfused(problem, y, 0.0)).all()
    assert torch.allclose(fused(problem, y, 0.0), unfused(problem, y, 0.0), atol=1e-6)
    state = crown.intermediate(problem, tighten=False)
    z = differences(problem, state, y)
    k, c = chord(z.lower, z.upper)
    above = -crown.lowest(problem, state, crown.objective_rows(problem, objective(y, 4)))
    each = (k[F.one_hot(y, 4) == 0].reshape(6, 3) * above).sum(1) + c.sum(1)  # every margin at its own worst
    assert (fused(problem, y, 1.0).exp() <= each + 1e-6).all()
    assert (fused(problem, y, 1.0).exp() >= 0.8 * each).all()


def test_a_huge_set_gives_a_finite_loss_and_gradient():
    model = seeded(mlp)
    y = inputs()[1]
    for bound in (fused, unfused):
        loss = bound(posed(1e3, model, arithmetic="real"), y, 0.5).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("bound", [fused, unfused])
@pytest.mark.parametrize("mixed", [0.0, 0.7])
def test_gradients_agree_with_finite_differences(bound, mixed):
    model = seeded(mlp).double()
    y = inputs()[1]

    def value() -> torch.Tensor:
        return bound(posed(0.05, model), y, mixed).mean()

    gradients = torch.autograd.grad(value(), list(model.parameters()))
    for p, g in zip(model.parameters(), gradients):
        place = tuple(int(v) for v in torch.unravel_index(g.abs().argmax(), g.shape))
        assert g[place] != 0
        ends = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                p[place] += step
                ends.append(value().item())
            p[place] += 1e-6
        assert g[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("weights", [L2(0.2), WeightLinf(0.02)])
def test_the_bound_holds_where_weights_move_too(weights):
    model = seeded(mlp)
    x, y = inputs()
    problem = pose(loosened(graph_of(), weights), [Region.of(x, Linf(0.02))], "real")
    proven = torch.minimum(fused(problem, y, 1.0), unfused(problem, y, 0.0))
    assert (fused(problem, y, 0.5) >= fused(posed(0.02), y, 0.5)).all()
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(len(x))
    for _ in range(100):
        free = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        s = Linf(0.02).sample(x, generator)
        row = F.cross_entropy(torch.func.functional_call(model, free, (s,)), y, reduction="none")
        g = dict(
            zip(free, torch.autograd.grad((row * torch.rand(6, generator=generator)).sum(), free.values()))
        )
        moved = {
            n: p
            + (weights.eps * (g[n] / g[n].norm() if isinstance(weights, L2) else g[n].sign()))
            * n.endswith("weight")
            for n, p in free.items()
        }
        losses = F.cross_entropy(torch.func.functional_call(model, moved, (s,)), y, reduction="none")
        worst = torch.maximum(worst, losses.detach())
    assert (proven >= worst).all()
    assert (worst > F.cross_entropy(model(x), y, reduction="none") + 0.01).all()


@pytest.mark.parametrize(
    ("options", "mixed"),
    [({}, 0.75), ({"kept": 0.2}, 0.8), ({"method": "ibp"}, 0.0), ({"method": "ibp", "kept": 1.0}, 0.0)],
)
@pytest.mark.parametrize("bound", [fused, unfused])
@pytest.mark.parametrize("weights", [None, L2(0.1), WeightLinf(0.02)])
def test_the_loss_of_a_step_is_the_bound_at_the_size_reached(options, mixed, bound, weights):
    model = seeded(mlp, 1)
    x, y = inputs()
    how = Certified(natural=1, ramp=4, mid=0.0, fused=bound is fused, **options)
    loss = bounded_loss(graph_of(), Linf(0.1), how, weights)
    assert torch.equal(loss(model, x, y, Moment(2, 1, 2, torch.Generator())), F.cross_entropy(model(x), y))
    found = loss(model, x, y, Moment(4, 2, 2, torch.Generator()))  # a quarter up
    graph = live(graph_of(), dict(model.named_parameters()))
    if weights is not None:
        graph = loosened(graph, type(weights)(weights.eps / 4))
    wanted = bound(pose(graph, [Region.of(x, Linf(0.025))], "real"), y, mixed).mean()
    assert torch.allclose(found, wanted, rtol=1e-5)


# Batch norm, and parameters that are computed ------------------------------------------------------------


def test_batch_norm_is_bounded_with_the_statistics_of_the_clean_batch():
    x, y = tiny_task().train.x[:3], tiny_task().train.y[:3]
    for share in (1e-12, 0.5):
        model, twin = (copy.deepcopy(tiny_model()).train() for _ in range(2))
        settings_ = Certified(natural=0, ramp=1, mid=0.0)
        loss = bounded_loss(graph_of_tiny(), Linf(1e-7 / share), settings_)
        found = loss(model, x, y, Moment(1, 0, round(1 / share), torch.Generator()))
        wanted = F.cross_entropy(twin(x), y)
        assert torch.allclose(found, wanted, atol=1e-4)
        found.backward()
        wanted.backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            if q.grad.abs().max() > 1e-6:
                assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.999
        for a, b in zip(model.buffers(), twin.buffers()):
            assert torch.equal(a, b)


class Scaled(nn.Module):
    """A weight that is computed from two parameters and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.eye(3, 5))
        self.g = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.c = torch.full((3, 1), 2.0)

    def forward(self, x):
        return F.linear(x, self.v * (self.c * self.g[:, None]))


def test_a_live_graph_follows_parameters_that_its_constants_are_computed_from():
    model = Scaled()
    x, y = inputs(classes=3)
    graph = capture(model, x[:1])
    with torch.no_grad():
        model.g.mul_(-0.5)
    problem = pose(live(graph, tensors(model, x)), [Region.of(x, Linf(0.0))], "float64")
    loss = fused(problem, y, 1.0).mean()
    wanted = F.cross_entropy(model(x), y)
    assert torch.allclose(loss.float(), wanted, atol=1e-5)
    ours, theirs = (torch.autograd.grad(v, [model.v, model.g]) for v in (loss, wanted))
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-4)


# Training ------------------------------------------------------------------------------------------------


def digits_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


SHORT = Training(epochs=6, batch=64, rate=1e-2, clip=8.0)
GROWS = Certified(natural=1, ramp=3)


def test_training_makes_a_network_that_can_be_proven():
    model, data = seeded(digits_mlp), digits.train().take(640)
    before = copy.deepcopy(model.state_dict())
    within, test = Linf(0.1, 0.0, 1.0), digits.test().take(200)
    natural, _ = certified(model, data, Linf(0.0), SHORT, Certified(natural=6, ramp=0))
    shares = {"natural": float(certify(natural, test, within, method="ibp").verified.float().mean())}
    for method in ("ibp", "crown-ibp"):
        robust, losses = certified(model, data, within, SHORT, Certified(method, natural=1, ramp=3))
        shares[method] = float(certify(robust, test, within, method="ibp").verified.float().mean())
        assert len(losses) == 6
        assert not robust.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert shares["natural"] < 0.05
    assert shares["ibp"] > 0.3
    assert shares["crown-ibp"] > 0.3


def test_a_stopped_training_goes_on_to_the_same_network(tmp_path, monkeypatch):
    model, data, within = seeded(digits_mlp), digits.train().take(320), Linf(0.05)
    whole, losses = certified(model, data, within, SHORT, GROWS)
    keep = Checkpoint(tmp_path / "run.pt", resume=True)
    from netweight.training import loop

    def stops(path, what, run):
        real(path, what, run)
        if len(run.losses) == 3:
            raise KeyboardInterrupt

    real = loop.store
    monkeypatch.setattr(loop, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        certified(model, data, within, SHORT, GROWS, keep=keep)
    monkeypatch.setattr(loop, "store", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        certified(model, data, Linf(0.06), SHORT, GROWS, keep=keep)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        certified(model, data, within, SHORT, Certified("ibp", natural=1, ramp=3), keep=keep)
    again, same = certified(model, data, within, SHORT, GROWS, keep=keep)
    assert same == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_the_set_is_cut_to_the_range_of_the_data():
    model, data = seeded(digits_mlp), digits.train().take(64)
    how, settings_ = Training(epochs=1, batch=64), Certified(natural=0, ramp=0)
    free = Data(data.x, data.y)
    assert (
        certified(model, data, Linf(0.1), how, settings_)[1]
        < certified(model, free, Linf(0.1), how, settings_)[1]
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "crown"}, "unknown method of certified training 'crown'; did you mean 'crown-ibp'"),
        ({"natural": -1}, "natural=-1, ramp=30: give at least 0 epochs"),
        ({"mid": 1.5}, "mid=1.5, beta=4.0: mid is a share"),
        ({"beta": 0.5}, "beta at least 1"),
        ({"kept": -0.1}, "kept=-0.1: the share of CROWN-IBP"),
    ],
)
def test_settings_that_make_no_sense(options, sentence):
    with pytest.raises(BadInput, match=sentence):
        Certified(**options)


def test_what_cannot_be_trained_on():
    model, task = tiny_model(), tiny_task()
    with pytest.raises(BadInput, match="10 natural epochs and a ramp of 30 do not fit into 6 epochs"):
        certified(model, task, Linf(0.1), SHORT)
    with pytest.raises(DoesNotFit, match="needs examples with class numbers"):
        certified(model, Task(task.calibration, task.test), Linf(0.1), SHORT, GROWS)
    with pytest.raises(DoesNotFit, match="needs examples with class numbers"):
        certified(model, Data(task.test.x), Linf(0.1), SHORT, GROWS)
    with pytest.raises(BadInput, match="the radius is a number of at least 0"):
        certified(model, task, Linf(-0.1), SHORT, GROWS)
