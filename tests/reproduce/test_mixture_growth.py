"""The quick reproduction of MixtureGrowth reaches its bars; its arms are what they say."""

import pytest
import torch

from netweight.core.task import Data
from netweight.nn.normalize import Normalize
from netweight.reproduce import mixture_growth as reproduction
from netweight.training.mixture_growth import folded, templates_of


def examples() -> Data:
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Data(x, torch.arange(6), 6)


def full() -> torch.nn.Sequential:
    return reproduction.network(8, Normalize((0.5,) * 3, (0.2,) * 3), 0)


def test_quick():
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [0.0, 0.0, 1e-4] and all(bar.passed for bar in claim.bars)


def test_a_member_costs_a_quarter_but_for_its_ends():
    half = folded(templates_of(full(), examples(), reproduction.AFTER, 0))
    ratio = reproduction.macs(half, examples().x[:1]) / reproduction.macs(full(), examples().x[:1])
    assert 0.25 < ratio < 0.32
    epochs = reproduction.epochs_at_equal_macs(full(), half, examples(), reproduction.HOW)
    assert epochs == 2 * 8 * ratio + 3


def test_training_from_scratch_takes_its_share_of_an_epoch_to_the_step(monkeypatch):
    seen, how = [], reproduction.replace(reproduction.HOW, batch=2)
    monkeypatch.setattr(
        reproduction,
        "loss",
        lambda model, x, y, at: seen.append(y) or torch.nn.functional.cross_entropy(model(x), y),
    )
    reproduction.fitted(full(), examples(), how, 2.4)  # three steps an epoch
    assert [len(y) for y in seen] == [2] * 7
    assert sorted(torch.cat(seen[:3]).tolist()) == sorted(torch.cat(seen[3:6]).tolist()) == [*range(6)]


def test_a_widened_network_computes_what_the_half_did(monkeypatch):
    half = folded(templates_of(full(), examples(), reproduction.AFTER, 0))
    monkeypatch.setattr(reproduction, "NOISE", 0.0)
    wide = reproduction.widened(half, full(), 0)
    assert torch.allclose(wide(examples().x), half(examples().x), atol=1e-5)
    monkeypatch.setattr(reproduction, "NOISE", 0.01)
    noisy = reproduction.widened(half, full(), 0)
    assert not torch.equal(noisy(examples().x), wide(examples().x))
    assert torch.equal(noisy[0].std, wide[0].std)


def test_images_are_means_of_four_pixels():
    x = reproduction.halved(examples()).x
    assert x.shape == (6, 3, 8, 8)
    assert x[2, 1, 3, 4].item() == pytest.approx(examples().x[2, 1, 6:8, 8:10].mean().item(), abs=1e-6)


def test_an_inner_layer_stores_eight_numbers_more():
    net = templates_of(full(), examples(), reproduction.AFTER, 0)
    assert reproduction.extra_parameters(net, full()) == 8
