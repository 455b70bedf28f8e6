"""SRAT: weights, losses, what keeps features apart, when weights count, and the network that comes out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.deployment import exports
from netweight.testing import tiny_model, tiny_task
from netweight.training import srat as method
from netweight.training.adversarial import Adversarial, adversarial
from netweight.training.adversary import adversary, cross_entropy
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Training
from netweight.training.srat import (
    SRAT,
    class_weights,
    feature_layer,
    focal,
    ldam,
    loss_of,
    margins,
    scores_and_features,
    separation,
    srat,
)
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=16, rate=0.01)
COUNTS = st.lists(st.integers(0, 10**6), min_size=2, max_size=12).filter(any)


def drawn(seed: int, b: int = 12, d: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, d, generator=g), torch.randint(classes, (b,), generator=g)


def imbalanced(seed: int = 0) -> Task:
    """20, 9, 0 and 1 examples of four classes."""
    data = tiny_task(seed).train.take(30)
    y = torch.tensor([0] * 20 + [1] * 9 + [3])
    data = Data(data.x, y, 10, "tiny imbalanced", low=0.0, high=1.0)
    return Task(data, data, train=data)


# Class weights and losses


def test_weights_by_hand():
    found = class_weights([1, 3], 0.5)  # (1 - b) / (1 - b^n): 1 and 0.5 / 0.875
    assert found.tolist() == pytest.approx([2 * 1.75 / 2.75, 2 * 1 / 2.75])


@settings(deadline=None)
@given(counts=COUNTS, beta=st.floats(0, 0.99999))
def test_weights_have_mean_1_and_fall_with_the_count(counts, beta):
    w, n = class_weights(counts, beta), torch.tensor(counts)
    assert float(w[n > 0].mean()) == pytest.approx(1)
    assert bool((w[n == 0] == 0).all() and (w[n > 0] > 0).all())
    for i, j in zip(range(len(n)), range(1, len(n))):
        if 0 < n[i] <= n[j]:
            assert w[i] >= w[j] * (1 - 1e-9)
    assert torch.allclose(class_weights([7] * len(n), beta), torch.ones(len(n), dtype=w.dtype))
    assert class_weights(counts, 0.0).unique().tolist() in ([0, 1], [1])


def test_focal_by_hand_and_without_focus():
    scores, y = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    assert focal(scores, y, 2.0).tolist() == pytest.approx([-math.log(0.75) / 16, math.log(2) / 4])
    assert torch.allclose(focal(scores, y, 0.0), cross_entropy(scores, y))


def test_focal_keeps_finite_gradients_where_it_is_sure():
    scores = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    focal(scores, torch.tensor([0, 0]), 0.5).sum().backward()
    assert scores.grad.isfinite().all()


def test_ldam_by_hand():
    delta = margins([16, 1, 0], 0.5)
    assert delta.tolist() == [0.25, 0.5, 0.0]
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    expected = -math.log(math.exp(1.5) / (math.exp(1) + math.exp(1.5) + math.exp(3)))
    assert ldam(scores, torch.tensor([1]), delta).tolist() == pytest.approx([expected])


# Separation


def by_definition(z: torch.Tensor, y: torch.Tensor, tau: float) -> float:
    z, total = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        mates = [p for p in range(len(z)) if p != i and y[p] == y[i]]
        below = sum(math.exp(float(z[i] @ z[a]) / tau) for a in range(len(z)) if a != i)
        terms = [math.log(math.exp(float(z[i] @ z[p]) / tau) / below) for p in mates]
        if mates:
            total.append(-sum(terms) / len(mates))
    return sum(total) / len(total) if total else 0.0


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), b=st.integers(1, 9), tau=st.sampled_from([0.2, 1.0]))
def test_separation_is_its_definition(seed, b, tau):
    z, y = drawn(seed, b)
    assert float(separation(z, y, tau)) == pytest.approx(by_definition(z, y, tau), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_separation_of_orthogonal_clusters_is_its_closed_minimum(tau):
    classes, n = 4, 3
    y = torch.arange(classes).repeat_interleave(n)
    least = math.log((n - 1) * math.exp(1 / tau) + n * (classes - 1)) - 1 / tau
    clusters = 7.0 * torch.eye(6)[y]
    assert float(separation(clusters, y, tau)) == pytest.approx(least, abs=1e-5)
    for seed in range(20):
        moved = (
            clusters.abs() + drawn(seed, classes * n, 6)[0].abs()
        )  # features behind a ReLU: no angle above 90
        assert float(separation(moved, y, tau)) > least


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 100))
def test_separation_sees_neither_rotation_nor_length_nor_order(seed, size):
    z, y = drawn(seed)
    turn, _ = torch.linalg.qr(drawn(seed + 1, 5)[0])
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    value = float(separation(z, y, 0.5))
    assert float(separation(z @ turn, y, 0.5)) == pytest.approx(value, rel=1e-4)
    assert float(separation(size * z, y, 0.5)) == pytest.approx(value, rel=1e-4)
    assert float(separation(z[order], y[order], 0.5)) == pytest.approx(value, rel=1e-4)


def test_separation_without_partners_is_0_and_gradients_stay_finite():
    for z in (torch.ones(1, 3), torch.eye(3), torch.zeros(4, 3)):
        z.requires_grad_()
        y = torch.arange(len(z)) % 3
        separation(z, y, 0.1).backward()
        assert z.grad.isfinite().all()
    assert float(separation(torch.eye(3), torch.arange(3), 0.1)) == 0


def test_separation_is_in_float32_whatever_the_passes_are_in():
    z, y = drawn(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(separation(z, y, 0.1), separation(z, y, 0.1).float())
        low = separation(z, y, 0.1)
    assert torch.equal(low, separation(z, y, 0.1))


# Features


class HeadFirst(nn.Module):
    """The layer that runs last stands first, and a gate of two Linear layers runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.gate = nn.Linear(6, 3), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu() * self.gate(x).sigmoid())


def test_features_are_the_inputs_of_the_layer_that_runs_last():
    model, x = tiny_model(), tiny_task().test.x
    assert feature_layer(model, x[:1]) == "9"
    scores, z = scores_and_features(model, x, "9")
    assert torch.equal(scores, model(x)) and torch.equal(z, model[:9](x))
    gated = HeadFirst()
    assert feature_layer(gated, torch.rand(2, 8)) == "head"
    assert not gated.head._forward_hooks and not gated.head._forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), torch.rand(2, 4)),
        (nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), torch.rand(2, 1, 4, 4)),
    ],
)
def test_a_network_that_does_not_end_with_a_linear_layer(model, x):
    data = Data(x.repeat(3, *[1] * (x.ndim - 1)), torch.arange(6) % 3)
    task = Task(data, data, train=data)
    with pytest.raises(DoesNotFit, match="last Linear layer"):
        srat(model, task, HOW)
    assert srat(model, task, Training(epochs=1), SRAT(separation=0.0)).losses[0] > 0


# Training


def test_without_weights_and_separation_it_is_adversarial_training_step_for_step():
    task, attack = tiny_task(), ("linf=0.1", 2, 0.25)
    ours = srat(tiny_model(), task, HOW, SRAT(*attack, deferred=1.0, separation=0.0))
    plain = adversarial(tiny_model(), task, HOW, Adversarial(*attack))
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    for a, b in zip(ours.model.state_dict().values(), plain.model.state_dict().values()):
        assert torch.allclose(a.float(), b.float(), atol=1e-5)


def test_weights_count_from_their_epoch_on():
    task, how = imbalanced(), Training(epochs=5, batch=10, rate=0.01)
    early, late, never = (
        srat(tiny_model(), task, how, SRAT("linf=0.02", 1, deferred=share, separation=0.0))
        for share in (0.0, 0.6, 1.0)
    )
    assert late.losses[:3] == never.losses[:3] and late.losses[3] != never.losses[3]
    assert early.losses[0] != never.losses[0]
    assert [each.notes["epoch"] for each in (early, late, never)] == [0, 3, 5]


@pytest.mark.parametrize("kind", ["ce", "focal", "ldam"])
def test_the_first_loss_by_hand(kind):
    task = imbalanced()
    data, model = task.train, tiny_model()
    setting = SRAT("linf=0.2", 2, 0.5, random=False, loss=kind, deferred=0.0, separation=0.7, margin=3.0)
    found = srat(model, task, Training(epochs=1, batch=30), setting).losses[0]
    w, delta = class_weights([20, 9, 0, 1], setting.beta), margins([20, 9, 0, 1], 3.0)
    losses = {"focal": lambda s, y: focal(s, y, 2.0), "ldam": lambda s, y: ldam(s, y, delta)}
    value = losses.get(kind, cross_entropy)
    attack = adversary("linf=0.2", 2, 0.5, data, random=False)
    points = attack.points(model, data.x, data.y, torch.Generator())
    network = copy.deepcopy(model).train()
    with torch.no_grad():
        z = network[:9](points)
        each = w[data.y] * value(network[9](z), data.y)
    assert found == pytest.approx(float(each.mean() + 0.7 * separation(z, data.y, 0.1)), rel=1e-4)


def test_every_loss_rises_in_the_direction_of_the_cross_entropy():
    scores, y = drawn(0, 6, 4)
    slopes = []
    for value in (
        cross_entropy,
        *(loss_of(SRAT(loss=k, margin=2.0), [9, 3, 1, 0]) for k in ("focal", "ldam")),
    ):
        s = scores.clone().requires_grad_()
        value(s, y).sum().backward()
        slopes.append(F.normalize(s.grad, dim=1))
    assert torch.allclose(slopes[0], slopes[1], atol=1e-5) and torch.allclose(slopes[0], slopes[2], atol=1e-5)


def test_it_keeps_features_of_the_classes_apart():
    task, how = tiny_task(), Training(epochs=12, batch=32, rate=3e-3)
    x, y, left = task.train.x, task.train.y, []
    for strength in (0.0, 1.0):
        model = srat(tiny_model(), task, how, SRAT("linf=0", 0, separation=strength, deferred=1.0)).model
        left.append(float(separation(model[:9](x).detach(), y, 0.1)))
    assert left[1] < left[0] - 0.1, left


def test_empty_and_single_classes_are_told():
    notes = srat(tiny_model(), imbalanced(), HOW, SRAT("linf=0.02", 1)).notes
    assert notes["counts"] == [20, 9, 0, 1] and notes["empty"] == [2] and notes["single"] == [3]
    assert notes["weights"][2] == 0 and sum(notes["weights"]) == pytest.approx(3)
    assert notes["weights"][3] == max(notes["weights"]) and notes["features"] == "9"


def test_the_model_stays_and_twice_is_the_same():
    model, task = tiny_model(), tiny_task()
    before = copy.deepcopy(model.state_dict())
    one, two = (srat(model, task.blind(), HOW, SRAT("linf=0.05", 2)) for _ in range(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert one.losses == two.losses
    assert one.losses != srat(model, task, HOW, SRAT("linf=0.05", 2, temperature=0.5)).losses


def test_killed_and_resumed_gives_the_same_numbers(tmp_path, monkeypatch):
    task, setting, place = tiny_task(), SRAT("linf=0.1", 2), tmp_path / "half.pt"
    whole, real, calls = srat(tiny_model(), task, HOW, setting), method.separation, []

    def dies(*given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) > 2 * math.ceil(len(task.train) / HOW.batch) + 1:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(method, "separation", dies)
    with pytest.raises(KeyboardInterrupt):
        srat(tiny_model(), task, HOW, setting, keep=Checkpoint(place))
    monkeypatch.setattr(method, "separation", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        srat(tiny_model(), task, HOW, SRAT("linf=0.1", 2, beta=0.9), keep=Checkpoint(place, True))
    again = srat(tiny_model(), task, HOW, setting, keep=Checkpoint(place, True))
    assert whole.losses == again.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))


def test_what_was_trained_is_a_network_as_any_other(tmp_path):
    task = tiny_task()
    small = srat(tiny_model(), task, HOW, SRAT("linf=0.05", 2)).network()
    small.save(tmp_path / "small")
    loaded, x = Compressed.load(tmp_path / "small", like=tiny_model()), task.test.x
    assert torch.equal(loaded(x), small(x))
    rows = pipeline.compare(tiny_model(), loaded, task, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, task, "onnx", tmp_path / "model.onnx")["same"]


# What it refuses


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"within": "bitflips=3"}, "set of inputs"),
        ({"steps": -1}, "steps"),
        ({"loss": "focl"}, "did you mean 'focal'"),
        ({"beta": 1.0}, "beta"),
        ({"deferred": 1.5}, "deferred"),
        ({"temperature": 0.0}, "temperature"),
        ({"separation": -0.1}, "separation"),
        ({"margin": float("nan")}, "margin"),
        ({"focus": -1.0}, "focus"),
    ],
)
def test_settings_that_are_none(given, word):
    with pytest.raises((BadInput, DoesNotFit), match=word):
        SRAT(**given)


def test_data_that_do_not_fit():
    task, x = tiny_task(), tiny_task().test.x
    for y, word in (
        (None, "class numbers"),
        (torch.zeros(16, dtype=torch.int64), "of one class"),
        (torch.arange(16), "there are 4 classes"),
        (torch.arange(16) % 4 - 1, "there are 4 classes"),
    ):
        data = Data(x, y)
        with pytest.raises(DoesNotFit, match=word):
            srat(tiny_model(), Task(data, data, train=data), HOW)
    with pytest.raises(BadInput, match="batch norm|--batch"):
        one = nn.Sequential(nn.Flatten(), nn.Linear(196, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        srat(one, task, Training(epochs=1, batch=1))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 100))
def test_a_batch_of_one_without_norms_trains_finitely(seed):
    task = imbalanced(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(196, 4))
    assert math.isfinite(srat(model, task, Training(epochs=1, batch=1), SRAT("linf=0.02", 1)).losses[0])
    assert F.cross_entropy(model(task.train.x), task.train.y).isfinite()
