"""Passport layers: plain batch norms with another source of scale and shift."""

import copy

import pytest
import torch
from torch import nn

from netweight.core.errors import DoesNotFit
from netweight.nn.passport import InsertPassports, Passport, drawn, folded
from netweight.testing import tiny_model

PAIRS = InsertPassports(("0", "3"), ("1", "4"), 5)


def passported() -> nn.Sequential:
    model = tiny_model()
    PAIRS.apply(model)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_with_its_passports_it_is_a_plain_batch_norm(training):
    model = passported().train(training)
    plain = tiny_model().train(training)
    for layer, norm in zip(PAIRS.layers, PAIRS.norms):
        W, p = plain.get_submodule(layer).weight.flatten(1), model.get_submodule(layer).passports
        own = plain.get_submodule(norm)
        own.weight, own.bias = nn.Parameter(W @ p[:, 0]), nn.Parameter(W @ p[:, 1])
    x = torch.rand(6, 4, 7, 7)
    flat = folded(model)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert not any(isinstance(module, Passport) for module in flat.modules())
    plain, model = tiny_model(), passported()
    assert torch.allclose(folded(model)(x), model(x), atol=1e-5)
    assert not torch.allclose(plain(x), model(x), atol=1e-2)


def test_the_scale_is_the_mean_of_the_convolution_with_the_whole_passport():
    layer = nn.Conv2d(3, 5, 3, bias=False)
    P = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    patches = nn.functional.unfold(P, 3).mean(2)[0]  # the mean patch
    place = Passport(layer, nn.BatchNorm2d(5), torch.stack([patches, -patches], 1))
    gamma, beta = place.affine()
    assert torch.allclose(gamma, layer(P).mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(beta, -gamma)


def test_weights_are_trained_through_scale_and_shift():
    place = Passport(nn.Linear(4, 3), nn.BatchNorm1d(3), drawn(4, torch.Generator().manual_seed(0)))
    assert [name for name, _ in place.named_parameters()] == ["layer.weight", "layer.bias"]
    (gradient,) = torch.autograd.grad(place.affine()[0].sum(), place.layer.weight)
    assert torch.allclose(gradient, place.passports[:, 0].expand(3, 4))
    assert place(torch.randn(5, 4)).shape == (5, 3)


def test_inserting_twice_changes_nothing_and_the_seed_decides():
    model = passported()
    other = tiny_model()
    InsertPassports(PAIRS.layers, PAIRS.norms, 6).apply(other)
    before = copy.deepcopy(model.state_dict())
    InsertPassports(PAIRS.layers, PAIRS.norms, 7).apply(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(model[0].passports, other[0].passports)
    assert model[0].passports.abs().max() <= 1 and not torch.equal(*model[0].passports.T)
    assert isinstance(model[1], nn.Identity)


def test_other_modules_take_no_passport():
    with pytest.raises(DoesNotFit, match="7, 8: a Linear and a ReLU take no passport"):
        InsertPassports(("7",), ("8",), 0).apply(tiny_model())
