"""AccelAT: its rule against the official bookkeeping, the shapes by hand, and training with them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.deployment import exports
from netweight.reproduce import accelat as reproduction
from netweight.testing import check_settings, tiny_model, tiny_task
from netweight.training import accelat as method
from netweight.training.accelat import RULE, SHAPES, AccelAT, accelat, attacked, cut, next_rate
from netweight.training.adversary import Adversary, adversary
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Training
from netweight.verification.bounds import bounds

HOW = Training(4, 16, 0.05, optimizer="sgd")
SETTINGS = AccelAT("linf=0.1", steps=2, size=0.5, window=1, wait=1, rise=1.0)  # cuts after epochs 3 and 4


def course(accuracies: list[float], rate: float, rule: AccelAT) -> list[float]:
    """The rate of each epoch, and of the one after the last."""
    rates = [rate]
    for epoch in range(len(accuracies)):
        rates.append(next_rate(accuracies[: epoch + 1], rates, rule))
    return rates


def by_bookkeeping(accuracies: list[float], rate: float, rule: AccelAT) -> list[float]:
    """With a list of means and a counter of quiet epochs."""
    rates, means, quiet = [rate], [], rule.wait
    for epoch in range(len(accuracies)):
        mean = sum(accuracies[max(0, epoch - rule.window + 1) : epoch + 1]) / min(epoch + 1, rule.window)
        quiet += 1
        if len(means) > rule.window and quiet > rule.wait and mean - means[-1] < rule.rise:
            rate, quiet = max(rule.drop * rate, rule.floor), 1
        means.append(mean)
        rates.append(rate)
    return rates


CURVES = st.lists(st.integers(0, 50), min_size=1, max_size=40).map(lambda curve: [a / 50 for a in curve])


# The rule ---------------------------------------------------------------------------------------------------


@given(curve=CURVES, window=st.integers(1, 6), wait=st.integers(1, 6), rise=st.sampled_from([0.0033, 0.021]))
def test_the_rule_is_that_of_the_bookkeeping(curve, window, wait, rise):
    rule = AccelAT(window=window, wait=wait, rise=rise, floor=1e-9)
    assert course(curve, 0.1, rule) == by_bookkeeping(curve, 0.1, rule)


def test_a_curve_by_hand():
    rising = [0.1 * e for e in range(7)]  # a_6 - a_1 = 0.5: no cut
    flat = [0.6] * 9  # cuts as soon as a_e - a_{e-5} < 0.025, at e = 11; next where five epochs have passed
    rates = course(rising + flat, 1.0, AccelAT())
    assert rates == [1.0] * 12 + [0.8] * 5
    assert course([0.5] * 17, 1.0, AccelAT()) == [1.0] * 7 + [0.8] * 5 + [0.8 * 0.8] * 5 + [0.8 * 0.8 * 0.8]


@given(curve=CURVES, rate=st.floats(1e-6, 1))
def test_rates_fall_and_never_twice_within_five_epochs(curve, rate):
    rule = AccelAT()
    rates = course(curve, rate, rule)
    assert all(a >= b >= rule.floor for a, b in zip(rates, rates[1:]))
    cuts = [e for e, (a, b) in enumerate(zip(rates, rates[1:])) if b < a]
    assert all(later - earlier >= 5 for earlier, later in zip(cuts, cuts[1:]))
    assert not cuts or cuts[0] >= 6


def test_the_floor_is_reached_exactly_and_rising_accuracy_never_cuts():
    rates = course([0.5] * 60, 3e-6, AccelAT())
    assert rates[-1] == 1e-6 and min(rates) == 1e-6
    assert set(course([0.0051 * e for e in range(100)], 1e-3, AccelAT())) == {1e-3}
    assert course([0.0049 * e for e in range(100)], 1e-3, AccelAT())[-1] < 1e-3


def test_shapes_by_hand():
    def shape(name: str, epochs: int = 10) -> list[float]:
        return [SHAPES[name](epoch, epochs) for epoch in range(epochs)]

    assert shape("constant", 3) == [1.0] * 3
    assert shape("piecewise", 9) == [1.0] * 4 + [0.1] * 3 + [0.01] * 2
    assert shape("linear", 10) == pytest.approx(
        [0.55, 0.1, 0.325, 0.1, 0.25, 0.1, 0.2125, 0.1, 0.19, 0.1], rel=1e-9
    )
    assert shape("exponential", 10) == pytest.approx([10.0**e for e in range(10)])
    assert shape("one-cycle") == pytest.approx([1, 3.25, 5.5, 7.75, 10, 7.75, 5.5, 3.25, 1, 0.505])


# Training ---------------------------------------------------------------------------------------------------


def whole_batch() -> tuple[nn.Module, Task]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(20, 3, generator=generator), torch.randint(2, (20,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2), Task(Data(x, y), Data(x, y))


@pytest.mark.parametrize("shape", [*SHAPES, RULE])
def test_each_step_has_the_rate_of_its_epoch_and_no_momentum(shape):
    model, task = whole_batch()
    rule = AccelAT("linf=0", shape=shape, window=1, wait=2)
    found = accelat(model, task, Training(7, 100, 0.01, optimizer="sgd"), rule)
    seen, apart = cut(task.calibration, rule.validation, 0)
    by_hand, rates = copy.deepcopy(model), []
    for epoch in range(7):
        rates.append(0.01 * SHAPES[shape](epoch, 7) if shape in SHAPES else found.notes["rate"][epoch])
        grads = torch.autograd.grad(F.cross_entropy(by_hand(seen.x), seen.y), [*by_hand.parameters()])
        with torch.no_grad():
            for p, grad in zip(by_hand.parameters(), grads):
                p -= rates[-1] * grad
        right = float((by_hand(apart.x).argmax(1) == apart.y).double().mean())
        assert found.notes["accuracy"][epoch] == pytest.approx(right)
    assert found.notes["rate"] == pytest.approx(rates) and found.notes["validation"] == 4
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(found.model.parameters(), by_hand.parameters())
    )
    if shape == RULE:
        assert rates == course(found.notes["accuracy"], 0.01, rule)[:-1] and rates[-1] < rates[0]


def test_validation_is_apart_from_what_is_trained_on():
    task = tiny_task()
    data = Data(torch.arange(10.0)[:, None], torch.arange(10))
    seen, apart = cut(data, 0.3, seed=5)
    assert len(apart) == 3 and sorted([*seen.y.tolist(), *apart.y.tolist()]) == list(range(10))
    assert torch.equal(seen.x[:, 0], seen.y.float())
    assert cut(data, 0.3, seed=6)[1].y.tolist() != apart.y.tolist()
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(HOW.seed))[:6]  # 0.2 of 32
    train = task.train
    moved = Data(train.x.index_fill(0, rows, 0.5), train.y, low=0.0, high=1.0)
    other = Task(task.calibration, task.test, train=moved)
    one, two = (
        accelat(tiny_model(), t.blind(), HOW, AccelAT("linf=0", shape="constant")) for t in (task, other)
    )
    assert one.losses == two.losses


def test_examples_are_made_once_or_in_each_step(monkeypatch):
    real, networks = Adversary.points, []

    def counted(self: Adversary, model: nn.Module, *given: object) -> torch.Tensor:
        networks.append(float(next(model.parameters()).detach().double().sum()))
        return real(self, model, *given)

    monkeypatch.setattr(Adversary, "points", counted)
    accelat(tiny_model(), tiny_task(), HOW, SETTINGS)
    assert len(networks) == 2 and len(set(networks)) == 1
    networks.clear()
    accelat(tiny_model(), tiny_task(), HOW, AccelAT("linf=0.1", steps=2, fixed=False))
    assert len(networks) == HOW.epochs * (2 + 1) and len(set(networks)) == HOW.epochs * 2 + 1


def test_accuracies_are_those_under_attack():
    task = tiny_task()
    calm = Training(1, 64, 1e-6, optimizer="sgd")  # a network that stays as it is
    _, apart = cut(task.train, 0.5, 0)
    attack = adversary("linf=0.1", 5, 0.5, apart)
    hit = attacked(tiny_model(), apart, attack, 0)
    assert bool(attack.within.contains(hit.x, apart.x).all())
    wanted = float((tiny_model()(hit.x).argmax(1) == apart.y).double().mean())
    clean = float((tiny_model()(apart.x).argmax(1) == apart.y).double().mean())
    for fixed in (True, False):
        found = accelat(tiny_model(), task, calm, AccelAT("linf=0.1", 5, 0.5, fixed=fixed, validation=0.5))
        assert found.notes["accuracy"] == [pytest.approx(wanted, abs=0.07)]
    assert wanted < clean


def test_norms_keep_their_statistics_or_learn():
    model, task = tiny_model(), tiny_task()
    for frozen in (True, False):
        found = accelat(model, task.blind(), HOW, AccelAT("linf=0.1", 1, frozen=frozen)).model
        assert torch.equal(found[1].running_mean, model[1].running_mean) is frozen
        assert not torch.equal(found[1].weight, model[1].weight)
        assert not any(module.training for module in found.modules())


def test_every_setting_counts_and_nothing_else_is_changed():
    model, task = tiny_model(), tiny_task()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = accelat(model, task.blind(), HOW, SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first.losses == accelat(model, task, HOW, SETTINGS).losses
    assert first.notes["rate"] == pytest.approx([0.05, 0.05, 0.05, 0.04])
    same = {"within": "linf=0.1", "steps": 2, "size": 0.5, "window": 1, "wait": 1, "rise": 1.0}
    for change in (
        {"within": "linf=0.2"}, {"steps": 1}, {"size": 0.2}, {"random": False}, {"shape": "one-cycle"},
        {"fixed": False}, {"validation": 0.4}, {"window": 3}, {"rise": -1.0}, {"drop": 0.5}, {"floor": 0.045},
        {"momentum": 0.9}, {"frozen": False},
    ):  # fmt: skip
        found = accelat(model, task, HOW, AccelAT(**{**same, **change}))
        assert found.losses != first.losses, change
    check_settings(SETTINGS)


@pytest.mark.parametrize("fixed", [True, False])
def test_killed_and_resumed_gives_the_same_numbers(tmp_path, monkeypatch, fixed):
    task, place = tiny_task(), tmp_path / "half.pt"
    how = Training(6, 16, 0.05, optimizer="sgd")
    settings = AccelAT("linf=0.1", 2, 0.5, fixed=fixed, window=1, wait=1, rise=1.0)
    whole, real, calls = accelat(tiny_model(), task, how, settings), method.loss, []
    assert len(set(whole.notes["rate"][:4])) == 2  # there is a cut before it is killed

    def dies(*given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(method, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        accelat(tiny_model(), task, how, settings, keep=Checkpoint(place))
    monkeypatch.setattr(method, "loss", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        accelat(tiny_model(), task, how, AccelAT("linf=0.1", 2), keep=Checkpoint(place, True))
    again = accelat(tiny_model(), task, how, settings, keep=Checkpoint(place, True))
    assert whole.losses == again.losses and whole.notes == again.notes
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))


def test_what_was_trained_is_a_network_as_any_other(tmp_path):
    task = tiny_task()
    small = accelat(tiny_model(), task, HOW, SETTINGS).network()
    small.save(tmp_path / "small")
    loaded, x = Compressed.load(tmp_path / "small", like=tiny_model()), task.test.x
    assert torch.equal(loaded(x), small(x))
    rows = pipeline.compare(tiny_model(), loaded, task, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, task, "onnx", tmp_path / "model.onnx")["same"]


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"shape": "one-cylce"}, "did you mean 'one-cycle'"),
        ({"window": 0}, "window=0"),
        ({"wait": 0}, "wait=0"),
        ({"drop": 1.0}, "drop=1.0"),
        ({"floor": -1.0}, "floor=-1.0"),
        ({"rise": math.nan}, "rise=nan"),
        ({"validation": 0.0}, "validation=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"within": "bitflips=3"}, "set of inputs"),
        ({"steps": -1}, "steps"),
    ],
)
def test_settings_that_are_none(settings, word):
    with pytest.raises((BadInput, DoesNotFit), match=word):
        AccelAT(**settings)


def test_what_cannot_be_trained_on_is_told():
    task = tiny_task()
    for schedule in ({"milestones": (2,)}, {"warmup": 1.0}, {"cosine": True}):
        with pytest.raises(BadInput, match="sets the rate itself"):
            accelat(tiny_model(), task, Training(3, **schedule))
    with pytest.raises(BadInput, match="above the rate 1e-07"):
        accelat(tiny_model(), task, Training(3, rate=1e-7))
    with pytest.raises(BadInput, match="of 32 examples one part is left empty"):
        accelat(tiny_model(), task, HOW, AccelAT(validation=0.01))
    bare = Data(task.test.x, None)
    with pytest.raises(DoesNotFit, match="class numbers"):
        accelat(tiny_model(), Task(bare, bare), HOW)
    words = Data(torch.randint(0, 5, (8, 4)), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(DoesNotFit, match="whole numbers"):
        accelat(tiny_model(), Task(words, words), HOW)


# The reproduction -------------------------------------------------------------------------------------------


def test_the_quick_variant_reaches_its_bar():
    claim = reproduction.reproduce(quick=True)
    assert len(claim.bars) == 1 and all(bar.passed for bar in claim.bars), claim.bars


def test_bars_of_the_reproduction_by_hand():
    assert reproduction.reached([0.1, 0.5, 0.4, 0.6], 0.5) == 2
    assert reproduction.reached([0.1], 0.5) == math.inf
    slow, fast = [0.1 * e for e in range(1, 11)], [0.5, 1.0] + [1.0, 0.9] * 4
    runs = {("constant", reproduction.BASE): {"accuracy": slow}}
    for start in reproduction.STARTS:
        runs["constant", start] = {"accuracy": fast}
        runs[RULE, start] = {"accuracy": [1.0] * 10}
    rule, base = (RULE, reproduction.STARTS[0]), ("constant", reproduction.BASE)
    assert reproduction.faster(runs, rule, base, 0.5).measured == pytest.approx(0.1)
    speed, calm = reproduction.honest(runs)
    assert speed.measured == pytest.approx(1.0) and not speed.passed
    assert calm.measured < -0.05 and calm.passed
