"""Shallow-Deep Networks: what is trained and what stays, the ramp, resuming, and what flows on."""

import copy
import math

import pytest
import torch
from torch import nn

import netweight as nw
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.origin import Origin, mark
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.deployment import exports
from netweight.models.digits_cnn import architecture
from netweight.nn.dynamic import Taken, dynamic_of
from netweight.nn.early_exit import all_scores, at_exits, first_exits, parts, work
from netweight.pipeline import compare
from netweight.testing import check_settings, tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.training import shallow_deep as method
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Diverged, Moment, Training
from netweight.training.shallow_deep import ShallowDeep, evenly, placed, products, ramp, shallow_deep, weighed
from netweight.verification.bounds import bounds

HOW = Training(3, batch=8, rate=0.01, seed=3)
ALONE = ShallowDeep(("2", "5"), confidence=0.3)
TOGETHER = ShallowDeep(("2", "5"), True, 0.3)


def losses(net, data: Data) -> list[float]:
    return [nn.functional.cross_entropy(z, data.y).item() for z in all_scores(net, data)]


def test_alone_the_network_keeps_its_weights_and_statistics_and_the_exits_learn():
    model, task = tiny_model(), tiny_task()
    before = copy.deepcopy(model.state_dict())
    found = shallow_deep(model, task.blind(), HOW, ALONE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(found.model, task.test), outputs(model, task.test))
    assert not found.model.training and all(p.requires_grad for p in found.model.parameters())
    net = dynamic_of(found.model)
    assert net.limits.tolist() == pytest.approx([0.7, 0.7]) and found.losses[0] > found.losses[-1]
    untrained = shallow_deep(
        model, task.blind(), Training(1, batch=32, rate=1e-9, optimizer="sgd", seed=3), ALONE
    )
    was, now = (losses(dynamic_of(each.model), task.train) for each in (untrained, found))
    assert now[0] < was[0] and now[1] < was[1] and now[2] == was[2]
    assert untrained.losses[0] == pytest.approx(was[0] + was[1], rel=1e-4)


def test_exits_that_learn_alone_are_those_that_learn_on_the_network_itself():
    """What is pooled once gives the gradients that a pass through the frozen network gives."""
    model, task = tiny_model(), tiny_task()
    one = Training(1, batch=32, rate=0.1, optimizer="sgd", seed=3)
    found = dynamic_of(shallow_deep(model, task, one, ALONE).model)
    like = dynamic_of(
        shallow_deep(model, task, Training(1, batch=32, rate=1e-30, seed=3), ALONE).model
    ).eval()
    own = [p for exit in [*like.exits][:-1] for p in exit.parameters()]
    value = sum(nn.functional.cross_entropy(z, task.train.y) for z in like.scores(task.train.x)[:-1])
    slopes = torch.autograd.grad(value, own)
    wanted = [p - 0.1 * slope for p, slope in zip(own, slopes)]
    moved = [p for exit in [*found.exits][:-1] for p in exit.parameters()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(moved, wanted, strict=True))


def test_together_everything_learns_by_a_ramp_to_the_depth():
    model, task = tiny_model(), tiny_task()
    found = shallow_deep(model, task.blind(), HOW, TOGETHER)
    net = dynamic_of(found.model)
    assert not torch.equal(outputs(found.model, task.test), outputs(model, task.test))
    start = losses(dynamic_of(shallow_deep(model, task, Training(1, rate=1e-30), ALONE).model), task.train)
    assert all(now < was for now, was in zip(losses(net, task.train), start))
    counts = products(net, task.train.x)
    assert counts == parts(net, task.train.x) and found.notes["products"] == work(counts)
    stages = [stage for stage, _ in counts]
    taus = method.depths(counts)
    assert taus == pytest.approx([stages[0] / sum(stages), sum(stages[:2]) / sum(stages), 1.0])
    assert ramp(0.3, 0, 10) == 0.01 and ramp(0.3, 5, 10) == pytest.approx(0.16) and ramp(0.3, 10, 10) == 0.3


def test_the_weighted_sum_by_hand():
    logits, y = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]]), torch.tensor([0])
    first, last = math.log(2), math.log(1 + math.exp(-1))
    at = Moment(7, 5, 1, torch.Generator())
    ramped = weighed((0.3, 1.0), 10)(lambda x: logits, torch.zeros(1), y, at)
    assert ramped.item() == pytest.approx(0.16 * first + last)
    assert weighed((1.0, 1.0))(lambda x: logits, torch.zeros(1), y, at).item() == pytest.approx(first + last)


def test_q_is_chosen_on_what_was_held_out():
    task = tiny_task()
    found = shallow_deep(tiny_model(), task, HOW, ShallowDeep(("2", "5"), lost=0.0, held=0.25))
    net, (_, held) = dynamic_of(found.model), method.apart(task.train, 0.25, HOW.seed)
    scores = all_scores(net, held)
    run = at_exits(scores, first_exits(scores, net.limits, "unsure")).argmax(1) == held.y
    assert run.float().mean() >= (scores[-1].argmax(1) == held.y).float().mean()
    assert found.notes["confidence"] == 1 - net.limits[0].item()
    free = shallow_deep(tiny_model(), task, HOW, ShallowDeep(("2", "5"), lost=1.0))
    assert not dynamic_of(free.model).route(task.test.x).exit.any()
    with pytest.raises(BadInput, match="2 examples cannot be split by held=0.1"):
        shallow_deep(tiny_model(), Task(task.train.take(2), task.test), HOW)


def test_exits_lie_at_even_shares_of_the_work_before_parts_with_weights():
    model, x = tiny_model(), tiny_task().test.x[:1]
    found = evenly(model, x)
    assert set(found) <= {"2", "6", "8"} and list(found) == sorted(found)
    same = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    assert evenly(same, torch.rand(1, 8)) == ("1", "3", "5")
    assert placed(same, Data(torch.rand(4, 8), torch.arange(4))).features == ((8,), (8,), (8,))
    for lacking in (nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), nn.Sequential(nn.Flatten())):
        with pytest.raises(DoesNotFit, match="between two parts of an nn.Sequential that have weights"):
            evenly(lacking, x)


@pytest.mark.parametrize("settings", [ALONE, TOGETHER], ids=["alone", "together"])
def test_stopped_and_resumed_gives_the_same_numbers(settings, tmp_path, monkeypatch):
    task, place, calls = tiny_task(), tmp_path / "state", []
    wanted = shallow_deep(tiny_model(), task, HOW, settings)
    again = shallow_deep(tiny_model(), task, HOW, settings)
    assert again.losses == wanted.losses
    whole = method.train

    def stopping(model, data, loss, how, **rest):
        def stops(*given):
            calls.append(1)
            if len(calls) > 6:
                raise KeyboardInterrupt
            return loss(*given)

        return whole(model, data, stops, how, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "train", stopping)
        shallow_deep(tiny_model(), task, HOW, settings, keep=Checkpoint(place))
    found = shallow_deep(tiny_model(), task, HOW, settings, keep=Checkpoint(place, resume=True))
    assert found.losses == wanted.losses
    for a, b in zip(found.model.state_dict().values(), wanted.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for other, model in (
        (ShallowDeep(("2", "5"), settings.together, 0.4), tiny_model()),
        (settings, tiny_model(5)),
    ):
        with pytest.raises(BadInput, match="other weights, data or settings"):
            shallow_deep(model, task, HOW, other, keep=Checkpoint(place, resume=True))


def test_flows_on_into_compare_bounds_export_and_compress(tmp_path):
    model, task = tiny_model(), tiny_task()
    small = shallow_deep(model, task, HOW, ALONE).network()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=model)
    x = task.test.x
    assert torch.equal(Taken(dynamic_of(back.model))(x), Taken(dynamic_of(small.model))(x))
    assert compare(model, small, task, within=Linf(0.01))["worst possible"]
    early = dynamic_of(small.plain()).until(0).eval()
    for network in (small.plain(), early):
        proven = bounds(network, x[:2], Linf(0.01))
        assert (proven.lower <= network(x[:2])).all() and (network(x[:2]) <= proven.upper).all()
    assert exports.export(small, task, "onnx", tmp_path / "model.onnx")["same"]
    fewer = nw.compress(small.model, task, nw.Budget(bits=6), method="rtn")
    net = dynamic_of(fewer.model)
    assert net.limits.tolist() == dynamic_of(small.model).limits.tolist()
    assert torch.allclose(net(x), small.model(x), atol=0.2) and net.route(x).logits.shape == (16, 4)


def test_a_built_in_network_is_loaded_without_its_original(tmp_path):
    model = mark(architecture(), Origin("built-in", "digits-cnn"))
    data = digits.train().take(60)
    settings = ShallowDeep(("3", "6"), confidence=0.5)
    small = shallow_deep(model, Task(data, digits.test()).blind(), Training(1), settings).network()
    small.save(tmp_path / "small")
    x, back = digits.test().take(5).x, dynamic_of(Compressed.load(tmp_path / "small").model)
    assert torch.equal(Taken(back)(x), Taken(dynamic_of(small.model))(x)) and back.limits.tolist() == [
        0.5,
        0.5,
    ]


def test_networks_data_and_settings_that_do_not_fit():
    data = tiny_task().train
    with pytest.raises(DoesNotFit, match="inputs of floats with one class number each"):
        shallow_deep(tiny_language_model(), tiny_text_task(), HOW)
    blank = Data(data.x, None, 10, "no labels")
    with pytest.raises(DoesNotFit, match="no labels: training needs examples with class numbers"):
        shallow_deep(tiny_model(), Task(blank, blank), HOW)
    with pytest.raises(DoesNotFit, match="9: no exit can lie behind it"):
        shallow_deep(tiny_model(), tiny_task(), HOW, ShallowDeep(("9",)))
    with pytest.raises(DoesNotFit, match="one score for each class"):
        shallow_deep(tiny_model(), Task(data, data, train=Data(data.x, torch.full((32,), 4))), HOW, ALONE)
    with pytest.raises(DoesNotFit, match="exits lie between the parts"):
        shallow_deep(nn.Flatten(), Task(Data(torch.rand(4, 4), torch.arange(4)), data), HOW, ALONE)
    with pytest.raises(BadInput, match="batch norm has no variance of one example"):
        norms = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).eval()
        vectors = Data(torch.rand(8, 6), torch.arange(8) % 4)
        shallow_deep(norms, Task(vectors, vectors), Training(1, batch=1), ShallowDeep(("2",), True, 0.5))
    with pytest.raises(Diverged, match="training diverged in"):
        shallow_deep(tiny_model(), tiny_task(), Training(3, batch=8, rate=1e30, optimizer="sgd"), TOGETHER)
    check_settings(ALONE)
    for wrong in ({"confidence": 1.2}, {"confidence": -0.1}, {"lost": 2.0}, {"held": 0.0}, {"held": 1.0}):
        with pytest.raises(BadInput):
            ShallowDeep(**wrong)
