"""AdvStyle: where style layers go, what they learn, that they are gone afterwards, and runs that stop."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from netweight import pipeline
from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task
from netweight.deployment import exports
from netweight.models.digits_cnn import architecture
from netweight.models.resnet_cifar import ResNet
from netweight.models.wide_resnet import wide_resnet
from netweight.nn import style
from netweight.testing import check_settings, tiny_language_model, tiny_model, tiny_task, tiny_text_task
from netweight.training import advstyle as module
from netweight.training.advstyle import (
    AdvStyle,
    advstyle,
    features,
    groups,
    in_company,
    insert,
    layer_for,
    learnt,
    stages,
    take_out,
)
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Diverged, Training, train
from netweight.training.trained import loss
from netweight.verification.bounds import bounds

HOW = Training(3, batch=8, rate=0.02, optimizer="sgd", decay=0.1)


def same(a: nn.Module, b: nn.Module) -> bool:
    state = b.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())


def images(channels: int = 1, side: int = 8, count: int = 4) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def pooled(*end: nn.Module) -> nn.Sequential:
    """Two stages and an end."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), *end,
    )  # fmt: skip


class Mean(nn.Module):
    """A network whose mean over the image is no part of it, with features in a Sequential of their own."""

    def __init__(self, classifies: bool) -> None:
        super().__init__()
        self.features, self.classifier = pooled(), nn.Linear(6, 3) if classifies else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.features(x).mean((2, 3))
        return found if self.classifier is None else self.classifier(found)


@pytest.mark.parametrize(
    ("model", "x", "wanted"),
    [
        (architecture(), images(), ("3", "6")),
        (tiny_model(), images(4, 7), ("2", "5")),
        (ResNet(1), images(3, 32), ("bn1", "layer1", "layer2")),
        (wide_resnet(10, 1), images(3, 32), ("conv1",)),
        (pooled(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), images(), ("3",)),
        (pooled(nn.AvgPool2d(4), nn.Flatten()), images(), ("3",)),
        (pooled(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)), images(), ("3", "6")),
        (pooled(nn.Flatten(), nn.Linear(96, 3)), images(), ("3", "5")),
        (Mean(True), images(), ("features.3",)),
        (Mean(False), images(), ("features.3",)),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten()), torch.rand(3, 2, 9), ("1",)),
        (nn.Sequential(nn.Conv3d(1, 2, 3, groups=1), nn.Flatten()), torch.rand(3, 1, 4, 4, 5), ("0",)),
        (nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.Conv2d(4, 4, 2), nn.Flatten()), images(), ("0",)),
    ],
)
def test_layers_stand_behind_stages_but_not_before_the_mean(model, x, wanted):
    before = copy.deepcopy(model.state_dict())
    assert stages(model, x) == wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(part._forward_hooks for part in model.modules())


def test_layers_go_in_and_out_again_even_within_each_other():
    model, x = ResNet(1).eval(), images(3, 32)
    names = ("layer1", "conv1", "layer1.0", "layer1.0.bn1")
    network = copy.deepcopy(model)
    layers = {name: layer_for(out, AdvStyle()) for name, out in features(model, names, x).items()}
    insert(network, layers)
    network.eval()
    assert torch.equal(network(x), model(x)) and len(learnt(network)) == 4
    ran = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    network(x)
    assert ran == ["conv1", "layer1.0.bn1", "layer1.0", "layer1"]
    take_out(network, names)
    assert [*network.state_dict()] == [*model.state_dict()] and torch.equal(network(x), model(x))


def test_spreads_begin_with_the_first_batch_as_the_network_trains_on_it():
    model, x = tiny_model(), tiny_task().train.x
    found = features(model, ["1"], x)["1"]
    norm = nn.functional.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, True)
    torch.testing.assert_close(found, norm.detach())
    layer = layer_for(found, AdvStyle(k=3.0))
    wanted = style.spread_of(style.style_of(found))
    assert torch.equal(layer.mean_spread, wanted.mean.flatten()) and layer.k == 3 and layer.begun
    assert layer_for(found, AdvStyle("dsu", p=0.2)).p == 0.2
    mixes = layer_for(found, AdvStyle("mixstyle", p=0.3, alpha=0.4))
    assert (mixes.p, mixes.alpha) == (0.3, 0.4)


def test_every_parameter_is_in_one_group_and_spreads_are_not_decayed():
    model, x = tiny_model(), tiny_task().train.x
    insert(model, {name: layer_for(out, AdvStyle()) for name, out in features(model, ("2", "5"), x).items()})
    rest, spreads = groups(model)
    assert spreads["weight_decay"] == 0.0 and [p.shape for p in spreads["params"]] == [(16,)] * 4
    ids = [id(p) for group in (rest, spreads) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and "weight_decay" not in rest
    assert "factor" not in spreads


@pytest.mark.parametrize("kind", module.KINDS)
def test_what_comes_out_is_the_network_with_other_weights(kind):
    model, data = tiny_model(), tiny_task()
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (advstyle(model, data.blind(), HOW, AdvStyle(kind)) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert first.losses == second.losses and first.notes == second.notes and same(first.model, second.model)
    assert [(n, type(m)) for n, m in first.model.named_modules()] == [
        (n, type(m)) for n, m in model.named_modules()
    ]
    assert not first.model.training and len(first.losses) == 3 and not same(first.model, model)
    assert first.notes["where"] == ([] if kind == "none" else ["2", "5"])
    check_settings(AdvStyle(kind))
    assert ("spreads" in first.notes) == (kind == "advstyle") and json.dumps(first.notes)


def test_kinds_and_strengths_differ_and_none_is_plain_training():
    task = tiny_task()
    found = {
        (kind, k): advstyle(tiny_model(), task, HOW, AdvStyle(kind, k)).losses
        for kind, k in (("none", 1.0), ("dsu", 1.0), ("mixstyle", 1.0), ("advstyle", 1.0), ("advstyle", 20.0))
    }
    assert len(set(found.values())) == 5
    plain = tiny_model()
    assert train(plain, task.train, loss, HOW) == found["none", 1.0]


def test_spreads_grow_against_the_loss_and_shrink_with_it():
    how = Training(8, batch=8, rate=0.02, optimizer="sgd")
    x = tiny_task().train.x
    y = (x[:, 0].mean((1, 2)) > 0.5).long() + 2 * (x[:, 1, :3].mean((1, 2)) > 0.5).long()
    task = Task(Data(x, y), Data(x, y))
    grown, held, shrunk = (
        advstyle(tiny_model(), task, how, AdvStyle(k=k)).notes["spreads"]["2"] for k in (1.0, 0.0, -1.0)
    )
    assert grown["mean"][-1] > 1.05 * grown["mean"][0] and len(grown["mean"]) == 8
    assert shrunk["mean"][-1] < 0.95 * shrunk["mean"][0]
    assert set(held["mean"]) == {held["mean"][0]} and len(set(held["deviation"])) == 1
    assert grown["deviation"] != grown["mean"]


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    place, settings = tmp_path / "run.pt", AdvStyle(k=2.0)
    whole = advstyle(tiny_model(), tiny_task(), HOW, settings)
    real, calls = module.loss, iter(range(100))

    def stops(*args):
        if next(calls) == 9:  # in the third epoch
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        advstyle(tiny_model(), tiny_task(), HOW, settings, keep=Checkpoint(place))
    monkeypatch.setattr(module, "loss", real)
    resumed = Checkpoint(place, resume=True)
    for other in (AdvStyle(k=3.0), AdvStyle("dsu"), AdvStyle(where=("2",))):
        with pytest.raises(BadInput, match="of other weights, data or settings"):
            advstyle(tiny_model(), tiny_task(), HOW, other, keep=resumed)
    with pytest.raises(BadInput, match="of other weights, data or settings"):
        advstyle(tiny_model(1), tiny_task(), HOW, settings, keep=resumed)
    again = advstyle(tiny_model(), tiny_task(), HOW, settings, keep=resumed)
    assert again.losses == whole.losses and again.notes == whole.notes and same(again.model, whole.model)


def test_the_last_example_of_an_epoch_has_company():
    order = in_company(33, 8)(torch.Generator().manual_seed(0))
    assert [len(rows) for rows in order] == [8, 8, 8, 9]
    assert sorted(torch.cat(list(order)).tolist()) == list(range(33))
    assert [len(rows) for rows in in_company(34, 8)(torch.Generator())] == [8, 8, 8, 8, 2]
    task = tiny_task()
    odd = Task(task.calibration, task.test, train=task.train.take(17))
    assert math.isfinite(advstyle(tiny_model(), odd, HOW, AdvStyle("dsu", p=1.0)).losses[-1])


def test_the_network_flows_on(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).eval()
    x = torch.rand(24, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    data = Data(x, torch.arange(24) % 3, low=0.0, high=1.0)
    given = Task(data.take(8), data.take(8), train=data)
    small = advstyle(model, given, Training(1, batch=8, optimizer="sgd")).network()
    small.save(tmp_path / "small")
    loaded = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(loaded(x), small(x)) and torch.equal(small.plain()(x), small(x))
    rows = pipeline.compare(model, loaded, given, within=Linf(0.01)).rows
    assert {"average", "worst found", "worst possible"} <= {row.question for row in rows}
    proven = bounds(loaded.plain(), x[:4], Linf(0.01))
    assert (proven.lower <= small(x[:4])).all() and (small(x[:4]) <= proven.upper).all()
    pytest.importorskip("onnxruntime")
    assert exports.export(loaded, given, "onnx", tmp_path / "model.onnx")["same"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: AdvStyle("advstyl"), BadInput, "unknown kind of style layer 'advstyl'; did you"),
        (lambda: AdvStyle(k=math.inf), BadInput, "k=inf: the strength is a finite number"),
        (lambda: AdvStyle(p=1.1), BadInput, "p=1.1"),
        (lambda: AdvStyle(alpha=0.0), BadInput, "alpha=0.0"),
        (
            lambda: advstyle(tiny_model(), tiny_task(), Training(1, batch=1)),
            BadInput,
            "batch=1 of 32 examples: styles vary over two examples or more",
        ),
        (
            lambda: advstyle(tiny_model(), Task(tiny_task().train.take(1), tiny_task().test), HOW),
            BadInput,
            "batch=8 of 1 examples",
        ),
        (
            lambda: advstyle(tiny_model(), Task(Data(torch.rand(4, 4, 7, 7)), tiny_task().test), HOW),
            DoesNotFit,
            "training needs examples with class numbers",
        ),
        (
            lambda: advstyle(nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), tiny_task(), HOW),
            DoesNotFit,
            "Sequential: it has no convolutional stage .* name the parts .* as where",
        ),
        (
            lambda: advstyle(tiny_language_model(), tiny_text_task(), HOW),
            DoesNotFit,
            "TinyLanguageModel: it has no convolutional stage",
        ),
        (
            lambda: advstyle(tiny_model(), tiny_task(), HOW, AdvStyle(where=("22",))),
            DoesNotFit,
            "22: no such part to change styles behind",
        ),
        (
            lambda: advstyle(tiny_model(), tiny_task(), HOW, AdvStyle(where=("",))),
            DoesNotFit,
            "the whole network: no such part",
        ),
        (
            lambda: advstyle(tiny_model(), tiny_task(), HOW, AdvStyle("dsu", where=("2", "7"))),
            DoesNotFit,
            "7: what it gives has no style",
        ),
        (
            lambda: advstyle(tiny_model(), tiny_task(), Training(4, 8, 1e30, optimizer="sgd"), AdvStyle()),
            Diverged,
            "training diverged in epoch 1",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_said(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_a_part_that_is_not_run_is_named():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside, self.head = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3), nn.Linear(75, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.used(x).flatten(1))

    assert stages(Aside(), tiny_task().train.x) == ("used",)
    with pytest.raises(DoesNotFit, match="aside: this part is not run by itself"):
        advstyle(Aside(), tiny_task(), HOW, AdvStyle(where=("aside",)))
