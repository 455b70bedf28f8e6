"""Adversarial training: the attack it meets, what it buys, and the network that goes on from here."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight import pipeline
from netweight.attacks.pgd import pgd
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.data import digits
from netweight.deployment import exports
from netweight.models.digits_cnn import architecture
from netweight.testing import tiny_model, tiny_task
from netweight.training import adversarial as method
from netweight.training.adversarial import Adversarial, adversarial
from netweight.training.adversary import Adversary, adversary, cross_entropy
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Training
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=16, rate=0.01)


def seeded() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return architecture()


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    name=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.floats(0, 0.6),
    steps=st.integers(0, 4),
    size=st.floats(0.1, 3),
    random=st.booleans(),
)
def test_points_lie_in_the_set_and_in_the_range(name, eps, steps, size, random):
    model, data = tiny_model(), tiny_task().calibration.take(6)
    attack = adversary(f"{name}={eps}", steps, size, data, random=random)
    points = attack.points(model, data.x, data.y, chance())
    assert bool(attack.within.contains(points, data.x).all())
    assert (attack.within.low, attack.within.high) == (data.low, data.high)


def test_a_step_of_a_linear_network_goes_along_the_signs_of_its_gradient():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    attack = Adversary(Linf(0.25), 1, 1.0, random=False)
    points = attack.points(model, torch.zeros(1, 2), torch.tensor([0]), chance())
    assert points.tolist() == [[-0.25, 0.25]]


def test_it_climbs_and_more_steps_climb_higher():
    model, data = tiny_model(), tiny_task().calibration.take(32)

    def loss(steps: int) -> float:
        attack = adversary("linf=0.2", steps, 0.25, data, random=False)
        with torch.no_grad():
            return float(cross_entropy(model(attack.points(model, data.x, data.y, chance())), data.y).mean())

    assert loss(0) < loss(1) < loss(8)


def test_modes_statistics_and_gradients_of_the_network_stay():
    model, data = tiny_model().train(), tiny_task().calibration.take(8)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    adversary("linf=0.1", 3, 0.25, data).points(model, data.x, data.y, chance())
    assert model.training and not model[0].training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_steps_0_at_x_is_ordinary_training():
    task = tiny_task()
    plain = adversarial(tiny_model(), task, HOW, Adversarial("linf=0.1", steps=0, random=False))
    none = adversarial(tiny_model(), task, HOW, Adversarial("linf=0", 2, random=False))
    assert plain.losses == none.losses
    assert plain.losses != adversarial(tiny_model(), task, HOW, Adversarial("linf=0.1", steps=2)).losses


def test_it_withstands_what_ordinary_training_does_not():
    data = digits.train().take(500)
    task, how = Task(data.take(64), data, train=data), Training(epochs=8, batch=50, rate=3e-3)
    test, left = digits.test().take(150), []
    for eps in (0, 0.15):
        network = adversarial(seeded(), task, how, Adversarial(f"linf={eps}", steps=4, size=0.4)).model
        found = pgd(network, test.x, test.y, Linf(0.15, low=0, high=1), steps=10)
        left.append(float((~found.hit).double().mean()))
    assert left[1] > left[0] + 0.2, left


def test_killed_and_resumed_gives_the_same_numbers(tmp_path, monkeypatch):
    task, settings, place = tiny_task(), Adversarial("linf=0.1", steps=2), tmp_path / "half.pt"
    whole, real, calls = adversarial(tiny_model(), task, HOW, settings), method.loss, []

    def dies(*given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) > len(task.calibration) // HOW.batch + 1:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(method, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        adversarial(tiny_model(), task, HOW, settings, keep=Checkpoint(place))
    monkeypatch.setattr(method, "loss", real)
    assert place.exists()
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        adversarial(tiny_model(), task, HOW, Adversarial("linf=0.2", 2), keep=Checkpoint(place, True))
    again = adversarial(tiny_model(), task, HOW, settings, keep=Checkpoint(place, True))
    assert whole.losses == again.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))


def test_what_was_trained_is_a_network_as_any_other(tmp_path):
    task = tiny_task()
    small = adversarial(tiny_model(), task, HOW, Adversarial("linf=0.05", steps=2)).network()
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
        ({"within": "ball=1"}, "linf"),
        ({"within": "bitflips=3"}, "set of inputs"),
        ({"steps": -1}, "steps"),
        ({"size": 0.0}, "size"),
        ({"size": float("nan")}, "size"),
    ],
)
def test_settings_that_are_none(settings, word):
    with pytest.raises((BadInput, DoesNotFit), match=word):
        Adversarial(**settings)


def test_whole_numbers_and_data_without_classes_are_told():
    task = tiny_task()
    words = Data(torch.randint(0, 5, (8, 4)), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(DoesNotFit, match="whole numbers"):
        adversarial(tiny_model(), Task(words, words, train=words), HOW)
    bare = Data(task.test.x, None)
    with pytest.raises(DoesNotFit, match="class numbers"):
        adversarial(tiny_model(), Task(bare, bare, train=bare), HOW)
