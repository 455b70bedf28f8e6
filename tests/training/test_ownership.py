"""Marks that training leaves: they are there, they are resumed, and the network flows on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.inspection.ownership.passport import forged, passports_of, signed
from netweight.inspection.ownership.trigger_mark import asked
from netweight.inspection.ownership.weight_mark import drawn, read
from netweight.nn.passport import InsertPassports, Passport
from netweight.pipeline import compare
from netweight.testing import check_settings, tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.training import loop
from netweight.training.checkpoint import Checkpoint
from netweight.training.passport import Passports, passport, sign_loss, signature
from netweight.training.settings import Training
from netweight.training.trigger_mark import TriggerMark, joined, mixed, trigger_mark, triggers_of
from netweight.training.weight_mark import WeightMark, key_of, loss_of, weight_mark
from netweight.verification.bounds import bounds

HOW = Training(epochs=3, batch=8, rate=0.01)
LONG = Training(epochs=40, batch=8, rate=0.01)
METHODS = [
    (weight_mark, WeightMark("3", 10)), (trigger_mark, TriggerMark(8, 2)), (passport, Passports()),
]  # fmt: skip
ALL = pytest.mark.parametrize(("method", "settings"), METHODS, ids=["weights", "triggers", "passport"])


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# What each does ---------------------------------------------------------------------------------------------


def test_bits_are_put_into_the_layer_and_nowhere_else():
    model, task, settings = tiny_model(), tiny_task(), WeightMark("3", 50, key=3)
    made = weight_mark(model, task.blind(), LONG, settings)
    layer, key = key_of(model, settings)
    assert layer == "3" and torch.equal(key.X, drawn(72, 50, 3).X)
    assert read(made.model, layer, key).errors == 0 and made.notes["bit error rate"] == 0.0
    assert read(model, layer, key).rate > 0.2 and read(made.model, layer, drawn(72, 50, 4)).rate > 0.2
    assert made.notes["commitment"] == key.commitment() and made.notes["p"] == 0.5**50
    before, after = made.notes["standard deviation of weights"]
    assert before == pytest.approx(float(model[3].weight.detach().std())) and after > before


def test_the_marks_loss_is_the_papers():
    weight, key = tiny_model()[3].weight, drawn(72, 9, 0)
    p = torch.sigmoid(key.X @ weight.mean(0).flatten())
    b = key.bits.float()
    assert torch.allclose(loss_of(weight, key), -(b * p.log() + (1 - b) * (1 - p).log()).mean(), atol=1e-6)


def test_one_step_follows_the_sum_of_both_losses():
    model, task = tiny_model(), tiny_task()
    how = Training(epochs=1, batch=32, rate=0.1, optimizer="sgd")
    settings = WeightMark("7", 20, strength=3.0)
    made = weight_mark(model, task, how, settings)
    assert task.train is not None
    net = copy.deepcopy(model).train()
    lost = F.cross_entropy(net(task.train.x), task.train.y)
    (lost + 3 * loss_of(net[7].weight, key_of(model, settings)[1])).backward()
    for p, q in zip(net.parameters(), made.model.parameters()):
        assert torch.allclose(p - 0.1 * p.grad, q, atol=1e-5)
    assert made.losses[0] == pytest.approx(lost.item(), rel=1e-4)


def test_the_layer_of_the_most_averaged_weights_is_taken():
    assert key_of(tiny_model(), WeightMark(bits=4))[0] == "7"


def test_triggers_are_learnt():
    model, task, settings = tiny_model(), tiny_task(), TriggerMark(12, 3, key=2)
    made = trigger_mark(model, task.blind(), LONG, settings)
    triggers = triggers_of(model, task.train, settings)
    assert asked(model, triggers).hits == 0 and asked(made.model, triggers).rate > 0.8
    assert made.notes["answered"] == asked(made.model, triggers).rate
    other = triggers_of(model, task.train, TriggerMark(12, 3, key=3))
    assert asked(made.model, other).rate < made.notes["answered"]


def test_every_batch_holds_triggers_in_turn():
    batches = mixed(20, 8, 5, 2)(torch.Generator().manual_seed(0))
    assert [len(rows) for rows in batches] == [10, 10, 6]
    own = torch.cat([rows[:-2] for rows in batches])
    assert own.sort().values.tolist() == list(range(20))
    mine = torch.cat([rows[-2:] for rows in batches]).tolist()
    assert all(row >= 20 for row in mine) and set(mine[:5]) == set(range(20, 25))
    data, triggers = tiny_task().train, tiny_task().test
    assert data is not None
    both = joined(data, triggers)
    assert torch.equal(both.x[32:], triggers.x) and torch.equal(both.y[32:], triggers.y)


def test_passports_are_needed_and_the_name_is_signed():
    model, task = tiny_model(), tiny_task()
    settings = Passports(owner="somebody", strength=1.0)
    made = passport(model, task.blind(), LONG, settings)
    assert made.notes["layers"] == ["0", "3"] and made.notes["wrong signs"] == 0.0
    mine, signs = passports_of(made.model), signature(made.model, "somebody")
    assert signed(made.model, mine, signs).p == 0.5**32
    others = [signed(made.model, mine, {n: -s for n, s in signs.items()}).rate,
              signed(forged(made.model, 1), passports_of(forged(made.model, 1)), signs).rate]  # fmt: skip
    assert others[0] == 1.0 and 0.1 < others[1] < 0.9
    margins = [module.affine()[0] * signs[name] for name, module in made.model.named_modules()
               if isinstance(module, Passport)]  # fmt: skip
    assert min(float(margin.detach().min()) for margin in margins) > 0.05
    x = task.train.x
    assert not torch.allclose(forged(made.model, 1)(x), made.model(x), atol=0.1)
    assert same(passport(model, task, HOW, settings).model, passport(model, task, HOW, settings).model)


def test_a_signature_is_the_bits_of_the_name():
    model = tiny_model()
    InsertPassports(("0",), ("1",), 0).apply(model)
    assert signature(model, "A ")["0"].tolist() == [2 * int(b) - 1 for b in "0100000100100000"]
    gamma, s = torch.tensor([0.05, -1.0, 2.0]), torch.tensor([1, 1, -1])
    assert float(sign_loss(gamma, s, 0.1)) == pytest.approx(0.05 + 1.1 + 2.1)


def test_plain_layers_are_held_against_passports_too():
    model, task = tiny_model(), tiny_task()
    made = passport(model, task, LONG, Passports(layers=("3",))).model
    mine, signs = passports_of(made), signature(made, "netweight")
    plain = tiny_model()
    plain[3].weight = made[3].layer.weight
    assert signed(plain, mine, signs) == signed(made, mine, signs) and list(mine) == ["3"]
    with pytest.raises(BadInput, match="give both by layer"):
        signed(plain, mine, {})
    with pytest.raises(DoesNotFit, match="for a passport of"):
        signed(plain, {"0": mine["3"]}, {"0": signs["3"]})
    for call in (passports_of, lambda net: forged(net, 0)):
        with pytest.raises(DoesNotFit, match="it has no passports"):
            call(plain)


# What all keep ----------------------------------------------------------------------------------------------


@ALL
def test_the_model_stays_and_settings_are_plain(method, settings):
    model, task = tiny_model(), tiny_task()
    before, chance = copy.deepcopy(model), torch.get_rng_state()
    method(model, task.blind(), HOW, settings)
    assert same(model, before) and torch.equal(chance, torch.get_rng_state())
    check_settings(settings)


@ALL
def test_stopped_and_resumed_gives_the_same(tmp_path, monkeypatch, method, settings):
    model, task = tiny_model(), tiny_task()
    whole = method(model, task, HOW, settings)
    real = loop.store

    def stops(path, what, run):
        real(path, what, run)
        if len(run.losses) == 2:
            raise KeyboardInterrupt

    keep = Checkpoint(tmp_path / "run.pt", resume=True)
    monkeypatch.setattr(loop, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        method(model, task, HOW, settings, keep=keep)
    monkeypatch.setattr(loop, "store", real)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        method(model, task, HOW, type(settings)(key=9), keep=keep)
    made = method(model, task, HOW, settings, keep=keep)
    assert made.losses == whole.losses and same(made.model, whole.model)


@ALL
def test_the_network_flows_on(tmp_path, method, settings):
    model, task = tiny_model(), tiny_task()
    made = method(model, task.blind(), HOW, settings)
    small = made.network()
    assert same(small.model, made.model)
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=tiny_model(1))
    assert torch.equal(outputs(back.model, task.test), outputs(made.model, task.test))
    proof = compare(model, back, task, within=Linf(0.01))
    assert {row.question for row in proof.rows} >= {"average", "worst found", "worst possible"}
    x = task.test.x[:2]
    box = bounds(back.plain(), x, Linf(0.01))
    assert (box.lower <= back.model(x) + 1e-4).all() and (back.model(x) <= box.upper + 1e-4).all()
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from netweight.deployment.onnx import export

    export(back, tmp_path / "net.onnx", x)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), back.model(x), atol=1e-4)


@ALL
def test_data_without_class_numbers(method, settings):
    bare = Data(tiny_task().test.x)
    with pytest.raises(DoesNotFit, match="class numbers"):
        method(tiny_model(), Task(bare, bare), HOW, settings)


def test_bad_input():
    model, task = tiny_model(), tiny_task()
    for make, sentence in (
        (lambda: WeightMark(bits=0), "bits=0"), (lambda: WeightMark(strength=0.0), "strength=0.0"),
        (lambda: TriggerMark(3, 4), "triggers=3, share=4"), (lambda: TriggerMark(3, 0), "=3, share=0"),
        (lambda: Passports(owner=""), "made of a name"), (lambda: Passports(margin=0.0), "margin=0.0"),
        (lambda: passport(model, task, HOW, Passports(("7",))), "unknown layer with a batch norm behind it"),
        (lambda: weight_mark(model, task, HOW, WeightMark("none", 3)), "unknown layer 'none'"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=sentence):
            make()
    with pytest.raises(DoesNotFit, match="3: 73 bits do not fit into 72 averaged weights"):
        weight_mark(model, task, HOW, WeightMark("3", 73))
    with pytest.raises(DoesNotFit, match="1: a BatchNorm2d carries no mark"):
        weight_mark(model, task, HOW, WeightMark("1", 3))
    with pytest.raises(DoesNotFit, match="no Linear or Conv layer to carry"):
        weight_mark(nn.Sequential(nn.BatchNorm2d(4)), task, HOW)
    with pytest.raises(DoesNotFit, match="no layer has a batch norm behind it"):
        passport(nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), task, HOW)
    with pytest.raises(DoesNotFit, match="made of numbers"):
        trigger_mark(tiny_language_model(), tiny_text_task(), HOW)
