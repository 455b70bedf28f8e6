"""CBNet: easy and hard, targets drawn anew, the closed form, and a network that every other part takes."""

import copy
import math

import pytest
import torch
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.origin import Origin, mark, origin_of
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.deployment import exports
from netweight.models.converting import autoencoder
from netweight.models.digits_cnn import architecture
from netweight.models.load import skeleton
from netweight.nn.early_exit import all_scores, entropy
from netweight.pipeline import compare
from netweight.testing import check_settings, tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.training import cbnet as method
from netweight.training.cbnet import (
    CBNet,
    apart,
    best_output,
    cbnet,
    choose_limit,
    conversion,
    converted,
    easy_rows,
    paths,
    to_easy,
    train_autoencoder,
    train_exits,
    tune,
    with_exit,
)
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Diverged, Moment, Training
from netweight.verification.bounds import bounds

HOW = Training(2, batch=8, rate=0.01, seed=3)
STILL = Training(1, batch=32, rate=1e-9, optimizer="sgd")  # one step that moves nothing
SETTINGS = CBNet(width=3, widths=(24, 8), tune=1)


def exited(settings: CBNet = SETTINGS, train: bool = True):
    """(network with its exit, its training data, the conversion)."""
    model, data = tiny_model(), tiny_task().train
    convert = conversion(model, data, settings)
    net = with_exit(model, convert, 0)
    if train:
        train_exits(net, data, HOW, settings)
    return net, data, convert


# Easy and hard --------------------------------------------------------------------------------------------


def test_easy_and_hard_cover_and_separate_the_training_set():
    net, data, _ = exited()
    scores = all_scores(net, data)[0]
    limit = float(entropy(scores).median())
    net.limit(limit)
    by_definition = (entropy(scores) < limit) & (scores.argmax(-1) == data.y)
    rows = easy_rows(net, data, 1)
    assert rows.unique().numel() == len(rows) and data.y[rows].tolist() == sorted(data.y[rows].tolist())
    assert 0 < int(by_definition.sum()) < len(data)
    for c in range(4):
        own = rows[data.y[rows] == c].tolist()
        wanted = (by_definition & (data.y == c)).nonzero().flatten().tolist()
        assert sorted(own) == wanted if wanted else len(own) == 1


def test_a_class_without_easy_inputs_takes_its_right_ones_of_least_entropy_then_any():
    net, data, _ = exited()
    scores = all_scores(net, data)[0]
    doubt, right = entropy(scores), scores.argmax(-1) == data.y
    rows = easy_rows(net, data, 5)  # limit 0: nothing is easy
    for c in range(4):
        own = (data.y == c).nonzero().flatten().tolist()
        wanted = sorted(own, key=lambda row: (not right[row], doubt[row].item()))[:5]
        assert rows[data.y[rows] == c].tolist() == wanted
    net.limit(math.log(4))
    rows = easy_rows(net, data, 1)
    assert rows[right[rows]].sort().values.tolist() == right.nonzero().flatten().tolist()
    assert not set(data.y[rows[~right[rows]]].tolist()) & set(data.y[right].tolist())


def test_the_threshold_is_chosen_on_what_was_held_out_unless_it_is_given():
    data = tiny_task().train
    learn, held = apart(data, 0.25, 0)
    assert (len(learn), len(held)) == (24, 8)
    together = torch.cat([learn.x, held.x])
    assert torch.equal(together[:, 0, 0, 0].sort().values, data.x[:, 0, 0, 0].sort().values)
    net, _, _ = exited()
    choose_limit(net, held, CBNet(threshold=0.3))
    assert net.limits.tolist() == pytest.approx([0.3])
    choose_limit(net, held, CBNet(lost=1.0))
    assert net.limits.tolist() == pytest.approx([math.log(4)])
    choose_limit(net, held, CBNet())
    routed = (net.route(held.x).logits.argmax(-1) == held.y).float().mean()
    assert routed >= (net(held.x).argmax(-1) == held.y).float().mean()


# What is trained ------------------------------------------------------------------------------------------


def test_both_exits_are_trained_by_their_weights():
    net, data, _ = exited(train=False)
    train_exits(net, data, STILL, CBNet(weights=(1.0, 0.3)))
    first, last = (nn.functional.cross_entropy(z, data.y) for z in net.train().scores(data.x))
    (loss,) = train_exits(net, data, STILL, CBNet(weights=(2.0, 0.5)))
    assert loss == pytest.approx((2 * first + 0.5 * last).item(), rel=1e-4)


def test_targets_are_drawn_anew_from_the_easy_inputs_of_the_same_class():
    x, y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 0, 0, 2, 2, 2])
    seen = []

    def model(given):
        return torch.zeros(len(given), 2), torch.full((len(given), 3), -7.0)

    generator = torch.Generator().manual_seed(0)
    at = Moment(0, 0, 1, generator)
    for _ in range(40):
        one = to_easy(x, y, 0.0)(model, torch.zeros(1, 2), torch.tensor([2]), at)
        seen.append(one.item())
    assert set(seen) == {row.square().mean().item() for row in x[3:]}
    value = to_easy(x[:1], torch.tensor([0]), 0.5)(model, torch.zeros(2, 2), torch.tensor([0, 0]), at)
    assert value.item() == pytest.approx(0.5 + 0.5 * 21)  # mean of 0 and 1, and half of |code|_1
    for label in (1, 3):
        with pytest.raises(DoesNotFit, match="some have no easy input"):
            to_easy(x, y, 0.0)(model, torch.zeros(1, 2), torch.tensor([label]), at)


def test_two_classes_give_class_means_weighted_by_the_posterior():
    """x in {0, 1, 2}: P(class 1 | x) is 0, 0.5, 1; the output is the blend of the class means."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(3).repeat(200)
    y = torch.where(kind == 1, torch.arange(600) // 3 % 2, kind // 2)
    x = nn.functional.one_hot(kind, 3).float() * 0.8 + 0.1 + 0.02 * torch.randn(600, 3, generator=generator)
    data = Data(x, y, low=0.0, high=1.0)
    easy = torch.cat([(y == c).nonzero().flatten()[kind[y == c] != 1][:5] for c in (0, 1)])
    means = torch.stack([x[easy[:5]].mean(0), x[easy[5:]].mean(0)])
    settings = CBNet(widths=(32, 8), rate=5e-3)
    net = autoencoder((3,), (32, 8), 0.0, 1.0)
    train_autoencoder(net, data, easy, Training(40, batch=50, cosine=True), settings)
    wanted = best_output(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), means)
    found = torch.stack([net(x[kind == k]).mean(0) for k in range(3)])
    assert torch.allclose(found, wanted, atol=0.04), found - wanted
    assert (means[0] - means[1]).abs().max() > 0.5


def test_tuning_moves_the_classifier_alone():
    net, data, convert = exited()
    small = converted(tiny_model(), net, convert, 0)
    assert torch.equal(small.classifier(data.x), net.until(0)(data.x))
    before = copy.deepcopy(small.state_dict())
    tune(small, data, HOW, 1)
    moved = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in moved} == {"classifier"}
    assert all(p.requires_grad for p in small.parameters())


def test_paths_add_up():
    net, data, convert = exited(train=False)
    small = converted(tiny_model(), net, convert, 0)
    found = paths(net, small, data)
    assert found["converted"] == found["autoencoder"] + found["exit"]
    branch = method.macs(net.exits[0], torch.zeros(1, *convert.features))
    assert found["past the exit"] == found["whole network"] + branch
    assert found["autoencoder"] == 196 * 24 + 24 * 8 + 8 * 196
    assert found["whole network"] == method.macs(tiny_model(), data.x[:1])


# The whole method -----------------------------------------------------------------------------------------


def test_the_model_stays_and_the_same_seed_gives_the_same(monkeypatch):
    model, task = tiny_model(), tiny_task()
    before = copy.deepcopy(model.state_dict())
    a = cbnet(model, task.blind(), HOW, SETTINGS)
    monkeypatch.setattr(method, "paths", lambda *_: {})  # seconds that are not looked at again
    b = cbnet(model, task.blind(), HOW, SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(a.model, task.test), outputs(b.model, task.test)) and a.losses == b.losses
    assert len(a.losses) == 2 + 2 + 1 and not a.model.training
    other = cbnet(model, task.blind(), Training(2, batch=8, rate=0.01, seed=4), SETTINGS)
    assert not torch.equal(outputs(a.model, task.test), outputs(other.model, task.test))
    kept = cbnet(model, task.blind(), HOW, CBNet(width=3, widths=(24, 8), tune=0, epochs=3))
    assert len(kept.losses) == 2 + 3 and kept.losses[:2] == a.losses[:2]
    assert a.notes["macs"]["converted"] == method.macs(a.model, task.test.x[:1])
    assert 0 < a.notes["easy"] <= 1 and 0 <= a.notes["threshold"] <= math.log(4) + 1e-9


@pytest.mark.parametrize("stopped_at", [6, 14, 18])  # with the exit, in the autoencoder, while tuning
def test_stopped_and_resumed_gives_the_same_numbers(stopped_at, tmp_path, monkeypatch):
    monkeypatch.setattr(method, "paths", lambda *_: {})  # seconds that are not looked at here
    task, place, whole = tiny_task(), tmp_path / "run.pt", method.train
    wanted, seen = cbnet(tiny_model(), task, HOW, SETTINGS), iter(range(100))

    def stopping(model, data, loss, how, **rest):
        def stops(model, x, y, at):
            if next(seen) == stopped_at:
                raise KeyboardInterrupt
            return loss(model, x, y, at)

        return whole(model, data, stops, how, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "train", stopping)
        cbnet(tiny_model(), task, HOW, SETTINGS, keep=Checkpoint(place))
    found = cbnet(tiny_model(), task, HOW, SETTINGS, keep=Checkpoint(place, resume=True))
    assert found.losses == wanted.losses
    assert torch.equal(outputs(found.model, task.test), outputs(wanted.model, task.test))
    with pytest.raises(BadInput, match="other weights, data or settings"):
        cbnet(tiny_model(), task, HOW, CBNet(width=3, widths=(24, 7)), keep=Checkpoint(place, resume=True))


def test_flows_on_into_compare_bounds_and_export(tmp_path):
    model, task = tiny_model(), tiny_task()
    small = cbnet(model, task, HOW, SETTINGS).network()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(outputs(back.model, task.test), outputs(small.model, task.test))
    assert compare(model, small, task, within=Linf(0.01))["worst possible"]
    x = task.test.x[:2]
    proven = bounds(small.plain(), x, Linf(0.01))
    assert (proven.lower <= small.model(x)).all() and (small.model(x) <= proven.upper).all()
    assert exports.export(small, task, "onnx", tmp_path / "model.onnx")["same"]


def test_a_built_in_network_is_loaded_without_its_original(tmp_path):
    model = mark(architecture(), Origin("built-in", "digits-cnn"))
    data = digits.train().take(60)
    small = cbnet(model, Task(data, digits.test()).blind(), Training(1), CBNet(widths=(8,))).network()
    assert origin_of(small.model).target == "digits-cnn"
    small.save(tmp_path / "small")
    x = digits.test().take(5).x
    assert torch.equal(Compressed.load(tmp_path / "small").model(x), small.model(x))
    assert skeleton("digits-cnn", {})(x).shape == small.model(x).shape


# What does not fit ----------------------------------------------------------------------------------------


def test_networks_and_data_that_do_not_fit():
    with pytest.raises(DoesNotFit, match="inputs of floats with one class number each"):
        cbnet(tiny_language_model(), tiny_text_task(), HOW, SETTINGS)
    data = tiny_task().train
    blank = Data(data.x, None, 10, "no labels")
    with pytest.raises(DoesNotFit, match="no labels: training needs examples with class numbers"):
        cbnet(tiny_model(), Task(blank, blank), HOW, SETTINGS)
    with pytest.raises(DoesNotFit, match="Flatten: an early exit lies between two parts"):
        cbnet(nn.Flatten(), tiny_task(), HOW, SETTINGS)
    with pytest.raises(DoesNotFit, match="9: no exit can lie behind it"):
        cbnet(tiny_model(), tiny_task(), HOW, CBNet(after="9"))
    with pytest.raises(DoesNotFit, match="one score for each class"):
        cbnet(tiny_model(), Task(data, data, train=Data(data.x, torch.full((32,), 4))), HOW, SETTINGS)
    with pytest.raises(BadInput, match="2 examples cannot be split by held=0.1"):
        cbnet(tiny_model(), Task(data.take(2), data), HOW, SETTINGS)
    with pytest.raises(BadInput, match="batch norm has no variance of one example"):
        cbnet(
            nn.Sequential(nn.Flatten(), nn.Linear(196, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
            tiny_task(), Training(1, batch=1), SETTINGS,
        )  # fmt: skip


def test_a_loss_that_is_no_number_stops_with_its_step():
    with pytest.raises(Diverged, match="training diverged in"):
        cbnet(tiny_model(), tiny_task(), Training(3, batch=8, rate=1e30, optimizer="sgd"), SETTINGS)


def test_vectors_and_settings():
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    data = Data(x, torch.arange(40) % 3, 8)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    found = cbnet(model, Task(data, data, train=data), HOW, SETTINGS)
    assert found.model(x).shape == (40, 3) and found.change.rewrites[0].features == (5,)
    check_settings(SETTINGS)
    for make, sentence in [
        (lambda: CBNet(width=0), "width=0"),
        (lambda: CBNet(widths=()), "layers of at least one neuron"),
        (lambda: CBNet(widths=(8, 0)), "layers of at least one neuron"),
        (lambda: CBNet(weights=(1.0,)), "two numbers above 0"),
        (lambda: CBNet(weights=(1.0, 0.0)), "two numbers above 0"),
        (lambda: CBNet(threshold=-0.1), "threshold=-0.1: an entropy is not below 0"),
        (lambda: CBNet(held=0.0), "held=0.0"),
        (lambda: CBNet(lost=1.5), "lost=1.5"),
        (lambda: CBNet(fewest=0), "fewest=0"),
        (lambda: CBNet(rate=0.0), "rate=0.0"),
        (lambda: CBNet(tune=-1), "tune=-1"),
        (lambda: CBNet(epochs=0), "epochs=0"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            make()
