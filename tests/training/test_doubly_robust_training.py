"""Doubly robust training: weights against their problem, the way through the attack, and the whole."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.deployment import exports
from netweight.reproduce import doubly_robust_training as reproduction
from netweight.testing import check_settings, tiny_model, tiny_task
from netweight.training import doubly_robust_training as method
from netweight.training.adversary import Adversary, adversary, cross_entropy
from netweight.training.checkpoint import Checkpoint
from netweight.training.doubly_robust_training import (
    DoublyRobust,
    Mean,
    doubly_robust_training,
    found,
    inverse_hessian,
    objective,
    through_the_attack,
    weights,
)
from netweight.training.loop import Training
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=16, rate=0.01)
SETTINGS = DoublyRobust("linf=0.1", steps=2)
LOSSES = st.lists(st.floats(0, 30), min_size=1, max_size=8)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Weights ----------------------------------------------------------------------------------------------------


@given(losses=LOSSES, r=st.floats(0.05, 50), seed=st.integers(0, 99))
def test_weights_solve_their_problem_and_F_is_what_they_reach(losses, r, seed):
    values = torch.tensor(losses, dtype=torch.float64)

    def problem(w: torch.Tensor) -> float:
        return float((w * values).sum() - r * torch.xlogy(w, len(w) * w).sum())

    w, F = weights(values, r), float(objective(values, r))
    assert float(w.sum()) == pytest.approx(1)
    assert problem(w) == pytest.approx(F, rel=1e-9, abs=1e-9)
    other = torch.rand(len(values), generator=chance(seed), dtype=torch.float64)
    assert problem(other / other.sum()) <= F + 1e-9
    assert float(values.mean()) - 1e-9 <= F <= float(values.max()) + 1e-9
    assert float(w[0] / w[-1]) == pytest.approx(math.exp((losses[0] - losses[-1]) / r))


def test_equal_losses_weigh_the_same():
    assert weights(torch.full((4,), 7.0), 0.01).tolist() == [0.25] * 4
    assert float(objective(torch.full((4,), 7.0), 0.01)) == pytest.approx(7.0)


@given(
    batches=st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=4),
    r=st.floats(0.2, 5),
    eta=st.floats(0.1, 1),
)
def test_the_mean_and_its_gradient_are_those_of_the_definition(batches, r, eta):
    mean, u = Mean(eta), None
    for batch in batches:
        values = torch.tensor(batch, dtype=torch.float64)
        e = (values / r).exp()
        u = float(e.mean()) if u is None else (1 - eta) * u + eta * float(e.mean())
        moving = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        value = mean.step(values, moving, r)
        value.backward()
        assert float(mean.log_u.exp()) == pytest.approx(u)
        assert float(value.detach()) == pytest.approx(r * math.log(u), abs=1e-9)
        assert torch.allclose(moving.grad, e / u / 3)


def test_with_eta_1_a_batch_has_its_own_weights_and_large_losses_are_no_harm():
    mean, values = Mean(1.0), torch.tensor([900.0, 899.0, 5.0])
    for _ in range(2):
        moving = torch.zeros(3, requires_grad=True)
        value = mean.step(values, moving, 0.5)
        value.backward()
    assert torch.allclose(moving.grad, weights(values, 0.5)) and float(value.detach()) == pytest.approx(
        float(objective(values, 0.5))
    )


def test_a_dear_price_is_adversarial_training():
    model, data = tiny_model(), tiny_task().calibration
    own = [*model.parameters()]
    s = adversary("linf=0.1", 2, 0.5, data).points(model, data.x, data.y, chance())
    losses = cross_entropy(model(s), data.y)
    plain = torch.autograd.grad(losses.mean(), own, retain_graph=True)
    for r, same in ((1e6, True), (1.0, False)):
        value = Mean(0.5).step(losses.detach(), losses, r)
        robust = torch.autograd.grad(value, own, retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, robust)) is same


# Through the attack -----------------------------------------------------------------------------------------


@given(share=st.floats(-0.99, 0.99), eps=st.floats(0.01, 2), c=st.floats(0.01, 10))
def test_H_is_the_second_derivative_of_the_barrier(share, eps, c):
    s = torch.tensor([share * eps], dtype=torch.float64)
    side = torch.tensor([eps], dtype=torch.float64)

    def barrier(s: torch.Tensor) -> torch.Tensor:
        return -c * ((side - s).log() + (s + side).log()).sum()

    second = torch.autograd.functional.hessian(barrier, s)[0, 0]
    assert float(inverse_hessian(s, -side, side, c)) == pytest.approx(1 / float(second), rel=1e-6)


def test_it_vanishes_at_the_sides_and_where_there_is_no_room():
    lower, upper = torch.tensor([[0.0, 0.0, 0.5, 0.0]]), torch.tensor([[1.0, 1.0, 0.5, 1.0]])
    s = torch.tensor([[0.0, 1.0, 0.5, 0.5]])
    assert inverse_hessian(s, lower, upper, 0.5).tolist() == [[0.0, 0.0, 0.0, 0.25]]


class Line(nn.Module):
    """Scores (w x + 30, 0): the loss of class 1 is w x + 30, to the last digits."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.w * x + 30, torch.zeros_like(x)], 1)


@pytest.mark.parametrize("w", [-2.0, 0.3, 5.0])
def test_the_gradient_is_that_through_the_exact_minimiser(w, monkeypatch):
    monkeypatch.setattr(method, "cross_entropy", lambda z, y: z.logsumexp(1) - z.gather(1, y[:, None])[:, 0])
    eps, c, x, y = 0.25, 0.1, torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([1])

    def minimiser(w: float) -> float:  # of -w d - c log(eps - d) - c log(eps + d):  w = 2 c d / (eps^2 - d^2)
        return (math.sqrt(c * c + (w * eps) ** 2) - c) / w

    def loss(w: float) -> float:
        return w * (0.7 + minimiser(w)) + 30

    model = Line(w)
    attack = Adversary(Linf(eps), 0, 1.0)
    losses, moving = through_the_attack(model, x + minimiser(w), x, y, attack, c)
    moving.sum().backward()
    exact = (loss(w + 1e-5) - loss(w - 1e-5)) / 2e-5
    assert float(losses.detach()) == pytest.approx(loss(w))
    assert float(model.w.grad) == pytest.approx(exact, rel=1e-5)
    assert abs(0.7 + minimiser(w) - exact) > 1e-3  # what is had without the implicit term


def test_the_term_adds_up_over_an_input_and_is_not_there_without_a_barrier():
    model, data = tiny_model(), tiny_task().calibration.take(4)
    attack = adversary("linf=0.1", 1, 0.5, data)
    losses, moving = through_the_attack(model, data.x, data.x, data.y, attack, None)
    assert moving is losses
    with_term = through_the_attack(model, data.x, data.x, data.y, attack, 0.1)
    x = data.x.clone().requires_grad_()
    (rise,) = torch.autograd.grad(cross_entropy(model(x), data.y).sum(), x)
    sides = [(data.x + 0.1).clamp(max=1), (data.x - 0.1).clamp(min=0)]
    second = sum(0.1 / (side - data.x).double().square() for side in sides)
    term = (rise.square() / second).flatten(1).sum(1)
    assert torch.equal(with_term[0], losses) and (term > 0).all()
    assert torch.allclose((with_term[1] - losses).double(), term, rtol=1e-2, atol=1e-6)


# The inner solvers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["gd", "adam"])
def test_solvers_stay_inside_and_climb(solver):
    model, data = tiny_model().train(), tiny_task().calibration
    before = copy.deepcopy(model.state_dict())

    def loss(steps: int) -> float:
        attack = adversary("linf=0.2", steps, 0.25, data, random=False)
        s = found(attack, model, data.x, data.y, chance(), solver)
        assert bool(attack.within.contains(s, data.x).all())
        assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        with torch.no_grad():
            return float(cross_entropy(tiny_model()(s), data.y).mean())

    assert loss(0) < loss(1) < loss(8)


def test_adam_takes_its_own_steps():
    model, data = tiny_model(), tiny_task().calibration.take(3)
    attack = adversary("linf=0.2", 2, 0.25, data, random=False)
    x = data.x.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.05, maximize=True)
    for _ in range(2):
        adam.zero_grad()
        cross_entropy(model(x), data.y).sum().backward()
        adam.step()
        x.data = attack.within.project(x.data, data.x)
    s = found(attack, model, data.x, data.y, chance(), "adam")
    assert torch.allclose(s, x.detach(), atol=1e-5)


# The method -------------------------------------------------------------------------------------------------


def test_weak_examples_count_more_than_in_adversarial_training():
    generator = chance()
    x = torch.rand(64, 1, generator=generator)
    y = (x[:, 0] > 0.7).long()
    y[:4] = 1 - y[:4]  # wrong labels: the examples with the highest losses
    task = Task(Data(x, y), Data(x, y))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(1, 2)
    how, highest = Training(30, 64, 0.1), []
    for r in (1e6, 0.3):
        network = doubly_robust_training(model, task, how, DoublyRobust("linf=0.01", r=r)).model
        highest.append(float(cross_entropy(network(x), y).max().detach()))
    assert highest[1] < 0.8 * highest[0]


def test_every_setting_counts_and_nothing_else_is_changed():
    model, task = tiny_model(), tiny_task()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = doubly_robust_training(model, task.blind(), HOW, SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first.losses == doubly_robust_training(model, task, HOW, SETTINGS).losses
    assert math.isfinite(first.notes["F"]) and not first.model.training
    for change in (
        {"steps": 3}, {"size": 0.3}, {"random": False}, {"solver": "adam"}, {"r": 2.0}, {"eta": 0.9},
        {"barrier": 0.2}, {"barrier": None}, {"within": "linf=0.2"},
    ):  # fmt: skip
        settings = DoublyRobust(**{"within": "linf=0.1", "steps": 2, **change})
        assert doubly_robust_training(model, task, HOW, settings).losses != first.losses, change
    check_settings(SETTINGS)


def test_F_is_not_below_the_mean_loss_and_other_sets_have_weights_alone():
    task = tiny_task()
    one = Training(1, 64, 1e-9)  # a single step, on all examples
    for settings in (DoublyRobust("l2=0.3", barrier=None), DoublyRobust("linf=0", barrier=0.1)):
        value = doubly_robust_training(tiny_model(), task, one, settings).losses[0]
        dear = DoublyRobust(settings.within, r=1e6, barrier=settings.barrier)
        assert value > doubly_robust_training(tiny_model(), task, one, dear).losses[0]


def test_killed_and_resumed_gives_the_same_numbers(tmp_path, monkeypatch):
    task, place = tiny_task(), tmp_path / "half.pt"
    whole, real, calls = doubly_robust_training(tiny_model(), task, HOW, SETTINGS), method.found, []

    def dies(*given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(method, "found", dies)
    with pytest.raises(KeyboardInterrupt):
        doubly_robust_training(tiny_model(), task, HOW, SETTINGS, keep=Checkpoint(place))
    monkeypatch.setattr(method, "found", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        other = DoublyRobust("linf=0.1", steps=2, r=3.0)
        doubly_robust_training(tiny_model(), task, HOW, other, keep=Checkpoint(place, True))
    again = doubly_robust_training(tiny_model(), task, HOW, SETTINGS, keep=Checkpoint(place, True))
    assert whole.losses == again.losses and whole.notes == again.notes
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))


def test_what_was_trained_is_a_network_as_any_other(tmp_path):
    task = tiny_task()
    small = doubly_robust_training(tiny_model(), task, HOW, SETTINGS).network()
    small.save(tmp_path / "small")
    loaded, x = Compressed.load(tmp_path / "small", like=tiny_model()), task.test.x
    assert torch.equal(loaded(x), small(x))
    rows = pipeline.compare(tiny_model(), loaded, task, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, task, "onnx", tmp_path / "model.onnx")["same"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"r": 0.0}, "r=0.0"),
        ({"r": math.inf}, "r=inf"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"barrier": 0.0}, "barrier=0.0"),
        ({"barrier": math.nan}, "barrier=nan"),
        ({"solver": "adma"}, "did you mean 'adam'"),
        ({"within": "l2=0.5"}, "give linf, or barrier=none"),
        ({"within": "l2=0.5", "barrier": None, "solver": "adam"}, "give linf, or barrier=none"),
        ({"within": "bitflips=3"}, "set of inputs"),
        ({"size": 0.0}, "size"),
    ],
)
def test_settings_that_are_none(settings, word):
    with pytest.raises((BadInput, DoesNotFit), match=word):
        DoublyRobust(**settings)


def test_whole_numbers_and_data_without_classes_are_told():
    words = Data(torch.randint(0, 5, (8, 4)), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(DoesNotFit, match="whole numbers"):
        doubly_robust_training(tiny_model(), Task(words, words), HOW)
    bare = Data(tiny_task().test.x, None)
    with pytest.raises(DoesNotFit, match="class numbers"):
        doubly_robust_training(tiny_model(), Task(bare, bare), HOW)


# The reproduction -------------------------------------------------------------------------------------------


def test_the_quick_variant_reaches_its_bar():
    claim = reproduction.reproduce(quick=True)
    assert len(claim.bars) == 1 and all(bar.passed for bar in claim.bars), claim.bars


def test_measures_of_the_reproduction():
    y = torch.arange(10).repeat(2)
    right = torch.ones(20, dtype=torch.bool)
    right[:2] = False  # classes 0 and 1 are half right
    assert reproduction.tail(right, y) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert reproduction.worst(torch.arange(10.0)) == 8.0
    task, unseen = reproduction.split()
    assert (len(task.train), len(unseen)) == (1000, 797)
    both = torch.cat([task.train.x, unseen.x]).flatten(1)
    assert len({tuple(row) for row in both.tolist()}) > 1790  # no image is in both, but for equal ones
