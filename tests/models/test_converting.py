"""The converting autoencoder: shapes, ranges, and a rewrite that is built again from what it says."""

import copy

import pytest
import torch
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.models.converting import Between, Convert, autoencoder
from netweight.testing import tiny_model, tiny_task

CONVERT = Convert("2", (16, 6, 6), 4, 3, (4, 7, 7), (20, 6), 0.0, 1.0)


def test_layers_by_name():
    net = autoencoder((1, 8, 8), (128, 64, 32), 0.0, 1.0)
    sizes = [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(64, 128), (128, 64), (64, 32), (32, 64)]
    assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == 3 and isinstance(net.encoder[-1], nn.ReLU)
    assert net.encoder(torch.rand(2, 1, 8, 8)).shape == (2, 32)


@pytest.mark.parametrize("shape", [(5,), (4, 7, 7), (2, 9)])
def test_outputs_are_valid_inputs(shape):
    net = autoencoder(shape, (8,), -2.0, 3.0)
    with torch.no_grad():
        net.decoder[0].weight *= 100
    found = net(torch.randn(50, *shape))
    assert found.shape == (50, *shape) and -2 <= found.min() < -1.9 and 2.9 < found.max() <= 3
    assert Between(-2.0, 3.0)(torch.zeros(1)).item() == 0.5
    free = autoencoder(shape, (8,), None, None)
    assert not any(isinstance(layer, Between) for layer in free.modules())


def test_the_rewrite_keeps_the_stem_and_happens_once():
    model, x = tiny_model(), tiny_task().test.x
    whole = copy.deepcopy(model)
    CONVERT.apply(whole)
    assert [name for name, _ in whole.named_children()] == [
        "autoencoder",
        "classifier",
    ] and not whole.training
    assert torch.equal(whole.classifier.stem(x), model[:3](x))
    assert torch.equal(whole(x), whole.classifier(whole.autoencoder(x))) and whole(x).shape == (16, 4)
    before = copy.deepcopy(whole.state_dict())
    CONVERT.apply(whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    double = tiny_model().double().train()
    CONVERT.apply(double)
    assert {p.dtype for p in double.parameters()} == {torch.float64} and double.autoencoder.training
    with pytest.raises(DoesNotFit, match="exits lie between the parts"):
        CONVERT.apply(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"widths": ()}, "layers of at least one neuron"),
        ({"width": 0}, "layers of at least one neuron"),
        ({"widths": (20, -1)}, "layers of at least one neuron"),
        ({"widths": (10**9, 10**9)}, "smaller widths"),
        ({"width": 10**12}, "smaller widths"),
    ],
)
def test_sizes_that_make_no_sense(change, sentence):
    with pytest.raises(BadInput, match=sentence):
        Convert(**{**vars(CONVERT), **change})
    with pytest.raises(BadInput, match="with low below high"):
        autoencoder((3,), (2,), 1.0, 1.0)
