"""Networks that skip blocks: the definition example by example, both ends of the limit, attacks, training."""

import copy

import pytest
import torch
from torch import nn

from netweight.attacks.deepsloth import deepsloth
from netweight.attacks.early import early
from netweight.attacks.routed import routed
from netweight.core.compressed import Compressed, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.nn.dynamic import Taken, dynamic_of
from netweight.nn.skipping import AddGates, Gate, Skipping
from netweight.testing import check_settings, tiny_language_model, tiny_text_task
from netweight.training import skipnet as method
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Moment, Training
from netweight.training.skipnet import SkipNet, gated, priced, skipnet
from netweight.verification.bounds import bounds

HOW = Training(3, batch=8, rate=0.01, seed=3)
SETTINGS = SkipNet(cost=0.5)


def residual() -> nn.Sequential:
    """Vectors of 6 to 3 classes: two parts keep their shape, one does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [nn.Linear(6, 5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3)]
        return nn.Sequential(*parts).eval()


def vectors(count: int = 40) -> Data:
    x = torch.rand(count, 6, generator=torch.Generator().manual_seed(0))
    return Data(x, (x[:, 0] * 3).long().clamp(max=2), 10, "vectors", low=0.0, high=1.0)


def gates() -> Skipping:
    """With gates about whose limit the examples lie."""
    model = residual()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AddGates(("1", "3"), (5, 5)).apply(model)
        net = dynamic_of(model)
        h = net.parts[0](vectors().x)
        for index in (1, 3):
            gate = net.gates[str(index)]
            nn.init.normal_(gate.linear.weight)
            with torch.no_grad():
                gate.linear.bias -= gate(h).median()
                h = net.parts[2](net.parts[1](h))
    return net


def by_hand(net: Skipping, row: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """One example, block by block."""
    h, ran = row[None], []
    for index, part in enumerate(net.parts):
        if str(index) in net.gates:
            ran.append(bool(net.gates[str(index)](h).sigmoid() >= net.limit))
            h = part(h) if ran[-1] else h
        else:
            h = part(h)
    return h[0], ran


def test_routed_is_the_definition_and_a_block_sees_only_who_runs_it():
    net, x, seen = gates(), vectors().x, []
    wanted = [by_hand(net, row) for row in x]
    net.parts[1].register_forward_pre_hook(lambda part, given: seen.append(len(given[0])))
    routed_ = net.route(x)
    assert torch.allclose(routed_.logits, torch.stack([z for z, _ in wanted]), atol=1e-6)
    assert routed_.ran.tolist() == [ran for _, ran in wanted] and seen == [int(routed_.ran[:, 0].sum())]
    shares = routed_.ran.float().mean(0)
    assert (shares > 0).all() and (shares < 1).all()
    logits, g = net.soft(x)
    assert torch.allclose(logits, routed_.logits, atol=1e-6) and torch.equal(g.round().bool(), routed_.ran)
    slope = torch.autograd.grad(g[:, 0].sum(), net.gates["1"].linear.bias)[0]
    p = net.gates["1"](net.parts[0](x)).sigmoid()
    assert slope.item() == pytest.approx((p * (1 - p)).sum().item(), rel=1e-5)


def test_limit_0_runs_everything_1_nothing_and_more_is_skipped_in_between():
    net, x, before = gates(), vectors().x, None
    for limit in (0.0, 0.3, 0.5, 0.7, 1.0):
        net.skip_below(limit)
        first = net.route(x).ran[:, 0]
        assert before is None or (first <= before).all()
        before = first
        if limit == 0.0:
            assert torch.equal(Taken(net)(x), net(x)) and net.route(x).ran.all()
    assert not net.route(x).ran.any()
    assert torch.equal(Taken(net)(x), net.parts[4](net.parts[2](net.parts[0](x))))
    images = Gate(3)(torch.rand(2, 3, 4, 5))
    assert images.shape == (2,)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match="from 0 to 1"):
            net.skip_below(wrong)


def test_a_sloth_opens_the_gates_and_the_way_taken_is_attacked():
    net, data = gates(), vectors()
    whole = net.route(data.x).ran.all(1)
    assert torch.equal(whole, ~net.decisions(data.x).saves.any(1)) and 0 < whole.float().mean() < 1
    assert (net.decisions(data.x).effort <= 0).all()
    for eps, least in ((0.1, 0.0), (1.0, 0.9)):
        within = Linf(eps, 0, 1)
        found = deepsloth(net, data.x, None, within, steps=30)
        assert within.contains(found.points, data.x).all() and found.hit.float().mean() >= least
        assert torch.equal(found.hit, net.route(found.points).ran.all(1))
        assert found.hit.sum() > whole.sum()
        wrong = routed(net, data.x, None, within, steps=10)
        left = Taken(net)(wrong.points).argmax(1) != Taken(net)(data.x).argmax(1)
        assert torch.equal(wrong.hit, left)
    with pytest.raises(DoesNotFit, match="Skipping: the early attack is on early exits"):
        early(net, data.x, None, Linf(0.1))


# Training -------------------------------------------------------------------------------------------------


def test_a_cost_closes_gates_and_none_leaves_them_open():
    data = vectors()
    task = Task(data, data)
    free, dear = (skipnet(residual(), task.blind(), HOW, SkipNet(cost=cost)) for cost in (0.0, 50.0))
    assert free.notes["blocks"] == dear.notes["blocks"] == ("1", "3")
    assert free.notes["run"] == (1.0, 1.0)
    longer = skipnet(residual(), task, Training(25, batch=8, rate=0.03, seed=3), SkipNet(cost=50.0))
    assert max(longer.notes["run"]) < 0.1 and free.losses[-1] < free.losses[0]
    logits, g = torch.zeros(2, 3), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    at = Moment(0, 0, 1, torch.Generator())
    value = priced(0.4)(lambda x: (logits, g), torch.zeros(2), torch.tensor([0, 1]), at)
    assert value.item() == pytest.approx(torch.tensor(3.0).log().item() + 0.3)


def test_stopped_and_resumed_gives_the_same_numbers(tmp_path, monkeypatch):
    data, place, calls = vectors(), tmp_path / "state", []
    task, model = Task(data, data), residual()
    before = copy.deepcopy(model.state_dict())
    wanted, whole = skipnet(model, task, HOW, SETTINGS), method.train
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def stopping(model, data, loss, how, **rest):
        def stops(*given):
            calls.append(1)
            if len(calls) > 7:
                raise KeyboardInterrupt
            return loss(*given)

        return whole(model, data, stops, how, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "train", stopping)
        skipnet(model, task, HOW, SETTINGS, keep=Checkpoint(place))
    found = skipnet(model, task, HOW, SETTINGS, keep=Checkpoint(place, resume=True))
    assert found.losses == wanted.losses and torch.equal(
        outputs(found.model, data), outputs(wanted.model, data)
    )
    with pytest.raises(BadInput, match="other weights, data or settings"):
        skipnet(model, task, HOW, SkipNet(cost=0.4), keep=Checkpoint(place, resume=True))


def test_flows_on(tmp_path):
    data, model = vectors(), residual()
    small = skipnet(model, Task(data, data), HOW, SETTINGS).network()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(Taken(dynamic_of(back.model))(data.x), Taken(dynamic_of(small.model))(data.x))
    assert len(weighted(small.model)) == len(weighted(model)) == 4
    x = data.x[:2]
    proven = bounds(small.plain(), x, Linf(0.01))
    assert (proven.lower <= small.model(x)).all() and (small.model(x) <= proven.upper).all()


def test_what_does_not_fit():
    data = vectors()
    task = Task(data, data)
    assert gated(residual(), data.x[:1], ("3",)) == AddGates(("3",), (5,))
    with pytest.raises(DoesNotFit, match="0: a block that can be skipped has weights and keeps the shape"):
        skipnet(residual(), task, HOW, SkipNet(("0",)))
    with pytest.raises(DoesNotFit, match="no part with weights keeps the shape"):
        skipnet(nn.Sequential(nn.Linear(6, 3)), task, HOW)
    with pytest.raises(DoesNotFit, match="the parts of an nn.Sequential"):
        skipnet(nn.Linear(6, 3), task, HOW)
    with pytest.raises(DoesNotFit):
        skipnet(tiny_language_model(), tiny_text_task(), HOW)
    with pytest.raises(DoesNotFit, match="has these parts"):
        AddGates(("9",), (5,)).apply(residual())
    with pytest.raises(BadInput, match="gates of parts that exist"):
        Skipping([nn.Identity()], {1: Gate(3)})
    check_settings(SETTINGS)
    for wrong in ({"cost": -1.0}, {"limit": 1.5}, {"cost": float("nan")}):
        with pytest.raises(BadInput):
            SkipNet(**wrong)
    for blocks, channels in (((), ()), (("1",), ()), (("1",), (0,))):
        with pytest.raises(BadInput, match="the channels of each block"):
            AddGates(blocks, channels)
