"""The laws of `netweight.testing` catch what they are there for: a broken method for each."""

import copy
import dataclasses
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from netweight.compression.prune.magnitude import Magnitude, magnitude
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core import stored
from netweight.core.compressed import Change
from netweight.nn.fake import DynamicRounding
from netweight.nn.layers import PackedLayer
from netweight.nn.packed import Affine, Dense
from netweight.testing import check_compressor, tiny_model

CALLS = [0]


def after(change_it):
    """A method that rounds to nearest and then does something it should not."""

    def method(model, task, layers, settings):
        return change_it(model, task, layers, rtn(model, task, layers, settings)) or rtn(
            model, task, layers, settings
        )

    return method


def packed_as(wrong):
    """A method whose forms have one thing wrong."""
    return after(lambda model, task, layers, change: Change({n: wrong(f) for n, f in change.packed.items()}))


def other_class(name, **methods):
    """Forms that are `Affine` but for some methods, known to `core.stored`."""
    globals()[name] = dataclass(frozen=True)(type(name, (Affine,), methods))
    stored.KNOWN[name] = __name__
    cls = globals()[name]
    return lambda form: cls(**{f.name: getattr(form, f.name) for f in dataclasses.fields(form)})


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Forms of this file are known while its tests run, and found although it is no importable module."""
    monkeypatch.setattr(stored, "KNOWN", dict(stored.KNOWN))
    real = stored.importlib.import_module
    here = type("here", (), {"__getattr__": lambda _self, name: globals()[name]})()
    monkeypatch.setattr(
        stored.importlib, "import_module", lambda name: here if name == __name__ else real(name)
    )


def moves_weight(model, *_):
    model[7].weight.data[0, 0] += 1


def leaves_hook(model, *_):
    model[7].register_forward_pre_hook(lambda *_: None)


def leaves_training(model, *_):
    model.train()


def freezes(model, *_):
    model[7].weight.requires_grad_(not model[7].weight.requires_grad)


def draws_random(_model, _task, _layers, change):
    CALLS[0] += 1
    name = next(iter(change.packed))
    form = change.packed[name]
    return Change({**change.packed, name: dataclasses.replace(form, scale=form.scale + CALLS[0])})


def packs_one_more(model, task, layers, change):
    return Change({**change.packed, **rtn(model, task, ["0"], RTN()).packed})


def packs_one_less(_model, _task, layers, change):
    return Change({name: form for name, form in change.packed.items() if name != layers[-1]})


def leaves_without_reason(_model, _task, layers, change):
    return Change({n: f for n, f in change.packed.items() if n != layers[-1]}, left={layers[-1]: ""})


def rounds_another(model, task, layers, change):
    return Change(change.packed, activations={"2": DynamicRounding()})


def biases_another(model, task, layers, change):
    return Change(change.packed, biases={"0": torch.zeros(16)})


BROKEN = {
    "the model is untouched": [after(moves_weight), after(leaves_hook), after(freezes)],
    "the model's mode is untouched": [after(leaves_training)],
    "the global random state is untouched": [
        after(lambda *_: torch.rand(1) and None),
        after(lambda *_: random.random() and None),
        after(lambda *_: np.random.rand() and None),
    ],
    "a method may not look at the test data": [
        after(lambda _m, task, *_: len(task.test) and None),
        after(lambda _m, task, *_: [None for _ in task.test] and None),
        after(lambda _m, task, *_: task.test.x is None or None),
    ],
    "two runs agree": [after(draws_random)],
    "exactly the layers asked for": [after(packs_one_more), after(packs_one_less)],
    "a layer that is left has a reason": [after(leaves_without_reason)],
    "only inputs of the layers asked for": [after(rounds_another)],
    "only biases of the layers asked for": [after(biases_another)],
    "shape and dtype are kept": [
        packed_as(lambda form: dataclasses.replace(form, dtype="float64")),
        packed_as(lambda form: dataclasses.replace(form, shape=(*form.shape, 1))),
    ],
    "decoded weights are finite": [
        packed_as(lambda form: dataclasses.replace(form, scale=form.scale * torch.inf)),
    ],
    "bits are those of the stored tensors": [
        packed_as(lambda form: other_class("Claims", bits=lambda self: math.prod(self.shape) * 4)(form)),
    ],
    "bits are saved": [packed_as(lambda form: Dense(form.decode().double(), "float32"))],
    "projecting is idempotent": [
        packed_as(
            lambda form: other_class("Shrinks", project=lambda self, w: Affine.project(self, w * 0.5))(form)
        ),
    ],
    "projecting keeps the form": [
        packed_as(
            lambda form: other_class(
                "Widens", project=lambda self, w: Dense(Affine.project(self, w).decode())
            )(form)
        ),
    ],
    "what is stored projects onto itself": [
        packed_as(
            lambda form: other_class(
                "Wanders", project=lambda self, w: Affine.project(self, torch.zeros_like(w))
            )(form)
        ),
    ],
    "a form decodes, counts bits": [
        packed_as(lambda form: Only(form)),
    ],
    "the assembled network runs": [
        packed_as(
            lambda form: other_class("Falls", layer=lambda self, like: Broken(like, self, "nan"))(form)
        ),
    ],
    "the float twin gives equal outputs": [
        packed_as(
            lambda form: other_class("Lies", layer=lambda self, like: Broken(like, self, "twin"))(form)
        ),
    ],
    "saving and loading changes nothing": [
        packed_as(
            lambda form: other_class("Forgets", layer=lambda self, like: Broken(like, self, "once"))(form)
        ),
    ],
}


@dataclass(frozen=True)
class Only:
    """Decodes, and nothing else."""

    form: Affine

    def decode(self):
        return self.form.decode()


class Broken(PackedLayer):
    """A packed layer that runs wrongly."""

    made = 0

    def __init__(self, like, form, how):
        super().__init__(like, form)
        Broken.made += 1
        self.how, self.number = how, Broken.made

    def plain(self):
        layer = super().plain()
        if self.how == "twin":
            layer.weight.data *= 1 + 1e-6
        if self.how == "once":
            layer = Later(layer, self.number)
        return layer

    def forward(self, x, *rest):
        y = super().forward(x, *rest)
        return {"nan": y * torch.nan, "twin": y, "once": y + self.number}[self.how]


class Later(nn.Module):
    """The layer of `Broken` with the same error."""

    def __init__(self, layer, number):
        super().__init__()
        self.layer, self.number = layer, number
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + self.number


@pytest.mark.parametrize(
    ("law", "method"), [(law, method) for law, methods in BROKEN.items() for method in methods]
)
def test_a_broken_method_is_caught(law, method):
    with pytest.raises(AssertionError, match=law):
        check_compressor(method, RTN())


def test_the_rest_of_the_network_is_watched(monkeypatch):
    from netweight import testing

    def careless(model, change, plan):
        small = assembled(model, change, plan)
        with torch.no_grad():
            small.model[1].running_mean += 1
        return small

    assembled = testing.assemble
    monkeypatch.setattr(testing, "assemble", careless)
    with pytest.raises(AssertionError, match="the rest of the network is untouched"):
        check_compressor(rtn, RTN())


@dataclass
class Thawed:
    bits: int = 4


@dataclass(frozen=True)
class Heavy:
    bits: tuple = (torch.zeros(1),)


@pytest.mark.parametrize("settings", [Thawed(), Heavy(), {"bits": 4}], ids=lambda s: type(s).__name__)
def test_settings_are_plain_and_frozen(settings):
    with pytest.raises(AssertionError, match="settings are a frozen dataclass of plain values"):
        check_compressor(rtn, settings)


def test_honest_methods_pass_on_other_networks():
    model = tiny_model(1)
    check_compressor(rtn, RTN(), model=copy.deepcopy(model))
    check_compressor(magnitude, Magnitude(), model=model, layers=["0", "7"])
