"""The quick reproduction of CBNet reaches its bars; its images and lines are what they say."""

import math

import pytest
import torch

from netweight.core.graph import macs
from netweight.data import digits
from netweight.reproduce import cbnet as reproduction


def test_quick():
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [0.0, 0.0, 1 / 3, 1 / 5, 0.0, 0.9, 0.05]
    assert all(bar.passed for bar in claim.bars), claim.bars
    found = claim.figures["macs"]
    assert found["converted"] == found["autoencoder"] + found["exit"] < found["whole network"]


def test_hard_images(monkeypatch):
    x, generator = digits.test().x[:50], torch.Generator().manual_seed(0)
    hard = reproduction.made_hard(x, generator)
    assert hard.shape == x.shape and hard.min() >= 0 and hard.max() <= 1
    monkeypatch.setattr(reproduction, "NOISE", 0.0)
    monkeypatch.setattr(reproduction, "TURN", 0.0)
    square = torch.zeros(200, 1, 8, 8)
    square[:, :, 3:5, 3:5] = 1.0
    moved = reproduction.made_hard(square, generator)
    places = torch.arange(8.0)
    for axis in (2, 3):  # the centre moves by up to a pixel
        centre = (moved.sum(5 - axis).squeeze(1) * places).sum(1) / moved.sum((1, 2, 3))
        assert 0.8 < (centre - 3.5).abs().max() <= 1 + 1e-5
    monkeypatch.setattr(reproduction, "SHIFT", 0.0)
    assert torch.allclose(reproduction.made_hard(x, generator), x, atol=1e-5)
    monkeypatch.setattr(reproduction, "TURN", 90.0)
    corner = torch.zeros(400, 1, 8, 8)
    corner[:, :, 3:5, 6:8] = 1.0
    turned = reproduction.made_hard(corner, generator)
    up, down = (turned[:, 0, rows, 3:5].sum((1, 2)).max() for rows in (slice(0, 2), slice(6, 8)))
    assert min(up, down) > 3.5 and turned[:, 0, 3:5, 0:2].sum((1, 2)).max() < 0.1  # by at most 90 degrees


def test_a_larger_share_adds_hard_images_to_the_same_ones():
    data = digits.test()
    sets = [reproduction.mixed(data, share, 5) for share in (0.0, 0.4, 1.0)]
    assert torch.equal(sets[0][0].x, data.x) and bool(sets[2][1].all())
    some, hard = sets[1]
    assert 0.3 < hard.double().mean() < 0.5
    assert torch.equal(some.x[hard], sets[2][0].x[hard]) and torch.equal(some.x[~hard], data.x[~hard])
    many = reproduction.views(data.take(5), 3, 0)
    assert len(many) == 15 and torch.equal(many.y, data.y[:5].repeat(3))
    assert len({tuple(row.tolist()) for row in many.x.flatten(1)}) > 5


def test_lines_by_hand():
    growth, straight = reproduction.line([2.0 + 3.0 * share for share in reproduction.SHARES])
    assert growth == pytest.approx(1.5) and straight == pytest.approx(1.0)
    growth, straight = reproduction.line([2.0, 4.0, 2.0, 4.0, 2.0, 4.0])
    assert straight < 0.2 and math.isfinite(growth)


def test_the_network_is_cut_behind_its_first_convolution():
    model = reproduction.network(0)
    convert = reproduction.method.conversion(model, digits.train(), reproduction.SETTINGS)
    assert convert.after == "2" and convert.features == (8, 4, 4)
    assert macs(model, digits.test().x[:1]) > 10 * macs(model[:3], digits.test().x[:1])
    assert torch.equal(model[1].weight, reproduction.network(0)[1].weight)
