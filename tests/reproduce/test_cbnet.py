"""The quick reproduction of CBNet reaches its bars; its images and lines are what they say."""

import math

import numpy as np
import pytest
import torch

from netweight.data import digits
from netweight.reproduce import cbnet as reproduction


def test_quick():
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [0.0, 0.0, 1 / 3, 1 / 5, 0.0, 0.9, 0.05]
    judged = [bar for bar in claim.bars if "time" not in bar.name]  # no test hangs on a clock
    assert len(judged) == 2 and all(bar.passed for bar in judged), claim.bars
    assert all(math.isfinite(bar.measured) for bar in claim.bars)
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


def test_growth_by_hand():
    """Turns of different speed have the same growth; the middle turn decides."""
    line = [2.0 + 3.0 * share for share in reproduction.SHARES]
    turns = np.array([line, [7 * t for t in line], [2.0] * len(line)])
    assert reproduction.growths(turns) == pytest.approx(1.5)
    assert reproduction.in_turns([lambda: 0, lambda: 1], 3).shape == (3, 2)
