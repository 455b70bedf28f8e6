"""Guided self-distillation: its loss by the paper's two terms, the weight by hand, stages that resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.pipeline import compare
from netweight.testing import tiny_model, tiny_task
from netweight.training import loop
from netweight.training.chance import restarted
from netweight.training.checkpoint import Checkpoint
from netweight.training.guided_self_distillation import (
    GuidedSelfDistillation,
    again,
    distilled,
    estimated,
    fitted,
    guided_self_distillation,
    mix,
    norms,
    one_hot,
    parted,
    probabilities,
)
from netweight.training.settings import Training
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=8, rate=0.01)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4))


def points(count: int = 12, seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    return Data(torch.randn(count, 3, generator=g), torch.randint(4, (count,), generator=g))


def test_a_step_follows_the_two_terms_of_the_paper():
    """One step of plain SGD on alpha mse(p, y) + (1 - alpha) mse(p, q) + lambda sum |theta|, by hand."""
    data, teacher, alpha, penalty = points(), restarted(linear(), 5), 0.3, 0.2
    how = Training(epochs=1, batch=12, rate=0.1, optimizer="sgd", seed=7)
    trained, losses = again(linear(), data, teacher, alpha, how, penalty)

    net = restarted(linear(), 7)
    p, q = net(data.x).softmax(-1), teacher(data.x).softmax(-1).detach()
    y = F.one_hot(data.y, 4).float()
    punished = penalty * sum(theta.norm() for theta in net.parameters())
    loss = alpha * F.mse_loss(p, y) + (1 - alpha) * F.mse_loss(p, q) + punished
    loss.backward()
    for theta, found in zip(net.parameters(), trained.parameters()):
        assert torch.allclose(theta - 0.1 * theta.grad, found, atol=1e-6)
    left_out = alpha * (1 - alpha) * F.mse_loss(y, q)
    assert losses[0] == pytest.approx((loss - left_out).item(), rel=1e-5)


def test_norms_are_not_squared_and_zeros_do_no_harm():
    model = linear()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].bias.zero_()
    assert norms(model).item() == pytest.approx(2 * 12**0.5)
    norms(model).backward()
    assert (model[0].bias.grad == 0).all()
    model[0].weight.requires_grad_(False)
    assert norms(model).item() == 0


def test_targets_by_hand():
    truth, taught = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    assert mix(truth, taught, 0.75).tolist() == [[0.875, 0.125]]
    assert one_hot(Data(torch.zeros(2, 1), torch.tensor([[0, 1], [1, 1]])), 2).tolist() == [
        [[1, 0], [0, 1]],
        [[0, 1], [0, 1]],
    ]


def test_steps_are_the_trainings_that_the_docstring_says():
    """The first step by labels, then alpha = 0, the weight by least squares, and the step itself."""
    data, held = points(), points(9, seed=1)
    found = distilled(linear(), data, held, HOW, GuidedSelfDistillation(steps=3))
    assert [step.trainings for step in found] == [1, 2, 2]
    first = fitted(linear(), data, one_hot(data, 4), HOW, 1e-4)[0]
    assert same(first, found[0].model)
    for number in (1, 2):
        now = Training(epochs=3, batch=8, rate=0.01, seed=number)
        alone = again(linear(), data, found[number - 1].model, 0.0, now, 1e-4)[0]
        raw = estimated(first, alone, held)
        u, v = probabilities(first, held), probabilities(alone, held)
        y = F.one_hot(held.y, 4)
        assert raw == pytest.approx((((y - v) * (u - v)).sum() / (u - v).square().sum()).item(), rel=1e-4)
        assert found[number].raw == raw
        assert found[number].weight == min(1.0, max(0.0, raw))
        wanted = again(linear(), data, found[number - 1].model, found[number].weight, now, 1e-4)[0]
        assert same(wanted, found[number].model)


def test_a_given_weight_holds_nothing_out_and_trains_once_a_step():
    model, task = tiny_model(), tiny_task()
    before = copy.deepcopy(model)
    trained = guided_self_distillation(model, task.blind(), HOW, GuidedSelfDistillation(2, weight=0.25))
    assert same(model, before)
    assert trained.notes == {"weights": [1.0, 0.25], "raw": [1.0, 0.25], "trainings": 2, "held": 0}
    found = distilled(model, task.train, None, HOW, GuidedSelfDistillation(2, weight=0.25))
    assert same(found[-1].model, trained.model)
    assert found[-1].losses == trained.losses
    assert not same(
        found[-1].model, distilled(model, task.train, None, HOW, GuidedSelfDistillation(2, 0.5))[-1].model
    )


def test_what_is_held_out_is_not_trained_on():
    data = points(20)
    rest, held = parted(data, 0.25, 3)
    assert (len(rest), len(held)) == (15, 5)
    rows = {tuple(row) for row in data.x.tolist()}
    assert {tuple(row) for row in rest.x.tolist()} | {tuple(row) for row in held.x.tolist()} == rows
    place = {tuple(row): int(label) for row, label in zip(data.x.tolist(), data.y)}
    assert all(place[tuple(row)] == int(label) for row, label in zip(held.x.tolist(), held.y))
    assert not torch.equal(held.x, parted(data, 0.25, 4)[1].x)
    trained = guided_self_distillation(linear(), Task(data, data), HOW, GuidedSelfDistillation(2))
    rest, held = parted(data, 0.25, HOW.seed)
    assert trained.notes["held"] == 5
    assert same(trained.model, distilled(linear(), rest, held, HOW, GuidedSelfDistillation(2))[-1].model)


def test_stopped_and_resumed_gives_the_same(tmp_path, monkeypatch):
    data, settings = points(40), GuidedSelfDistillation(steps=3)
    task = Task(data, data)
    whole = guided_self_distillation(linear(), task, HOW, settings)
    real, stored = loop.store, []

    def stops(path, what, run):
        real(path, what, run)
        stored.append(path.name)
        if len(stored) == 8:  # in the middle of the third training
            raise KeyboardInterrupt

    keep = Checkpoint(tmp_path / "run.pt", resume=True)
    monkeypatch.setattr(loop, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        guided_self_distillation(linear(), task, HOW, settings, keep=keep)
    assert set(stored) == {"run.pt.part-1", "run.pt.part-2-alone", "run.pt.part-2"}
    monkeypatch.setattr(loop, "store", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        guided_self_distillation(linear(), task, HOW, GuidedSelfDistillation(3, penalty=0.1), keep=keep)
    trained = guided_self_distillation(linear(), task, HOW, settings, keep=keep)
    assert trained.losses == whole.losses
    assert trained.notes == whole.notes
    assert same(trained.model, whole.model)


def test_the_network_flows_on(tmp_path):
    model, task = tiny_model(), tiny_task()
    trained = guided_self_distillation(model, task.blind(), HOW, GuidedSelfDistillation(2))
    small = trained.network()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(outputs(back.model, task.test), outputs(trained.model, task.test))
    proof = compare(model, back, task, within=Linf(0.01))
    assert {row.question for row in proof.rows} >= {"average", "worst found", "worst possible"}
    x = task.test.x[:2]
    box = bounds(back.plain(), x, Linf(0.01))
    assert (box.lower <= back.model(x) + 1e-4).all()
    assert (back.model(x) <= box.upper + 1e-4).all()
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from netweight.deployment.onnx import export

    export(back, tmp_path / "net.onnx", x)
    assert (tmp_path / "net.onnx").exists()


def test_tokens_are_taught_place_by_place():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.table(x))

    x = torch.randint(5, (16, 4), generator=torch.Generator().manual_seed(0))
    trained = guided_self_distillation(Words(), Task(Data(x, x), Data(x, x)), HOW, GuidedSelfDistillation(2))
    assert trained.model(x).shape == (16, 4, 5)


def test_bad_input():
    data = points()
    for options, sentence in (
        ({"steps": 0}, "steps=0"),
        ({"weight": 1.5}, "weight=1.5: the labels weigh"),
        ({"held": 0.0}, "held=0.0"),
        ({"held": 1.0}, "held=1.0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"penalty": float("nan")}, "penalty=nan"),
    ):
        with pytest.raises(BadInput, match=sentence):
            GuidedSelfDistillation(**options)
    bare = Data(data.x)
    with pytest.raises(DoesNotFit, match="class numbers"):
        guided_self_distillation(linear(), Task(bare, bare), HOW)
    with pytest.raises(DoesNotFit, match="class numbers"):
        one_hot(bare, 4)
    few = Data(data.x[:1], data.y[:1])
    with pytest.raises(DoesNotFit, match="of 1 examples a share of 0.25 cannot be held out"):
        guided_self_distillation(linear(), Task(few, few), HOW)
    with pytest.raises(DoesNotFit, match="estimated on held-out examples"):
        distilled(linear(), data, None, HOW, GuidedSelfDistillation(2))
    assert data.y is not None
    wide = Data(data.x, data.y + 3)
    with pytest.raises(DoesNotFit, match="labels 3 to 6, but the network has 4 outputs"):
        guided_self_distillation(linear(), Task(wide, wide), HOW)
