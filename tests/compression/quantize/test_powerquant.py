"""PowerQuant: each layer is coded by itself, with the searched or the given exponent."""

import pytest
import torch
from torch import nn

from netweight.compression.quantize.powerquant import PowerQuant, powerquant
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.core.compressed import weight_of, weighted
from netweight.core.errors import DoesNotFit
from netweight.nn.power import Power
from netweight.testing import check_compressor, tiny_language_model, tiny_model, tiny_task, tiny_text_task


@pytest.mark.parametrize("settings", [PowerQuant(), PowerQuant(3, -1), PowerQuant(2, 8, 0.5)], ids=repr)
def test_laws(settings):
    check_compressor(powerquant, settings)
    model = tiny_model()
    for layer, form in powerquant(model, tiny_task(), ["3", "7"], settings).packed.items():
        own = Power.nearest(weight_of(model, layer), settings.bits, settings.group, settings.exponent)
        assert torch.equal(form.decode(), own.decode())


def test_defaults():
    form = powerquant(tiny_model(), tiny_task(), ["7"], PowerQuant()).packed["7"]
    assert isinstance(form, Power) and (form.bits_per_code, form.group) == (4, 0)
    assert float(form.exponent) not in (0.0, 1.0)


def test_exponent_one_is_round_to_nearest():
    model, task = tiny_model(), tiny_task()
    layers = weighted(model)
    power = powerquant(model, task, layers, PowerQuant(3, 0, 1.0)).packed
    even = rtn(model, task, layers, RTN(3, True, 0)).packed
    assert all(torch.equal(power[layer].decode(), even[layer].decode()) for layer in layers)


def test_tables_are_coded_too():
    model, task = tiny_language_model(), tiny_text_task()
    layers = weighted(model, embeddings=True)
    check_compressor(powerquant, PowerQuant(4, -1), model=model, task=task, layers=layers)


def test_left_and_nonsense():
    model = tiny_model()
    nn.init.constant_(model[9].weight, torch.nan)
    assert "NaN" in powerquant(model, tiny_task(), ["9"], PowerQuant()).left["9"]
    with pytest.raises(DoesNotFit, match="^7: rows of 144"):
        powerquant(tiny_model(), tiny_task(), ["7"], PowerQuant(group=7))
    with pytest.raises(DoesNotFit, match="^1: .*BatchNorm2d"):
        powerquant(tiny_model(), tiny_task(), ["1"], PowerQuant())
    for wrong in ({"bits": 1}, {"group": -2}, {"exponent": 0.0}, {"exponent": 9.0}):
        with pytest.raises(ValueError, match="need"):
            PowerQuant(**wrong)
