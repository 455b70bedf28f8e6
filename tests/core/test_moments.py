"""Moments of layer inputs against slow definitions; what is kept, forgotten and refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.compressed import weighted
from netweight.core.errors import DoesNotFit
from netweight.core.moments import moments, patches, watched
from netweight.core.task import Data
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task

LAYERS = {
    "line": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "dilated": (nn.Conv2d(3, 4, (2, 3), dilation=(2, 1), padding=(1, 0)), (3, 7, 6)),
    "volume": (nn.Conv3d(2, 2, 2, groups=2, bias=False), (2, 3, 4, 3)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "reflect": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 6)),
    "linear": (nn.Linear(5, 3), (5,)),
    "tokens": (nn.Linear(5, 3), (4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_the_weight_are_the_outputs(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = patches(layer, x)
    groups, n, d = rows.shape
    outputs = rows @ layer.weight.reshape(groups, -1, d).mT  # groups n out
    expected = layer(x) - (
        0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (layer.weight.ndim - 2))
    )
    if not isinstance(layer, nn.Linear):
        expected = expected.movedim(1, -1)
    expected = expected.reshape(n, groups, -1).transpose(0, 1)
    assert torch.allclose(outputs, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_their_definitions(name, monkeypatch):
    monkeypatch.setattr("netweight.core.moments.AT_ONCE", 200)  # a few examples at a time
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer.float())
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(1))
    seen = moments(model, Data(x, batch=3), ["0"])["0"]
    rows = patches(layer, x).double()
    assert seen.positions == rows.shape[1] / 7
    assert (
        torch.allclose(seen.gram, rows.mT @ rows / 7, rtol=1e-4, atol=1e-5)
        and seen.gram.dtype == torch.float64
    )
    assert torch.allclose(seen.mean, rows.mean(1), atol=1e-5)
    channels = x.reshape(7, -1, 5).transpose(1, 2) if isinstance(layer, nn.Linear) else x.flatten(2)
    assert torch.allclose(seen.magnitude, channels.abs().mean((0, 2)).double(), atol=1e-5)
    assert torch.allclose(seen.largest, channels.abs().amax((0, 2)).double())
    assert (seen.low, seen.high) == (float(x.min()), float(x.max()))
    change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    other = nn.Sequential(layer)[0]
    moved = F.linear(x, change) if isinstance(layer, nn.Linear) else other._conv_forward(x, change, None)
    assert seen.error(change) == pytest.approx(float(moved.square().sum()) / 7, rel=1e-3)


def test_images_without_a_batch_axis_are_one_example():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x):
            return torch.stack([self.conv(image) for image in x])

    model, x = Alone(), torch.rand(4, 2, 5, 5)
    one, together = (
        moments(model, Data(x), ["conv"])["conv"],
        moments(nn.Sequential(model.conv), Data(x), ["0"])["0"],
    )
    assert one.positions == together.positions and torch.allclose(one.gram, together.gram)
    assert torch.allclose(one.magnitude, together.magnitude) and torch.equal(one.largest, together.largest)


def test_half_precision_does_not_overflow():
    model = nn.Sequential(nn.Linear(2, 2).half())
    assert moments(model, Data(torch.full((4, 2), 300.0).half()), ["0"])["0"].gram[0, 0, 0] == 90000


def test_the_model_is_left_as_it_was_and_runs_in_evaluation_mode():
    model, task = tiny_model().train(), tiny_task()
    model[4].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    moments(model, task.calibration, weighted(model))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [m.training for m in model] == [index != 4 for index in range(10)] and model.training
    assert not any(m._forward_pre_hooks for m in model)
    with pytest.raises(RuntimeError, match="stop"), watched(model, ["7"], lambda *_: None):
        raise RuntimeError("stop")
    assert model[0].training and not model[7]._forward_pre_hooks


def test_moments_are_kept_until_the_model_changes():
    model, task = tiny_model(), tiny_task()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    first = moments(model, task.calibration, ["7"])["7"]
    batches = len(calls)
    assert moments(model, task.calibration, ["7"])["7"] is first and len(calls) == batches == 3
    moments(model, task.calibration, ["7", "9"])
    assert len(calls) == 2 * batches  # one more pass, for the layer that is new
    with torch.no_grad():
        model[0].weight.mul_(2)
    changed = moments(model, task.calibration, ["7"])["7"]
    assert not torch.allclose(changed.gram, first.gram)
    assert not torch.allclose(moments(tiny_model(1), task.calibration, ["7"])["7"].gram, first.gram)
    assert torch.equal(moments(tiny_model(), task.calibration, ["7"])["7"].gram, first.gram)


def test_a_layer_used_twice_counts_both_uses():
    line = nn.Linear(3, 3)
    model = nn.Sequential(line, nn.ReLU(), line)
    seen = moments(model, Data(torch.rand(5, 3)), ["0"])["0"]
    assert seen.positions == 2


def test_layers_without_a_matrix_or_a_call_are_refused_by_name():
    with pytest.raises(DoesNotFit, match="^embedding: a Embedding has no matrix of inputs"):
        moments(tiny_language_model(), tiny_text_task().calibration, ["embedding"])
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].unused = nn.Linear(4, 4)
    with pytest.raises(DoesNotFit, match="^0.unused: the layer is never called"):
        moments(model, Data(torch.rand(2, 4)), ["0.unused"])


def test_layers_that_read_one_tensor_share_its_moments_unless_it_changes_in_between():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 3, bias=False) for _ in range(3))

        def forward(self, x):
            x = x * 1.0
            y = self.a(x) + self.b(x)
            return y + self.c(x.add_(1.0))  # the same memory, other values

    data = Data(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), batch=4)
    seen = moments(Shared().eval(), data, ["a", "b", "c"])
    plain = data.x.double().T @ data.x.double() / 10
    moved = (data.x + 1).double().T @ (data.x + 1).double() / 10
    torch.testing.assert_close(seen["a"].gram[0], plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen["a"].gram, seen["b"].gram) and seen["a"].gram is not seen["b"].gram
    torch.testing.assert_close(seen["c"].gram[0], moved, rtol=1e-5, atol=1e-5)


def test_large_gram_matrices_are_those_of_all_products():
    layer = nn.Linear(301, 2)
    data = Data(torch.randn(7, 301, generator=torch.Generator().manual_seed(0)), batch=3)
    gram = moments(nn.Sequential(layer).eval(), data, ["0"])["0"].gram[0]
    torch.testing.assert_close(gram, data.x.double().T @ data.x.double() / 7, rtol=1e-5, atol=1e-5)
    assert torch.equal(gram, gram.T)
