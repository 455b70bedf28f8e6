"""Every rerun gives what the whole network gives with that weight in its place."""

import copy

import pytest
import torch
from torch import nn

from netweight.core import reruns as module
from netweight.core.compressed import weight_of, weighted
from netweight.core.reruns import graph_of, reruns
from netweight.models.resnet_cifar import ResNet
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task


class Branches(nn.Module):
    """A layer that is called twice, one beside the main path, one that is never called, one whose weight is
    halved on the way (a constant computed from it), and a choice."""

    def __init__(self, choice=False):
        super().__init__()
        self.twice, self.side, self.end = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.unused, self.halved, self.choice = nn.Linear(4, 4), nn.Linear(4, 4), choice

    def forward(self, x):
        if self.choice and x.sum() > 0:
            x = x - 1
        beside = self.side(x) + nn.functional.linear(x, self.halved.weight / 2)
        return self.end(self.twice(torch.relu(self.twice(x))) * 2 + beside)


def variants(model):
    def make(layer):
        weight = weight_of(model, layer)
        return [weight, torch.zeros_like(weight), weight * (weight > 0)]

    return make


def check(model, x, layers):
    before = copy.deepcopy(model.state_dict())
    seen = []
    graph = graph_of(model, x)
    assert (graph is None) == getattr(model, "choice", False)
    for layer, index, y in reruns(model, graph, x, layers, variants(model)):
        other = copy.deepcopy(model).eval()
        with torch.no_grad():
            other.get_submodule(layer).weight.copy_(variants(model)(layer)[index])
            expected = other(x)
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5), (layer, index)
        seen.append((layer, index))
    assert sorted(seen) == sorted((layer, index) for layer in layers for index in range(3))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("choice", [False, True], ids=["graph", "whole"])
def test_branches_and_a_network_without_a_graph(choice, monkeypatch):
    torch.manual_seed(0)
    model, whole, real = Branches(choice), [], module._as_a_whole
    monkeypatch.setattr(module, "_as_a_whole", lambda *how: whole.extend(how[2]) or real(*how))
    check(model, torch.randn(5, 4), ["end", "halved", "side", "twice", "unused"])
    assert whole == (["end", "halved", "side", "twice", "unused"] if choice else ["unused"])


def test_networks_of_ours():
    check(tiny_model(), tiny_task().calibration.x, weighted(tiny_model()))
    text = tiny_language_model()
    check(text, tiny_text_task().calibration.x, ["embedding", *weighted(text)])


def test_residual_network():
    torch.manual_seed(0)
    model = ResNet(1).eval()
    check(model, torch.rand(2, 3, 8, 8), ["conv1", "layer1.0.conv2", "layer3.0.conv1", "linear"])


def test_what_lies_before_a_layer_runs_once(monkeypatch):
    calls = []
    real = module.call
    monkeypatch.setattr(
        module, "call", lambda node, params: calls.append((node.op, node.layer)) or real(node, params)
    )
    model = tiny_model()
    x = tiny_task().calibration.x
    list(reruns(model, graph_of(model, x), x, ["9", "7"], variants(model)))
    count = [sum(call == ("aten.convolution", name) for call in calls) for name in ("0", "3")]
    assert count == [1, 1] and sum(layer == "7" for _, layer in calls) == 3 + 1  # 3 weights, then on to "9"
