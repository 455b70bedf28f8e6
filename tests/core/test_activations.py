"""Activations against hooks and by hand, in whatever way a network is written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.activations import energy
from netweight.core.errors import DoesNotFit
from netweight.models.resnet_cifar import architecture
from netweight.testing import tiny_model


def half_square(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x.square().sum()


def test_modules_against_hooks_with_linear_layers_left_out():
    model, seen = tiny_model(), []
    for place in (2, 5):
        model[place].register_forward_hook(lambda _m, _i, out: seen.append(float(half_square(out.detach()))))
    x = torch.rand(3, 4, 7, 7)
    found = energy(model, x).detach()
    assert found.tolist() == seen
    assert len(found) == 2  # the nonlinearity between the linear layers is no third


class Written(nn.Module):
    """As functions: a norm, a shortcut or a pool before the nonlinearity, one in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.norm, self.gelu = nn.BatchNorm2d(2), nn.GELU()
        self.values = []

    def keep(self, x):
        self.values.append(x.detach().clone())
        return x

    def forward(self, x):
        x = torch.tanh(self.keep(F.relu_(self.norm(self.one(x)))))
        x = self.keep(torch.relu(F.max_pool2d(self.two(x) + x, 2)))
        x = torch.sigmoid(x)  # what has passed one nonlinearity counts no more
        return self.keep(self.gelu(F.conv2d(x, torch.ones(1, 2, 1, 1)))).flatten(1)


def test_functions_shortcuts_in_place_and_pools():
    torch.manual_seed(0)
    model = Written().eval()
    found = energy(model, torch.rand(2, 2, 6, 6)).detach()
    assert len(model.values) == 3
    assert torch.allclose(found, torch.stack([half_square(value) for value in model.values]))


def test_a_residual_network_has_one_for_each_convolution():
    assert len(energy(architecture(20).eval(), torch.rand(1, 3, 32, 32))) == 19


def test_without_convolutions_linear_layers_count_and_without_nonlinearity_nothing_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.rand(5, 4)
    with torch.no_grad():
        assert energy(model, x).tolist() == [float(half_square(torch.tanh(model[0](x))))]
    with pytest.raises(DoesNotFit, match="no nonlinearity follows"):
        energy(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2))


def test_the_gradient_is_that_of_finite_differences():
    model, x = tiny_model().double(), torch.rand(1, 4, 7, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: energy(model, x), x.requires_grad_(), eps=1e-7, atol=1e-4)
