"""Networks at several widths: what a batch shows of them, what is packed, and the switch afterwards."""

import copy

import pytest
import torch
from torch import nn

from netweight.core.compressed import Compressed, assemble
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.plan import Plan
from netweight.core.task import outputs
from netweight.nn.double_rounding import DoubleRounded
from netweight.nn.quantized import inner_layers
from netweight.nn.switch_norm import SwitchNorm
from netweight.nn.switchable import (
    Switchable,
    finished,
    layers_of,
    look,
    switchable,
    switched,
    use,
    widths_of,
)
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task

WIDTHS = (8, 4, 2)
TASK = tiny_task()


def trained_like(model: nn.Module, layers, x, **settings) -> tuple[nn.Module, object]:
    """A switchable network in which every set of every norm and every step differs."""
    net, norms = switchable(model, layers, WIDTHS, x, **settings)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, SwitchNorm):
            for norm in module.norms.values():
                norm.running_mean += torch.randn(norm.running_mean.shape, generator=generator) * 0.3
                norm.weight.data *= 1 + torch.rand((), generator=generator)
    return net.eval(), norms


def test_a_batch_shows_order_inputs_and_the_layers_in_front_of_each_norm():
    model = tiny_model()
    seen = look(model, ["0", "3", "7"], TASK.calibration.x[:8])
    assert seen.order == ("0", "3", "7")
    assert seen.norms == {"1": ("0", ""), "4": ("3", "0")}
    assert [seen.inputs[name][1] for name in seen.order] == [False, False, False]  # images, ReLU, ReLU
    assert seen.inputs["0"][0] == pytest.approx(float(TASK.calibration.x[:8].mean()), rel=1e-5)
    assert look(model, ["3"], TASK.calibration.x[:8]).norms == {"4": ("3", "")}  # norm 1 stays as it is
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_steps_begin_at_those_of_the_lowest_width():
    model, x = tiny_model(), TASK.calibration.x[:8]
    net, _ = switchable(model, ["3"], WIDTHS, x)
    layer = layers_of(net)["3"]
    weight = model[3].weight
    assert float(layer.step.detach()) == pytest.approx(2 * float(weight.detach().abs().mean()) / 64, rel=1e-5)
    mean = look(model, ["3"], x).inputs["3"][0]
    assert [float(s.detach()) for s in layer.steps] == pytest.approx(
        [2 * mean / (2**b - 1) ** 0.5 for b in WIDTHS], rel=1e-5
    )
    assert model[3].weight is not layer.like.weight


@pytest.mark.parametrize("pairs", [False, True])
def test_what_is_stored_runs_as_it_was_trained_at_every_width(tmp_path, pairs):
    model, x = tiny_model(), TASK.calibration.x[:8]
    layers = ["0", "3", "7"]
    net, norms = trained_like(model, layers, x, pairs=pairs)
    plain, change = finished(net, norms)
    assemble(plain, change, Plan()).save(tmp_path / "small")
    small = Compressed.load(tmp_path / "small", like=model)  # the bare architecture: norms are made again
    assert widths_of(small) == dict.fromkeys(layers, 8)
    before = outputs(small.model, TASK.test)
    found = []
    for widths in ((8, 8, 8), (4, 4, 4), (2, 2, 2), (2, 8, 4)):
        at = dict(zip(layers, widths))
        use(net, norms, at)
        other = switched(small, at)
        assert widths_of(other) == at
        assert torch.equal(outputs(other.model, TASK.test), outputs(net, TASK.test))
        assert torch.equal(outputs(other.plain(), TASK.test), outputs(net, TASK.test))
        other.save(tmp_path / "other")
        assert torch.equal(
            outputs(Compressed.load(tmp_path / "other", like=model).model, TASK.test), outputs(net, TASK.test)
        )
        found.append(outputs(other.model, TASK.test))
        assert other.bits() == small.bits()
    assert len({float(out.sum()) for out in found}) == 4
    assert torch.equal(outputs(small.model, TASK.test), before)  # `switched` left it alone
    back = switched(other, dict.fromkeys(layers, 8))
    assert torch.equal(outputs(back.model, TASK.test), before)


def test_gradients_reach_weights_steps_and_the_norms_in_use_alone():
    net, norms = switchable(tiny_model(), ["0", "3"], WIDTHS, TASK.calibration.x[:8])
    use(net, norms, {"0": 4, "3": 4})
    net.train()(TASK.calibration.x[:8]).square().sum().backward()
    layer, norm = layers_of(net)["3"], net.get_submodule("4")
    assert layer.like.weight.grad.abs().sum() > 0
    assert layer.step.grad.abs() > 0
    assert [step.grad is not None for step in layer.steps] == [False, True, False]
    assert [norm.norms[key].weight.grad is not None for key in "842"] == [False, True, False]


def test_tokens_are_not_rounded_and_tables_are_treated():
    model, task = tiny_language_model(), tiny_text_task()
    layers = ["embedding", "query", "up"]
    net, norms = switchable(model, layers, WIDTHS, task.calibration.x)
    assert [len(layer.steps) for layer in layers_of(net).values()] == [0, 3, 3]
    assert layers_of(net)["query"].signed  # behind a layer norm
    plain, change = finished(net, norms)
    small = switched(assemble(plain, change, Plan()), dict.fromkeys(layers, 2))
    use(net, norms, dict.fromkeys(layers, 2))
    assert torch.equal(outputs(small.model, task.test), outputs(net, task.test))
    assert len(small.packed["embedding"].decode().unique()) <= 4


def test_inputs_may_stay_as_they_are():
    net, norms = switchable(tiny_model(), ["3"], WIDTHS, TASK.calibration.x[:8], inputs=False)
    _, change = finished(net, norms)
    assert not change.activations
    assert not list(layers_of(net)["3"].steps)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Conv3d(4, 6, 2, padding=1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_layer(layer):
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, 4, *[5] * len(layer.kernel_size))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module = Switchable(copy.deepcopy(layer), WIDTHS, (float(x.abs().mean()), True))
    for width in WIDTHS:
        module.width = width
        form = DoubleRounded.of(layer.weight.detach(), module.step, WIDTHS, width)
        assert torch.equal(form.decode(), module.weight)
        assert module(x).shape == layer(x).shape
    assert (module(x) - layer(x)).abs().mean() > 0


def test_bad_input():
    model, x = tiny_model(), TASK.calibration.x[:8]
    with pytest.raises(DoesNotFit, match="1: a BatchNorm2d is not trained at several widths"):
        switchable(model, ["1"], WIDTHS, x)
    with pytest.raises(ValueError, match="widths go from 8 down to 2"):
        switchable(model, ["0"], (2, 8), x)
    idle = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    idle.forward = lambda x: idle["used"](x)
    with pytest.raises(DoesNotFit, match="idle: the layer does not run"):
        look(idle, ["used", "idle"], torch.rand(2, 3))
    with pytest.raises(BadInput, match="unknown layer 'nine'"):
        switchable(model, ["nine"], WIDTHS, x)
    assert inner_layers(model) == ["3", "7"]
