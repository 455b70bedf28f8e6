"""Weight compander: its equations, gradients and bounds, folding, and the network that goes on from here."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed, weight_of, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.deployment import exports
from netweight.reproduce import weight_compander as reproduction
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Training, train
from netweight.training.weight_compander import (
    FURTHEST,
    Compander,
    WeightCompander,
    companded,
    companders,
    folded,
    groups,
    loss,
    weight_compander,
)
from netweight.verification.bounds import bounds

HOW = Training(epochs=4, batch=16, rate=0.05, optimizer="sgd", decay=1e-2)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).eval()


def task(count: int = 48) -> Task:
    x = torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0].mean((1, 2)) > 0.5).long() + (x[:, 1, 2, 2] > 0.5).long()
    data = Data(x, y, low=0.0, high=1.0)
    return Task(data.take(16), data, train=data)


numbers = st.floats(-5, 5, allow_nan=False)
positive = st.floats(0.05, 5)


@given(v=st.lists(numbers, min_size=1, max_size=6), a=positive, b=positive)
def test_it_is_the_equation_odd_and_bounded(v, a, b):
    compander = Compander(a, b, learnt=True)
    w = compander(torch.tensor(v))
    wanted = [a * math.atan(x / b) for x in v]
    assert w.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert torch.equal(compander(-torch.tensor(v)), -w)
    assert (w.abs() < a * math.pi / 2 * (1 + 1e-6)).all()


@given(share=st.lists(st.floats(-FURTHEST, FURTHEST), min_size=1, max_size=6), a=positive, b=positive)
def test_the_start_is_the_weight_up_to_the_furthest(share, a, b):
    w = a * torch.tensor(share)
    compander = Compander(a, b, learnt=False)
    assert torch.allclose(compander(compander.right_inverse(w)), w, atol=1e-4)
    assert torch.allclose(
        compander(compander.right_inverse(1e6 * torch.ones(1))), torch.tensor([FURTHEST * a])
    )


def test_the_three_gradients_are_the_paper_s_and_those_of_a_and_b_are_scaled():
    a, b, v = 0.7, 1.3, torch.tensor([-2.0, 0.4, 1.0, 3.0], requires_grad=True)
    g, compander = torch.tensor([1.0, -2.0, 0.5, 3.0]), Compander(a, b, learnt=True)
    (compander(v) * g).sum().backward()
    u = v.detach() / b
    assert torch.allclose(v.grad, g * (a / b) / (1 + u**2))
    by_a, by_b = (g * u.arctan()).sum(), (-g * (a / b) * u / (1 + u**2)).sum()
    root = math.sqrt(4)
    assert compander.log_a.grad.item() == pytest.approx(float(by_a) * a / root, rel=1e-5)  # of log a
    assert compander.log_b.grad.item() == pytest.approx(float(by_b) * b / root, rel=1e-5)


@pytest.mark.parametrize("learnt", [False, True])
def test_a_network_starts_as_it_was_and_folds_to_plain_layers(learnt):
    model, x = network(), task().test.x
    inside = companded(model, WeightCompander(2.0, learnt))
    assert [*companders(inside)] == weighted(model) == ["0", "4"]
    for name, compander in companders(inside).items():
        assert compander.a.item() == pytest.approx(2 * weight_of(model, name).std(correction=0).item())
    assert torch.allclose(inside(x), model(x), atol=1e-5)
    plain = folded(inside)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(plain(x), inside(x))  # the network that was folded still runs
    kinds = groups(inside)
    assert [len(kind["params"]) for kind in kinds] == ([6, 4] if learnt else [6])
    assert not learnt or kinds[1]["weight_decay"] == 0.0


def test_very_weak_is_plain_training_step_for_step():
    model, data = network(), task()
    how = Training(epochs=2, batch=16, rate=0.05, optimizer="sgd")
    bounded = weight_compander(model, data, how, WeightCompander(strength=1e3))
    plain = copy.deepcopy(model)
    losses = train(plain, data.train, loss, how)
    assert bounded.losses == pytest.approx(losses, rel=1e-4)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(bounded.model.state_dict()[name].double(), tensor.double(), atol=1e-4)


def test_weights_stay_below_their_bound_and_the_model_as_it_was():
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = weight_compander(model, task().blind(), HOW, WeightCompander(0.7, learnt=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, (a, b) in found.notes["a_and_b"].items():
        assert a > 0 and b > 0 and weight_of(found.model, name).abs().max() < a * math.pi / 2
    start = 0.7 * weight_of(model, "4").std(correction=0).item()
    assert all(value != pytest.approx(start, rel=1e-3) for value in found.notes["a_and_b"]["4"])
    fixed = weight_compander(model, task().blind(), HOW, WeightCompander(0.7))
    assert fixed.notes["a_and_b"]["4"] == pytest.approx([start, start])
    assert fixed.losses[-1] < fixed.losses[0] and not fixed.model.training
    again = weight_compander(model, task().blind(), HOW, WeightCompander(0.7))
    assert again.losses == fixed.losses and again.losses != found.losses


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    settings, place = WeightCompander(0.7, learnt=True), tmp_path / "run.pt"
    whole = weight_compander(network(), task(), HOW, settings)
    real = F.cross_entropy
    calls = iter(range(100))

    def stops(z, y):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real(z, y)

    monkeypatch.setattr(F, "cross_entropy", stops)
    with pytest.raises(KeyboardInterrupt):
        weight_compander(network(), task(), HOW, settings, keep=Checkpoint(place))
    monkeypatch.setattr(F, "cross_entropy", real)
    for other in (WeightCompander(0.6, True), WeightCompander(0.7, False)):
        with pytest.raises(BadInput, match="of other weights, data or settings"):
            weight_compander(network(), task(), HOW, other, keep=Checkpoint(place, True))
    again = weight_compander(network(), task(), HOW, settings, keep=Checkpoint(place, True))
    assert again.losses == whole.losses
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_the_network_flows_on(tmp_path):
    data = task()
    small = weight_compander(network(), data, HOW, WeightCompander()).network()
    small.save(tmp_path / "small")
    loaded, x = Compressed.load(tmp_path / "small", like=network()), data.test.x
    assert torch.equal(loaded(x), small(x)) and torch.equal(small.plain()(x), small(x))
    rows = pipeline.compare(network(), loaded, data, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    exported = exports.export(loaded, data, "onnx", tmp_path / "model.onnx")
    assert exported["same"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: WeightCompander(0.0), BadInput, "strength=0.0: a number of standard deviations above 0"),
        (lambda: WeightCompander(math.nan), BadInput, "strength=nan"),
        (lambda: companded(nn.ReLU(), WeightCompander()), DoesNotFit, "ReLU: it has no Linear or Conv layer"),
        (
            lambda: companded(even(), WeightCompander()),
            DoesNotFit,
            "0: its weights have a standard deviation",
        ),
        (
            lambda: weight_compander(network(), Task(unlabelled(), unlabelled()), HOW),
            DoesNotFit,
            "training needs examples with class numbers",
        ),
        (
            lambda: weight_compander(flat(), task(), Training(1, batch=1)),
            BadInput,
            "batch norm has no variance of one example; give another --batch",
        ),
    ],
)
def test_mistakes_are_said(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def even() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.ones_(model[0].weight)
    return model


def unlabelled() -> Data:
    return Data(torch.rand(4, 2, 5, 5))


def test_the_quick_reproduction_reaches_its_bars():
    claim = reproduction.reproduce(quick=True)
    assert len(claim.bars) == 5
    for bar in claim.bars:
        if "seconds" not in bar.name:  # a busy machine
            assert bar.passed, bar
