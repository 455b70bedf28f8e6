"""Blocks are found by shape: residual, transformer, nested in rows, else single layers."""

import pytest
import torch
from torch import nn

from netweight.core.blocks import blocks
from netweight.core.compressed import weighted
from netweight.models.resnet_cifar import architecture
from netweight.testing import tiny_language_model, tiny_model


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_residual_blocks_and_single_layers():
    model = architecture(20)
    found = blocks(model, weighted(model))
    assert list(found) == ["conv1", *(f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3)), "linear"]
    assert found["layer2.0"] == ("layer2.0.conv1", "layer2.0.conv2")
    assert found["conv1"] == ("conv1",)
    assert sorted(name for inside in found.values() for name in inside) == sorted(weighted(model))


def test_only_the_layers_asked_for():
    model = architecture(8)
    assert blocks(model, ["layer1.0.conv2", "linear"]) == {
        "layer1.0.conv2": ("layer1.0.conv2",), "linear": ("linear",),
    }  # fmt: skip


def test_networks_without_rows_are_single_layers():
    for model in (tiny_model(), tiny_language_model()):
        assert blocks(model, weighted(model)) == {name: (name,) for name in weighted(model)}


def test_a_row_in_a_row_and_a_class_that_comes_twice():
    nested = nn.Sequential(nn.Sequential(Part(), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    assert list(blocks(nested, weighted(nested))) == ["0.0", "1.0", "1.1"]
    twice = nn.Module()
    twice.first, twice.second, twice.end = Part(), Part(), nn.Linear(2, 1)
    assert list(blocks(twice, weighted(twice))) == ["first", "second", "end"]
    once = nn.Module()
    once.first, once.end = Part(), nn.Linear(2, 1)
    assert list(blocks(once, weighted(once))) == ["first.one", "first.two", "end"]


def test_decoder_blocks_of_transformers():
    pytest.importorskip("transformers")
    from netweight.models.llama import architecture as llama

    model = llama(quick=True)
    layers = [layer for layer in weighted(model) if ".layers." in layer]
    found = blocks(model, layers)
    assert [name.rpartition(".")[2] for name in found] == ["0", "1"]
    assert all(len(inside) == 7 for inside in found.values())
