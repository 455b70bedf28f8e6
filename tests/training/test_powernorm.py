"""Networks with power norms: trained, resumed, saved, compared, bounded and exported."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.nn.power_norm import PowerNorm
from netweight.pipeline import compare
from netweight.testing import TinyLanguageModel, tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.training import loop
from netweight.training.checkpoint import Checkpoint
from netweight.training.powernorm import PowerNorms, cross_entropy, powernorm, warmup_of
from netweight.training.settings import Training
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=8, rate=0.01)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def norms(model: nn.Module) -> list[PowerNorm]:
    return [module for module in model.modules() if isinstance(module, PowerNorm)]


def test_all_norms_are_replaced_and_the_model_stays():
    model, task = tiny_language_model(), tiny_text_task()
    before = copy.deepcopy(model)
    trained = powernorm(model, task.blind(), HOW, PowerNorms(groups=4, forward_decay=0.5, backward_decay=0.6))
    assert same(model, before)
    assert trained.notes == {"norms": ["norm", "norm2"], "warmup": 1}
    found = [
        (n.kind, n.warmup, n.scale.groups, n.forward_decay, n.backward_decay) for n in norms(trained.model)
    ]
    assert found == [("pn", 1, 4, 0.5, 0.6)] * 2
    assert all(int(norm.step) == 6 for norm in norms(trained.model))
    assert trained.losses[-1] < trained.losses[0]
    one = powernorm(model, task, HOW, PowerNorms(norms=("norm2",), warmup=2))
    assert one.notes == {"norms": ["norm2"], "warmup": 2}
    assert isinstance(one.model.norm, nn.LayerNorm)


def test_warm_up_is_as_long_as_the_rate_rises():
    assert warmup_of(Training(epochs=3, warmup=0.5), 10) == 5
    assert warmup_of(Training(epochs=3), 10) == 3
    assert warmup_of(Training(epochs=1), 1) == 1


def test_stopped_and_resumed_gives_the_same(tmp_path, monkeypatch):
    model, task = tiny_language_model(), tiny_text_task()
    whole = powernorm(model, task, HOW)
    real = loop.store

    def stops(path, what, run):
        real(path, what, run)
        if len(run.losses) == 2:
            raise KeyboardInterrupt

    keep = Checkpoint(tmp_path / "run.pt", resume=True)
    monkeypatch.setattr(loop, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        powernorm(model, task, HOW, keep=keep)
    monkeypatch.setattr(loop, "store", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        powernorm(model, task, HOW, PowerNorms("pn-v"), keep=keep)
    trained = powernorm(model, task, HOW, keep=keep)
    assert trained.losses == whole.losses
    assert same(trained.model, whole.model)


def padding_task(count: int) -> Task:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(1, 12, (8, 6), generator=g) for _ in range(2))
    x = torch.cat([x, torch.zeros(8, count, dtype=torch.int64)], 1)
    y = torch.cat([y, torch.full((8, count), 3)], 1)
    return Task(Data(x, y), Data(x, y))


def test_padding_is_neither_counted_nor_learnt():
    class Words(nn.Module):  # without attention, so that padding has no other way in
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(12, 6), nn.LayerNorm(6), nn.Linear(6, 12)

        def forward(self, x):
            return self.head(self.norm(self.table(x)))

    torch.manual_seed(0)
    model = Words()
    how = Training(epochs=4, batch=8, rate=0.05, optimizer="sgd")
    some, none = (powernorm(model, padding_task(count), how, PowerNorms(padding=0)).model for count in (5, 0))
    for a, b in zip(some.state_dict().values(), none.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-5)
    counted = powernorm(model, padding_task(5), how).model
    assert not torch.allclose(counted.norm.power, none.norm.power, atol=1e-3)


def test_the_loss_is_the_mean_over_tokens():
    g = torch.Generator().manual_seed(0)
    scores, y = torch.randn(2, 3, 4, generator=g), torch.tensor([[0, 1, -100], [3, -100, 2]])
    wanted = -scores.log_softmax(-1)[[0, 0, 1, 1], [0, 1, 0, 2], [0, 1, 3, 2]].mean()
    assert torch.allclose(cross_entropy(scores, y), wanted)
    assert torch.allclose(
        cross_entropy(scores[0], y[1].abs() % 4), F.cross_entropy(scores[0], y[1].abs() % 4)
    )


@pytest.mark.parametrize("kind", ["images", "text"])
def test_the_network_flows_on(tmp_path, kind):
    model, task = (
        (tiny_model(), tiny_task()) if kind == "images" else (tiny_language_model(), tiny_text_task())
    )
    trained = powernorm(model, task.blind(), HOW)
    small = trained.network()
    assert same(small.model, trained.model)
    small.save(tmp_path / "small")
    bare = tiny_model(1) if kind == "images" else TinyLanguageModel()
    back = Compressed.load(tmp_path / "small", like=bare)
    assert torch.equal(outputs(back.model, task.test), outputs(trained.model, task.test))
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from netweight.deployment.onnx import export

    x = task.test.x[:2]
    export(back, tmp_path / "net.onnx", x)
    assert (tmp_path / "net.onnx").exists()
    if kind == "images":
        proof = compare(model, back, task, within=Linf(0.01))
        assert {row.question for row in proof.rows} >= {"average", "worst found", "worst possible"}
        box = bounds(back.plain(), x, Linf(0.01))
        assert (box.lower <= back.model(x) + 1e-4).all()
        assert (back.model(x) <= box.upper + 1e-4).all()


def test_bad_input():
    model, task = tiny_language_model(), tiny_text_task()
    for options, sentence in (
        ({"kind": "bn"}, "unknown kind of power norm 'bn'"),
        ({"groups": -1}, "groups=-1"),
        ({"warmup": 0}, "warmup=0: at least one step"),
    ):
        with pytest.raises(BadInput, match=sentence):
            PowerNorms(**options)
    with pytest.raises(DoesNotFit, match="groups=3: layer scale takes groups that divide the 16"):
        powernorm(model, task, HOW, PowerNorms(groups=3))
    with pytest.raises(BadInput, match="unknown norm 'norm3'; did you mean 'norm'"):
        powernorm(model, task, HOW, PowerNorms(norms=("norm3",)))
    with pytest.raises(DoesNotFit, match="head: a Linear is no norm"):
        powernorm(model, task, HOW, PowerNorms(norms=("head",)))
    with pytest.raises(DoesNotFit, match="it has no norm to replace"):
        powernorm(nn.Sequential(nn.Linear(2, 2)), task, HOW)
    bare = Data(task.test.x)
    with pytest.raises(DoesNotFit, match="class numbers"):
        powernorm(model, Task(bare, bare), HOW)
    flat = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    one = Data(torch.randn(3, 3), torch.tensor([0, 1, 2]))
    with pytest.raises(DoesNotFit, match="at least two tokens; give a larger batch"):
        powernorm(flat, Task(one, one), Training(epochs=1, batch=1))
