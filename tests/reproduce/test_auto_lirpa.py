"""The quick reproduction of auto-lirpa reaches its bar; its parts are what they say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.task import Data
from netweight.reproduce import auto_lirpa


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def examples() -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 1, 8, 8, generator=generator)
    return Data(x, torch.randint(10, (12,), generator=generator))


def test_quick():
    (bar,) = auto_lirpa.reproduce(quick=True).bars
    assert bar.bar < 1 and bar.passed


def test_errors_of_tighter_bounds_are_not_higher():
    found = auto_lirpa.errors(mlp(), examples())
    assert found["clean"] <= found["crown"] <= found["ibp"]


def test_the_row_of_two_classes_is_the_margin():
    assert auto_lirpa.two_classes(0) < 1e-4


def test_weights_are_moved_to_the_edge_of_the_set_and_stay_below_the_bound(monkeypatch):
    model, data, seen = mlp(), examples(), []
    real = torch.func.functional_call

    def watched(of, moved, x):
        seen.append(
            {name: (w - dict(of.named_parameters())[name]).norm().item() for name, w in moved.items()}
        )
        return real(of, moved, x)

    monkeypatch.setattr(torch.func, "functional_call", watched)
    sampled = auto_lirpa.worst_loss(model, data, steps=5)
    assert seen[0] == {"1.weight": 0.0, "3.weight": 0.0}
    for lengths in seen[1:]:
        assert lengths == {name: pytest.approx(auto_lirpa.ASKED.eps, rel=1e-3) for name in lengths}
        assert all(length <= auto_lirpa.ASKED.eps for length in lengths.values())
    clean = F.cross_entropy(model(data.x), data.y, reduction="none")
    proven = auto_lirpa.loss_bound(model, data)
    assert (sampled >= clean - 1e-6).all()
    assert sampled.mean() > clean.mean() + 0.01
    assert (proven >= sampled).all()
