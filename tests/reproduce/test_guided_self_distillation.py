"""The quick reproduction of guided self-distillation reaches its bars; its parts are what they say."""

import pytest
import torch

from netweight.data import digits
from netweight.reproduce import guided_self_distillation as reproduction


def test_quick():
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [5e-6, 0.8, 0.01, 0.1]
    assert all(bar.passed for bar in claim.bars), claim.bars
    errors = claim.figures["diabetes"]["errors, 0.1 of the best penalty"]
    assert errors[0] > errors[1] > errors[4]


def test_one_in_five_training_labels_is_wrong_and_no_other():
    train, held, test = reproduction.noisy(1)
    truth = {tuple(x.flatten().tolist()): int(y) for x, y in zip(digits.train().x, digits.train().y)}
    for data, wrong in ((train, 60), (held, 0)):
        assert sum(truth[tuple(x.flatten().tolist())] != int(y) for x, y in zip(data.x, data.y)) == wrong
    assert (len(train), len(held), len(test)) == (300, 100, 540)
    rows = torch.cat([train.x, held.x]).flatten(1)
    assert len(rows.unique(dim=0)) == 400


def test_what_is_lost_is_held_against_the_own_best_first():
    assert reproduction.lost([0.8, 0.9, 0.85], [0.8, 0.8, 0.7]) == pytest.approx(0.05)
    assert reproduction.lost([0.8, 0.82, 0.85], [0.8, 0.8, 0.9]) == pytest.approx(0.05)
    assert reproduction.lost([0.8, 0.82, 0.85], [0.8, 0.8, 0.8]) == pytest.approx(-0.05)
