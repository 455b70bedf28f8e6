"""MixtureGrowth: members that do not touch each other, growth that adds them, ordinary networks after it."""

import copy

import pytest
import torch
from torch import nn

from netweight.core.compressed import Compressed
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Linf
from netweight.core.task import Data, Task, outputs
from netweight.deployment import exports
from netweight.models.resnet_cifar import architecture
from netweight.models.wide_resnet import wide_resnet
from netweight.nn.mixture import Mixed
from netweight.pipeline import compare
from netweight.testing import check_settings, tiny_language_model, tiny_model, tiny_task
from netweight.training import mixture_growth as method
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Training
from netweight.training.mixture_growth import (
    MixtureGrowth,
    folded,
    groups,
    grow,
    mixed_layers,
    mixture_growth,
    side_by_side,
    templates_of,
    train_grown,
    train_member,
    use,
)
from netweight.verification.bounds import bounds

HOW = Training(2, batch=8, rate=0.05, optimizer="sgd", decay=5e-4, seed=3)
SETTINGS = MixtureGrowth(epochs=2)


def members(
    growth: str = "orthogonal", model: nn.Module | None = None, task: Task | None = None
) -> nn.Module:
    """A network of templates with both members trained."""
    net = templates_of(model or tiny_model(), (task or tiny_task()).train, MixtureGrowth(growth=growth), 0)
    for member in (0, 1):
        train_member(net, (task or tiny_task()).train, HOW, member)
    return net


def colours() -> Task:
    x = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = Data(x, torch.arange(24) % 10, 8, "colours", low=0.0, high=1.0)
    return Task(data, data, train=data)


def test_templates_begin_small_where_a_norm_makes_it_good():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 4))
    normed = nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    spreads = [
        mixed_layers(templates_of(model, tiny_task().train, SETTINGS, 0))[0].templates[0].std().item()
        for model in (plain, normed)
    ]
    assert spreads[0] / spreads[1] == pytest.approx(32**0.5)


@pytest.mark.parametrize("kind", ["tiny", "wide"])
def test_without_new_pieces_the_logits_of_both_members_are_added(kind):
    model, task = (tiny_model(), tiny_task()) if kind == "tiny" else (wide_resnet(10, 1), colours())
    net = members("zero", model, task)
    parts = [outputs(folded(net, member), task.test) for member in (0, 1)]
    grow(net, MixtureGrowth(growth="zero"), 0)
    whole = outputs(net, task.test)
    assert torch.allclose(whole, parts[0] + parts[1], atol=1e-5) and not torch.allclose(parts[0], parts[1])
    assert torch.allclose(outputs(folded(net), task.test), whole, atol=1e-6)


def test_new_pieces_change_what_is_added():
    net = members()
    parts = sum(outputs(folded(net, member), tiny_task().test) for member in (0, 1))
    grow(net, SETTINGS, 0)
    assert not torch.allclose(outputs(net, tiny_task().test), parts, atol=1e-3)


def test_training_member_1_leaves_member_0_as_it_is():
    data = tiny_task().train
    net = templates_of(tiny_model(), data, SETTINGS, 0)
    train_member(net, data, HOW, 0)
    before, state = outputs(net, data), copy.deepcopy(net.state_dict())
    train_member(net, data, HOW, 1)
    use(net, 1)
    assert not torch.equal(outputs(net, data), before)
    use(net, 0)
    assert torch.equal(outputs(net, data), before)
    moved = {name for name, t in net.state_dict().items() if not torch.equal(t, state[name])}
    assert moved and all(".1" in name for name in moved)  # templates.1, coefficients.1, biases.1, norms.1


def test_new_coefficients_are_not_trained_before_growth_and_are_after():
    net = templates_of(tiny_model(), tiny_task().train, SETTINGS, 0)
    inner = next(layer for layer in mixed_layers(net) if len(layer.coefficients) == 4)
    rows = [row.detach().clone() for row in inner.coefficients]
    for member in (0, 1):
        train_member(net, tiny_task().train, HOW, member)
    moved = [not torch.equal(a, b) for a, b in zip(rows, inner.coefficients)]
    assert moved == [True, True, False, False]
    grow(net, SETTINGS, 0)
    rows = [p.detach().clone() for p in net.parameters()]
    train_grown(net, tiny_task().train, HOW, SETTINGS)
    moved = [not torch.equal(a, b) for a, b in zip(rows, net.parameters())]
    assert all(moved)


def test_norms_lie_side_by_side_in_order():
    norms = [nn.BatchNorm2d(2), nn.BatchNorm2d(2)]
    for place, norm in enumerate(norms):
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).data.fill_(place + 1.0)
    wide = side_by_side(norms)
    assert wide.num_features == 4 and isinstance(wide.weight, nn.Parameter)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(wide, name).tolist() == [1, 1, 2, 2]
    x = torch.rand(3, 4, 2, 2)
    apart = torch.cat([n.eval()(x[:, 2 * i : 2 * i + 2]) for i, n in enumerate(norms)], 1)
    assert torch.allclose(wide.eval()(x), apart, atol=1e-6)


def test_no_decay_reaches_the_coefficients():
    net = templates_of(tiny_model(), tiny_task().train, SETTINGS, 0)
    rest, mixing = groups(net)
    rows = {id(row) for layer in mixed_layers(net) for row in layer.coefficients}
    assert {id(p) for p in mixing["params"]} == rows and mixing["weight_decay"] == 0
    assert "weight_decay" not in rest and len(rest["params"]) + len(rows) == len([*net.parameters()])


def test_the_result_is_an_ordinary_network_of_full_width():
    model, task = tiny_model(), tiny_task()
    before = copy.deepcopy(model.state_dict())
    found = mixture_growth(model, task.blind(), HOW, SETTINGS)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {n: t.shape for n, t in found.model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert str(found.model) == str(model) and not found.model.training and len(found.losses) == 6
    assert not any(isinstance(layer, Mixed) for layer in found.model.modules())
    inner = sum(len(row) for layer in mixed_layers(members()) for row in layer.coefficients)
    twice = model[9].bias.numel() + model[9].weight.numel() + model[0].weight.numel()
    assert found.notes["parameters"] == sum(p.numel() for p in model.parameters())
    # the ends have 2 sets of 2 templates of half their size; the convolution in groups as well
    extra = inner + twice + model[3].weight.numel()
    assert found.notes["parameters while training"] == found.notes["parameters"] + extra


def test_the_schedule_after_growth_is_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(
        method,
        "train",
        lambda net, data, loss, how, **rest: seen.append((how.epochs, how.rate, how.warmup)) or (),
    )
    how = Training(2, rate=0.05, warmup=1.0)
    mixture_growth(tiny_model(), tiny_task(), how, MixtureGrowth(epochs=7, share=0.1))
    assert seen == [(2, 0.05, 1), (2, 0.05, 1), (7, pytest.approx(0.005), 0)]


def test_the_same_seed_gives_the_same_network_and_another_does_not():
    runs = [
        mixture_growth(tiny_model(), tiny_task(), how, SETTINGS) for how in (HOW, HOW, Training(2, seed=4))
    ]
    x = tiny_task().test
    a, b, c = (outputs(run.model, x) for run in runs)
    assert torch.equal(a, b) and runs[0].losses == runs[1].losses and not torch.equal(a, c)


@pytest.mark.parametrize("stopped_at", [6, 14, 22])  # in member 0, in member 1, after growth
def test_stopped_and_resumed_gives_the_same_numbers(stopped_at, tmp_path, monkeypatch):
    task, place, whole = tiny_task(), tmp_path / "run.pt", method.loss
    wanted, seen = mixture_growth(tiny_model(), task, HOW, SETTINGS), iter(range(100))

    def stops(model, x, y, at):
        if next(seen) == stopped_at:
            raise KeyboardInterrupt
        return whole(model, x, y, at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "loss", stops)
        mixture_growth(tiny_model(), task, HOW, SETTINGS, keep=Checkpoint(place))
    found = mixture_growth(tiny_model(), task, HOW, SETTINGS, keep=Checkpoint(place, resume=True))
    assert found.losses == wanted.losses
    assert torch.equal(outputs(found.model, task.test), outputs(wanted.model, task.test))
    with pytest.raises(BadInput, match="other weights, data or settings"):
        mixture_growth(tiny_model(), task, HOW, MixtureGrowth(epochs=3), keep=Checkpoint(place, resume=True))


def test_flows_on_into_compare_bounds_and_export(tmp_path):
    model, task = tiny_model(), tiny_task()
    small = mixture_growth(model, task, HOW, SETTINGS).network()
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=model)
    assert torch.equal(outputs(back.model, task.test), outputs(small.model, task.test))
    assert compare(model, small, task, within=Linf(0.01))["worst possible"]
    x = task.test.x[:2]
    proven = bounds(small.plain(), x, Linf(0.01))
    assert (proven.lower <= small.model(x)).all() and (small.model(x) <= proven.upper).all()
    assert exports.export(small, task, "onnx", tmp_path / "model.onnx")["same"]


def test_layers_of_one_shape_share_a_bank():
    task, settings = colours(), MixtureGrowth(epochs=1, bank=True)
    model = wide_resnet(10, 1)
    net = templates_of(model, task.train, settings, 0)
    plain = templates_of(model, task.train, SETTINGS, 0)
    count = [sum(p.numel() for p in one.parameters()) for one in (net, plain)]
    assert count[0] < count[1]
    first, last = mixed_layers(net)[0], mixed_layers(net)[-1]
    assert all(
        row.tolist() == [1.0, 1.0] and not row.requires_grad
        for row in (*first.coefficients, *last.coefficients)
    )
    how = Training(1, batch=8, rate=0.01, optimizer="sgd")
    found = mixture_growth(model, task, how, settings)
    assert outputs(found.model, task.test).isfinite().all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 7, 3), nn.Flatten(), nn.Linear(175, 4)), "0: 7 outputs do not"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), "growth needs two Linear or Conv layers"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(200, 4)),
            "1: a GroupNorm does not split in two",
        ),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(4, 8, 3), nn.Linear(4, 4)), "0: 3 channels do"),
    ],
)
def test_networks_that_do_not_split(make, sentence):
    with pytest.raises(DoesNotFit, match=sentence):
        mixture_growth(make(), tiny_task(), HOW, SETTINGS)


def test_widths_written_into_the_code_and_data_without_labels():
    with pytest.raises(DoesNotFit, match="ResNet: it does not run at half its width"):
        mixture_growth(architecture(20), colours(), HOW, SETTINGS)
    with pytest.raises(DoesNotFit, match="embedding: a Embedding does not split"):
        mixture_growth(tiny_language_model(), tiny_task(), HOW, SETTINGS)
    blank = Data(tiny_task().train.x, None, 10, "no labels")
    with pytest.raises(DoesNotFit, match="no labels: training needs examples with class numbers"):
        mixture_growth(tiny_model(), Task(blank, blank), HOW, SETTINGS)
    with pytest.raises(BadInput, match="build the templates again"):
        net = members()
        grow(net, SETTINGS, 0)
        grow(net, SETTINGS, 0)


def test_settings_that_make_no_sense():
    check_settings(SETTINGS)
    for make, sentence in [
        (lambda: MixtureGrowth(epochs=0), "epochs=0, templates=2: give at least one"),
        (lambda: MixtureGrowth(templates=0), "templates=0"),
        (lambda: MixtureGrowth(share=0.0), "share=0.0, noise=1.0: give a share above 0"),
        (lambda: MixtureGrowth(growth="orthogonl"), "did you mean 'orthogonal'"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            make()
