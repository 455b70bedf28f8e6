"""The quick variant reaches its bar; what the figures count."""

import pytest
import torch

from netweight.attacks.fooling import Evolution, Fooled
from netweight.core.task import Data
from netweight.data import digits
from netweight.reproduce import fooling as file
from netweight.reproduce.fooling import (
    limited,
    nearest,
    reproduce,
    retrained,
    seen_alike,
    sheet,
    with_one_more,
)


def test_the_quick_variant_reaches_its_bar():
    for seed in range(3):
        (bar,) = reproduce(seed=seed, quick=True).bars
        assert bar.passed and bar.measured < 1


def test_distances_shares_and_sizes():
    train = digits.train().x[:5]
    assert nearest(train).tolist() == [0] * 5
    far = train + 0.5
    assert 0 < float(nearest(far).max()) <= 0.5 * 8
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.arange(10.0)
    assert seen_alike(model, torch.zeros(10, 1, 8, 8)) == pytest.approx(0.1)  # always class 9
    flat, noisy = (Fooled(x, torch.ones(10), ()) for x in (torch.zeros(10, 1, 8, 8), torch.rand(10, 1, 8, 8)))
    assert sheet(flat) < 0.3 * sheet(noisy)


def test_a_network_with_one_more_class_learns_it():
    data = digits.train().take(300)
    extra = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = Data(torch.cat([data.x, extra]), torch.cat([data.y, torch.full((60,), 10)]))
    model = with_one_more(whole, 0)
    with torch.no_grad():
        found = model(whole.x).argmax(1)
    assert model(whole.x[:1]).shape == (1, 11)
    assert (found == whole.y).float().mean() > 0.95 and (found[300:] == 10).float().mean() > 0.9


def test_rounds_add_what_was_found_and_judge_the_first_ten_classes(monkeypatch):
    seen = []
    monkeypatch.setattr(file, "ROUNDS", 2)
    monkeypatch.setattr(file, "RUNS", 2)
    monkeypatch.setattr(file, "with_one_more", lambda data, seed: (seen.append(data), with_few(11))[1])
    medians = retrained(with_few(10), Evolution("direct", 1, 4), 0)
    assert len(medians) == 3 and all(0 < median < 1 for median in medians)
    count = len(digits.train())
    assert [len(data) for data in seen] == [count + 20, count + 40]  # ten classes, two runs
    assert (seen[1].y[count:] == 10).all() and torch.equal(seen[1].x[: count + 20], seen[0].x)
    assert limited(Evolution("cppn", 1000, enough=0.9)) == Evolution("cppn", 200, enough=0.9)


def with_few(classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
