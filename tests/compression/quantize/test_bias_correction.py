"""Bias correction: the mean output error on the calibration data is zero."""

import pytest
import torch
from torch import nn

from netweight.compression.quantize.bias_correction import (
    BiasCorrection,
    bias_correction,
    corrected,
    mean_error,
)
from netweight.core.compressed import Change, Compressed, assemble, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.moments import watched
from netweight.core.plan import Plan
from netweight.core.rewrite import Scale, rewritten
from netweight.core.sites import sites
from netweight.core.task import Data, Task, outputs
from netweight.nn.layers import run
from netweight.testing import check_agree, check_layers, check_runs, check_untouched, tiny_model, tiny_task


def test_mean_error_by_hand():
    error, mean = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, 0.5]])
    assert mean_error(error, mean).tolist() == [4.0, -0.5]
    assert mean_error(error, torch.tensor([[3.0, 0.5], [1.0, 2.0]])).tolist() == [4.0, -2.0]  # two parts


@pytest.mark.parametrize(
    "settings", [BiasCorrection(3), BiasCorrection(4, symmetric=False, group=0)], ids=repr
)
def test_the_mean_error_of_every_layer_is_zero(settings):
    model, task = tiny_model(), tiny_task()
    change = bias_correction(model, task, weighted(model), settings)
    small = assemble(model, change, Plan({}))
    for layer in weighted(model):
        seen: list[torch.Tensor] = []
        with watched(model, [layer], lambda _layer, x, seen=seen: seen.append(x)):
            outputs(model, task.calibration)
        x, module, packed = torch.cat(seen), model.get_submodule(layer), small.model.get_submodule(layer)
        error = packed(x) - module(x)
        uncorrected = run(module, x, packed.weight) - module(x)
        axes = [0, 2, 3] if error.ndim == 4 else [0]
        assert error.mean(axes).abs().max() <= 1e-5 < uncorrected.mean(axes).abs().max()


def test_rewrites_of_a_change_count():
    model, task = tiny_model(), tiny_task()
    (site, _) = sites(model, task.calibration)
    rewrites = [Scale(site.producer, site.consumers, torch.linspace(0.5, 2, 16))]
    after = rewritten(model, rewrites)
    rounded = bias_correction(after, task, ["3"], BiasCorrection(3))
    change = corrected(model, task, Change(rounded.packed, rewrites))
    assert torch.allclose(change.biases["3"], rounded.biases["3"], atol=1e-6)


def normal_images(count: int = 4000) -> tuple[nn.Module, Task]:
    """1 x 1 convolutions whose norms see inputs that are normal, as their statistics say."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 2, 1))
    for tensor in (model[0].weight.data, model[0].bias.data, model[2].weight.data):
        tensor.copy_(torch.randn(tensor.shape, generator=g))
    data = Data(torch.randn(count, 4, 2, 2, generator=g))
    return model.eval(), Task(data, data)


def test_without_data_the_shift_is_the_one_measured():
    model, task = normal_images()
    free, measured = (
        bias_correction(model, task, ["2", "3"], BiasCorrection(3, data_free=way)) for way in (True, False)
    )
    assert set(free.biases) == {"2"} and set(measured.biases) == {"2", "3"}  # no norm tells of what 3 reads
    error = (free.packed["2"].decode() - model[2].weight.detach()).abs().max()
    assert torch.allclose(free.biases["2"], measured.biases["2"], atol=0.05 * float(error))
    assert not torch.allclose(free.biases["2"], model[2].bias.detach(), atol=0.05 * float(error))
    blind = Task(Data(torch.zeros(2, 4, 2, 2)), task.test)  # of the data only the shape counts
    assert torch.equal(
        free.biases["2"], bias_correction(model, blind, ["2"], BiasCorrection(3, data_free=True)).biases["2"]
    )


def test_without_data_scales_between_norm_and_layer_count():
    model, task = normal_images()
    scale = Scale("0", ("2",), torch.tensor([0.5, 2.0, 4.0, 1.0]))
    after = rewritten(model, [scale])
    rounded = bias_correction(after, task, ["2"], BiasCorrection(3, data_free=True))
    change = corrected(model, task, Change(rounded.packed, [scale]), data_free=True)
    assert torch.allclose(change.biases["2"], rounded.biases["2"], atol=1e-6)

    class Other:
        def apply(self, model: nn.Module) -> None:
            """Change nothing."""

    with pytest.raises(DoesNotFit, match="^Other: "):
        corrected(model, task, Change(rounded.packed, [Other()]), data_free=True)


def test_laws():
    model, task = tiny_model(), tiny_task()
    layers, settings = weighted(model), BiasCorrection(4, group=0)
    change = check_untouched(bias_correction, model, task, layers, settings)
    check_agree(change, bias_correction(model, task.blind(), layers, settings))
    check_layers(change, layers)
    check_runs(assemble(model, change, Plan({})), model, task.calibration)


def test_saved_and_loaded(tmp_path):
    model, task = tiny_model(), tiny_task()
    small = assemble(
        model, bias_correction(model, task, weighted(model), BiasCorrection(4, group=0)), Plan({})
    )
    small.save(tmp_path / "small")
    back = Compressed.load(tmp_path / "small", like=tiny_model(seed=1))
    assert torch.equal(back.model(task.test.x), small.model(task.test.x))
    assert isinstance(back.model[3].like.bias, nn.Parameter)  # a layer that had none


def test_nan_is_left_and_nonsense_is_refused():
    model = tiny_model()
    nn.init.constant_(model[9].weight, float("nan"))
    change = bias_correction(model, tiny_task(), ["7", "9"], BiasCorrection())
    assert set(change.packed) == set(change.biases) == {"7"} and "NaN" in change.left["9"]
    with pytest.raises(ValueError, match="bits=1"):
        BiasCorrection(bits=1)
