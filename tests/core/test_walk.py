"""One pass that stops at every layer: the matrices of `moments`, those of the changed network, any control
flow, and everything as it was afterwards."""

import threading

import pytest
import torch
from torch import nn

from netweight.core.compressed import weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.core.moments import moments
from netweight.core.task import Data
from netweight.core.walk import PARTS, in_order, walk
from netweight.testing import tiny_language_model, tiny_model, tiny_task, tiny_text_task


def walked(model, data, layers, weight=None):
    """(groups in the order in which they were handed over, H by layer)"""
    groups, grams = [], {}

    def see(some, gram):
        groups.append(some)
        grams.update(dict.fromkeys(some, gram.clone()))

    walk(model, data, layers, see, weight)
    return groups, grams


@pytest.mark.parametrize("batch", [1, 5, 100])
@pytest.mark.parametrize(
    ("model", "data"),
    [(tiny_model(), tiny_task().calibration), (tiny_language_model(), tiny_text_task().calibration)],
    ids=["convolutions", "attention"],
)
def test_without_a_change_the_matrices_are_those_of_moments(model, data, batch):
    layers = [layer for layer in weighted(model) if layer != "embedding"]
    data = data.batched(batch)
    _, grams = walked(model, data, layers)
    assert grams.keys() == set(layers)
    for layer, seen in moments(model, data, layers).items():
        torch.testing.assert_close(grams[layer].double(), seen.gram, rtol=1e-5, atol=1e-6)


def test_layers_come_as_they_are_called_and_those_of_one_tensor_together():
    model, data = tiny_language_model(), tiny_text_task().calibration
    groups, _ = walked(model, data, ["head", "down", "up", "value", "key", "query", "output"])
    assert groups == [("query", "key", "value"), ("output",), ("up",), ("down",), ("head",)]
    asked, often = in_order(model, data.x[:1], ["value", "down"])
    assert (asked, often) == ([("value",), ("down",)], [])


@pytest.mark.parametrize("batch", [2, 24])
def test_a_layer_sees_what_the_changed_layers_before_it_make(batch):
    model, data = tiny_model(), tiny_task().calibration.batched(batch)
    layers = weighted(model)
    twin = tiny_model()
    done = []

    def changed(layer):
        return weight_of(model, layer) * 1.5 if layer in done else None

    def see(some, gram):
        (layer,) = some
        expected = moments(twin, data, [layer])[layer].gram  # the twin is changed up to here
        torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-5)
        done.append(layer)
        twin.get_submodule(layer).weight.data.mul_(1.5)

    walk(model, data, layers, see, changed)
    assert done == layers
    assert all(torch.equal(weight_of(model, layer), weight_of(tiny_model(), layer)) for layer in layers)


class Routed(nn.Module):
    """Each example goes through one of two layers, by the sign of its first value, then all through one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = (nn.Linear(3, 3) for _ in range(3))
        self.never = nn.Linear(3, 3)

    def forward(self, x):
        ways = ((self.a, x[:, 0] <= 0), (self.b, x[:, 0] > 0))
        parts = [(layer(x[keep]), keep) for layer, keep in ways if keep.any()]
        y = torch.zeros_like(x)
        for part, keep in parts:
            y[keep] = part
        return self.last(y)


@pytest.mark.parametrize("sign", [1, -1])
def test_parts_may_take_different_ways(sign):
    model = Routed().eval()
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[:5, 0], x[5:10, 0] = (
        sign * x[:5, 0].abs(),
        -sign * x[5:10, 0].abs(),
    )  # parts that call one of the two alone
    data = Data(x, batch=5)
    groups, grams = walked(model, data, ["a", "b", "last"])
    assert sorted(groups) == [("a",), ("b",), ("last",)] and groups[-1] == ("last",)
    for layer, seen in moments(model, data, ["a", "b", "last"]).items():
        torch.testing.assert_close(grams[layer].double(), seen.gram, rtol=1e-5, atol=1e-6)
    with pytest.raises(DoesNotFit, match="^never: the layer is never called"):
        walked(model, data, ["a", "never"])
    with pytest.raises(DoesNotFit, match="^embedding: a Embedding has no matrix"):
        walked(tiny_language_model(), tiny_text_task().calibration, ["embedding"])


def test_a_layer_called_twice_has_the_matrix_of_the_unchanged_network():
    twice, other = nn.Linear(3, 3), nn.Linear(3, 2)
    model = nn.Sequential(twice, nn.Tanh(), twice, other).eval()
    data = Data(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), batch=4)
    _, grams = walked(
        model, data, ["0", "3"], lambda layer: twice.weight.detach() * 0 if layer == "0" else None
    )
    torch.testing.assert_close(grams["0"], moments(model, data, ["0"])["0"].gram)
    constant = twice(torch.zeros(3)).detach() * 0 + twice.bias.detach()
    torch.testing.assert_close(grams["3"][0], torch.outer(constant, constant))


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(2, 2), nn.Linear(2, 2), []

    def forward(self, x):
        x = self.first(x)
        self.calls.append(len(x))
        if len(x) == 3:
            raise ZeroDivisionError("three")
        return self.last(x)


def test_what_comes_after_the_last_layer_is_not_run_and_parts_are_few():
    model = Counted()
    walked(model, Data(torch.rand(80, 2), batch=1), ["first"])
    assert model.calls == [1]  # to find the order
    walked(model, Data(torch.rand(80, 2), batch=1), ["first", "last"])
    assert model.calls == [1, 1] + [80 // PARTS] * PARTS


def test_an_error_of_the_network_comes_out_and_nothing_stays_behind():
    model, threads = Counted().train(), threading.active_count()
    with pytest.raises(ZeroDivisionError, match="three"):
        walked(model, Data(torch.rand(13, 2), batch=5), ["first", "last"], lambda _: torch.eye(2))
    with pytest.raises(KeyError, match="mine"):

        def see(_some, _gram):
            raise KeyError("mine")

        walk(model, Data(torch.rand(10, 2), batch=5), ["first", "last"], see)
    assert threading.active_count() == threads and model.training
    for layer in (model.first, model.last):
        assert not layer._forward_pre_hooks and not layer._forward_hooks and "weight" not in vars(layer)
