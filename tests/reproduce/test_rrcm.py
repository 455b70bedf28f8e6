"""The quick reproduction of rRCM reaches its bars; its baselines and its attack are what they say."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from netweight.core.graph import macs
from netweight.core.task import Data
from netweight.data import digits
from netweight.reproduce import rrcm
from netweight.training.consistency import NoisyClassifier
from netweight.verification.smoothing import smooth


def test_quick():
    above, loss = rrcm.reproduce(quick=True).bars
    assert above.bar == 0.1 and above.passed
    assert loss.bar == 0.8 and loss.passed


def test_the_full_one_holds_every_bar_against_its_number(monkeypatch):
    short = {"steps": 2, "batch": 16}
    for name in ("PRETRAINING", "FINETUNING", "CLEAN"):
        monkeypatch.setattr(rrcm, name, replace(getattr(rrcm, name), **short))
    for name, value in (("DENOISING", (2, 16, 1e-3)), ("IMAGES", 4), ("VOTES", 20)):
        monkeypatch.setattr(rrcm, name, value)
    monkeypatch.setattr(rrcm, "macs", lambda network, x: 1 + len(getattr(network, "levels", ())))
    radii = iter([0.4, 0.2, 0.5])  # of rRCM, from scratch, denoised once
    monkeypatch.setattr(rrcm, "average_radius", lambda found, labels: next(radii))
    claim = rrcm.reproduce(seed=3)
    assert [(bar.bar, bar.direction) for bar in claim.bars] == [
        (1.5, "at least"),
        (0.85, "at least"),
        (0.55, "at most"),
        (0.1, "at most"),
        (0.0, "at most"),
    ]
    assert [bar.measured for bar in claim.bars[:4]] == pytest.approx([2.0, 0.8, 1 / 2, 1 / 11])
    assert math.isnan(claim.bars[4].measured)  # hardly trained, it certifies fewer than 50 inputs
    assert set(json.loads(json.dumps(claim.figures))["ACR"]) == {"rRCM", "from scratch", "denoised once"}


def test_work_per_vote_is_that_of_the_layers():
    classifier = NoisyClassifier(rrcm.encoder(0), 10, 1.0, 0.0, 1.0)
    denoiser = rrcm.Denoiser(rrcm.encoder(0), digits.train())
    x = digits.test().x[:1]
    alone = 64 * 256 + 6 * 256**2 + 10 * 256
    each = 64 * 256 + 6 * 256**2 + 64 * 256
    assert macs(classifier, x) == alone
    assert macs(rrcm.Denoised(denoiser, classifier, 0.5, 1), x) == alone + each
    assert macs(rrcm.Denoised(denoiser, classifier, 0.5, 3), x) == alone + 3 * each


def test_a_denoiser_leaves_clean_images_and_stays_in_the_range_of_data_in_much_noise():
    denoiser = rrcm.Denoiser(rrcm.encoder(0), digits.train())
    x = 2 * digits.test().x[:4] - 1
    torch.testing.assert_close(denoiser(x, torch.full((4,), 1e-5)), x, atol=1e-3, rtol=0)
    far = x + 80 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert denoiser(far, torch.full((4,), 80.0)).abs().max() < 3


@pytest.mark.parametrize("count", [1, 10])
def test_steps_of_denoising_end_at_the_image_that_a_perfect_denoiser_knows(count):
    clean, told = 2 * digits.test().x[:3] - 1, []

    class Perfect(nn.Module):
        def forward(self, x, t):
            told.append(t[0].item())
            return clean

    noisy = (clean + 1) / 2 + 0.5
    found = rrcm.Denoised(Perfect(), nn.Identity(), 0.5, count)(noisy)
    torch.testing.assert_close(found, (clean + 1) / 2)
    assert len(told) == count and told[0] == pytest.approx(1.0) and told == sorted(told, reverse=True)
    assert all(t > 0.02 for t in told)


def test_the_denoiser_that_is_trained_takes_noise_away(monkeypatch):
    monkeypatch.setattr(rrcm, "DENOISING", (60, 64, 2e-3))
    denoiser = rrcm.trained_denoiser(digits.train(), 0)
    x = 2 * digits.test().x[:100] - 1
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    left = (denoiser(noisy, torch.ones(100)) - x).pow(2).mean()
    assert (
        left < 0.5 * (0.2 * noisy - x).pow(2).mean()
    )  # better than shrinking, the best that knows no digits


def test_the_attack_finds_nothing_within_the_radius_and_something_far_beyond(monkeypatch):
    monkeypatch.setattr(rrcm, "ATTACKED", 6)
    torch.manual_seed(0)
    plane = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    data = Data(x)
    found = smooth(plane, data, rrcm.SIGMA, n=2000)
    assert int((found.classes >= 0).sum()) >= 6
    assert rrcm.flips(plane, data, found, 0.95, 2, 0) == 0
    assert rrcm.flips(plane, data, found, 3.0, 1, 0) == 6
