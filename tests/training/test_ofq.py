"""OFQ: what is rounded and how, annealing to the bit, and the network that goes on from here."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.deployment import exports
from netweight.models.digits_vit import VisionTransformer
from netweight.nn.distillation import Teacher
from netweight.nn.oscillation import Oscillations
from netweight.nn.qk_attention import Attention, QKAttention, uncertain
from netweight.nn.quantized import quantized
from netweight.nn.quantizer import FromMean, Learnt, Levels
from netweight.nn.shifted import Shifted
from netweight.testing import check_settings, tiny_model, tiny_task
from netweight.training import ofq as module
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Diverged, Moment, Training, train
from netweight.training.ofq import OFQ, groups, guided, judged, layers_of, lsq, ofq, rounded, rounded_weights
from netweight.verification.bounds import bounds

HOW = Training(3, batch=8, rate=2e-3, optimizer="adamw", decay=0.1)
SHORT = OFQ(annealed=0.34, near=0.05)


def vit() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(size=4, patch=2, width=8, depth=1, heads=2, ratio=2, classes=3).eval()


def task() -> Task:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    x = torch.rand(24, 1, 4, 4, generator=g) / 2
    x[torch.arange(24), 0, y] += 0.5
    data = Data(x, y, 8, "rows", low=0.0, high=1.0)
    return Task(data.take(8), data.take(8), train=data)


def test_every_rounding_in_its_place():
    network = rounded(vit(), task().train.x, OFQ(2, 3))
    own = network.blocks[0].attention
    assert isinstance(own, QKAttention) and isinstance(own.product.weight_rounding, FromMean)
    assert own.turned.steps == (5, 2) and own.turned.before.shape == (2, 8)
    assert (own.entry.steps, own.values.steps, own.values.axis, own.shares.steps) == ((5,), (8,), -1, (5,))
    assert own.shares.before is None and own.shares.levels == Levels.unsigned(3)
    assert {own.entry.levels, own.turned.levels, own.values.levels} == {Levels.signed(3)}
    layers = quantized(network)
    ends = {"patches", "head"}
    assert {*layers} == ends | {"blocks.0.up", "blocks.0.down"} | {
        f"blocks.0.attention.{n}" for n in ("value", "output")
    }
    for name, layer in layers.items():
        assert isinstance(layer.weight_rounding, Learnt if name in ends else FromMean)
        assert layer.weight_rounding.levels == (Levels.signed(8) if name in ends else Levels.mid_rise(2))
    assert layers["blocks.0.attention.value"].input_rounding is None  # rounded at the entry
    assert isinstance(layers["blocks.0.up"].input_rounding, Shifted)
    assert layers["blocks.0.down"].input_rounding.levels == Levels.unsigned(3)  # behind GELU
    assert layers["blocks.0.attention.output"].input_rounding.levels == Levels.signed(3)
    assert [*rounded_weights(network)][-1] == "blocks.0.attention.product"
    apart = rounded(vit(), task().train.x, OFQ(2, joined=False, edges=0))
    assert isinstance(apart.blocks[0].attention, Attention) and not ends & {*quantized(apart)}
    assert isinstance(apart.blocks[0].attention.keys, Shifted)
    assert isinstance(quantized(apart)["blocks.0.attention.key"].weight_rounding, FromMean)
    part = rounded(vit(), task().train.x, OFQ(layers=("blocks.0.attention.query", "blocks.0.up")))
    assert isinstance(part.blocks[0].attention.keys, nn.Identity)
    assert isinstance(quantized(part)["blocks.0.attention.query"].input_rounding, Shifted)
    other = rounded(vit(), task().train.x, OFQ(joined=False), lsq(2))
    assert quantized(other)["blocks.0.up"].weight_rounding.levels == Levels.signed(2)


def test_without_rounding_it_is_the_network():
    fine = OFQ(8, 8)
    network, model, x = rounded(vit(), task().train.x, fine), vit(), task().train.x
    assert (network(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()


def test_the_loss_is_hard_and_soft():
    model, x, y = vit(), task().train.x, task().train.y
    at = Moment(0, 0, 1, torch.Generator())
    p = Teacher(model)(x).softmax(1)
    scores = model(2 * x)
    wanted = F.cross_entropy(scores, y) - (p * scores.log_softmax(1)).sum(1).mean()
    loss = judged(lambda _: model(x))(model, 2 * x, y, at)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert judged(None)(model, x, y, at).item() == pytest.approx(F.cross_entropy(model(x), y).item())


@pytest.mark.parametrize("annealed", [True, False])
def test_certain_weights_stay_to_the_bit_and_the_others_move(annealed):
    network, data = rounded(vit(), task().train.x, SHORT), task().train
    settings = OFQ(annealed=float(annealed), near=0.1)
    watch = Oscillations(rounded_weights(network), 2)
    hooks = guided(network, HOW, settings, watch)
    seen = []

    def before(run, at):
        hooks.before(run, at)
        for layer in quantized(run.model).values():
            if isinstance(layer.weight_rounding, FromMean):
                w = layer.like.weight
                free = uncertain(w, layer.weight_rounding, 0.1)
                seen.append((w, w.detach().clone(), free))
                assert not annealed or not w.grad[~free].any()
        assert run.model.blocks[0].attention.product.held == (0.1 if annealed else None)

    def after(run, at):
        hooks.after(run, at)
        while seen:
            w, was, free = seen.pop()
            stays = w == was
            assert stays[~free].all() if annealed else not stays[~free].any()
            moved.append((~stays[free]).double().mean())

    moved = []
    train(network, data, judged(None), HOW, hooks=replace(hooks, before=before, after=after))
    assert torch.stack([m for m in moved if not m.isnan()]).mean() > 0.9
    assert watch.steps.tolist() == ([0, 9] if annealed else [9, 0])


def test_annealing_is_the_last_share():
    notes = ofq(vit(), task(), HOW, SHORT).notes["per weight and step"]
    assert len(notes) == 2 and notes[1]["changes"] < notes[0]["changes"]
    network = rounded(vit(), task().train.x, SHORT)
    watch = Oscillations({}, 2)
    train(network, task().train, judged(None), HOW, hooks=guided(network, HOW, SHORT, watch))
    assert watch.steps.tolist() == [6, 3]
    decays, rest = groups(network)
    assert rest["weight_decay"] == 0.0 and all(p.ndim > 1 for p in decays["params"])
    assert len(decays["params"]) == 8  # of layers, query and key among them
    assert len(decays["params"]) + len(rest["params"]) == len([*network.parameters()])


def test_the_same_comes_twice_and_what_is_shipped_is_what_was_trained():
    model, data = vit(), task()
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (ofq(model, data.blind(), HOW, SHORT) for _ in range(2))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())
    assert first.losses == second.losses and first.notes == second.notes and json.dumps(first.notes)
    assert first.losses[-1] < first.losses[0]
    network = rounded(model, data.train.x[: HOW.batch], SHORT)
    watch = Oscillations(rounded_weights(network), 2)
    hooks = guided(network, HOW, SHORT, watch)
    losses = train(network, data.train, judged(Teacher(model)), HOW, hooks=hooks)
    assert losses == first.losses and watch.notes() == first.notes
    small = first.network()
    assert torch.allclose(small.model(data.train.x), network(data.train.x), atol=1e-5)
    assert [*small.packed][0] == "blocks.0.attention.product"
    for name, (weight, rounding) in rounded_weights(network).items():
        assert torch.equal(small.packed[name].decode(), rounding(weight).detach())
    assert first.model.blocks[0].attention.query.weight.shape == (8, 8)  # the float network keeps its form
    check_settings(SHORT)


@pytest.mark.parametrize("settings", [OFQ(2, 8), OFQ(2, 4, joined=False)], ids=str)
def test_the_network_flows_on(settings, tmp_path):
    model, data = vit(), task()
    x = data.train.x
    small = ofq(model, data, Training(1, batch=8), settings).network()
    small.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small", like=vit())
    assert torch.equal(loaded(x), small(x)) and torch.equal(small.plain()(x), small(x))
    rows = pipeline.compare(model, loaded, data, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.001))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, data, "onnx", tmp_path / "model.onnx")["same"]


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    place, whole = tmp_path / "run.pt", ofq(vit(), task(), HOW, SHORT)
    real, calls = module.soft, iter(range(100))

    def stops(*args):
        if next(calls) == 7:  # in the third epoch, which anneals
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "soft", stops)
    with pytest.raises(KeyboardInterrupt):
        ofq(vit(), task(), HOW, SHORT, keep=Checkpoint(place))
    monkeypatch.setattr(module, "soft", real)
    resumed = Checkpoint(place, resume=True)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        ofq(vit(), task(), HOW, OFQ(annealed=0.5), keep=resumed)
    again = ofq(vit(), task(), HOW, SHORT, keep=resumed)
    assert again.losses == whole.losses and again.notes == whole.notes
    assert torch.equal(again.network()(task().train.x), whole.network()(task().train.x))


def test_other_networks_are_rounded_too():
    plain = tiny_task()
    x = plain.train.x
    data = Data(x, (x[:, 0].mean((1, 2)) > 0.5).long(), 10, "tiny", low=0.0, high=1.0)
    done = ofq(tiny_model(), Task(data.take(8), plain.test, train=data), Training(2, 8), OFQ(3, 4))
    small = done.network()
    assert {*small.packed} >= {"3", "7"} and small.packed["3"].tables.numel() == 8
    assert outputs(small.model, data).isfinite().all()
    assert layers_of(tiny_model(), OFQ())[0] == ["0", "9"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: OFQ(bits=0), BadInput, "bits=0, inputs=2, edges=8: they take from 1 to 8 bits"),
        (lambda: OFQ(inputs=9), BadInput, "inputs=9"),
        (lambda: OFQ(edges=9), BadInput, "edges=9"),
        (lambda: OFQ(annealed=1.1), BadInput, "annealed=1.1"),
        (lambda: OFQ(near=float("nan")), BadInput, "near=nan"),
        (
            lambda: ofq(vit(), Task(Data(torch.rand(4, 1, 4, 4)), task().test), HOW),
            DoesNotFit,
            "training needs examples with class numbers",
        ),
        (
            lambda: layers_of(nn.Sequential(nn.Linear(2, 2)), OFQ()),
            DoesNotFit,
            "it has no Linear or Conv layer between its first and its last",
        ),
        (lambda: layers_of(tiny_model(), OFQ(layers=("1",))), DoesNotFit, "1: a BatchNorm2d is not rounded"),
        (lambda: layers_of(tiny_model(), OFQ(layers=("nix",))), DoesNotFit, "nix: there is no such layer"),
        (
            lambda: layers_of(nn.TransformerEncoderLayer(8, 2), OFQ()),
            DoesNotFit,
            "self_attn: the values inside a MultiheadAttention cannot be rounded",
        ),
        (lambda: ofq(vit(), task(), Training(2, 8, 1e30, optimizer="sgd")), Diverged, "training diverged"),
    ],
)  # fmt: skip
def test_mistakes_are_said(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
