"""The quick variant of the reproduction reaches its bar; what its helpers count."""

import pytest
import torch

from netweight.core.perturbation import Linf
from netweight.core.task import Data
from netweight.reproduce.gd_uap import (
    NONE,
    RANGE,
    SIGNS,
    fooling,
    moved,
    noises,
    relative,
    reproduce,
    rounded,
)
from netweight.testing import tiny_model


def test_the_quick_variant_reaches_its_bar():
    found = [reproduce(seed=seed, quick=True) for seed in range(2)]
    assert all(bar.passed for claim in found for bar in claim.bars)
    assert found[0].figures != found[1].figures and {SIGNS, NONE, RANGE} <= found[0].figures.keys()


def test_fooling_counts_changed_predictions_and_noise_has_the_size_that_is_said():
    data = Data(torch.rand(40, 4, 7, 7), low=0.0, high=1.0)
    made = noises(data.x[:1], Linf(0.25), 0)
    signs, uniform = made.values()
    assert signs.abs().unique().tolist() == [0.25] and uniform.abs().max() <= 0.25
    assert 0.4 < (signs > 0).float().mean() < 0.6
    model = tiny_model()
    shares = fooling(model, data, made | {"nothing": torch.zeros_like(signs)})
    with torch.no_grad():
        apart = model((data.x + signs).clamp(0, 1)).argmax(1) != model(data.x).argmax(1)
    assert shares["nothing"] == 0 and shares[SIGNS] == pytest.approx(float(apart.float().mean()))
    assert moved(data, signs).x.min() >= 0 and moved(data, signs).x.max() <= 1


def test_a_copy_of_fewer_bits_is_further_away():
    model, x = tiny_model(), torch.rand(8, 4, 7, 7)
    with torch.no_grad():
        errors = [relative(rounded(model, bits)(x), model(x)) for bits in (8, 4)]
    assert 0 < errors[0] < errors[1] / 4
