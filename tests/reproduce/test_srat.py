"""The quick variant of the reproduction reaches its bars; what its helpers count."""

import pytest
import torch
from torch import nn

from netweight.core.result import Bar
from netweight.core.task import Data
from netweight.reproduce.srat import (
    ARMS,
    LATE,
    OURS,
    RARE,
    by_class,
    features,
    halved,
    judged,
    marks,
    means,
    mirrored,
    reproduce,
    small_network,
)


def test_the_quick_variant_reaches_its_bars():
    claim = reproduce(quick=True)
    assert [bar for bar in claim.bars if not bar.passed] == []
    assert claim.bars[0].measured < 0.9 and claim.figures["digits"]["natural"]["rare"] > 0.5


def test_halves_are_means_of_four_pixels():
    x = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    assert halved(Data(x, low=0.0, high=1.0)).x.flatten().tolist() == [
        2.5 / 16,
        4.5 / 16,
        10.5 / 16,
        12.5 / 16,
    ]


def test_mirrored_images_keep_their_classes():
    both = mirrored(Data(torch.arange(8.0).reshape(2, 1, 2, 2), torch.tensor([3, 5])))
    assert both.x[2:].flatten().tolist() == [1, 0, 3, 2, 5, 4, 7, 6] and both.y.tolist() == [3, 5, 3, 5]


def test_accuracy_is_counted_by_class():
    y = torch.arange(10)
    scores = torch.eye(10)
    scores[[0, 1, 3]] = torch.eye(10)[[5, 5, 5]]
    assert by_class(nn.Identity(), Data(scores, y)) == {"clean": 0.7, "rare": 0.8, "frequent": 0.6}
    assert set(RARE) == {0, 2, 4, 6, 8} and means([{"a": 1.0}, {"a": 2.0}]) == {"a": 1.5}


def test_attacked_accuracy_is_below_the_clean_one():
    model = small_network(0).eval()
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = Data(x, model(x).argmax(1), low=0.0, high=1.0)
        data.y[:2] = torch.tensor([0, 1])
        z = model[:-1](x)
    found = judged(model, data, "linf=0.1")
    assert found["attacked"] < found["clean"] and found["scatter"] > 0
    assert torch.allclose(features(model, data), z, atol=1e-6)
    assert torch.equal(small_network(0)[1].weight, model[1].weight)
    assert not torch.equal(small_network(1)[1].weight, model[1].weight)


def table(**moved: float) -> dict[str, dict[str, float]]:
    row = {"clean": 0.5, "rare": 0.4, "frequent": 0.5, "rare, attacked": 0.2, "scatter": 1.0}
    found = {name: dict(row) for name in ARMS}
    found["adversarial"] |= {"rare": 0.2}
    found["adversarial, weights"] |= {"frequent": 0.4}
    found[OURS] |= {"clean": 0.51, "scatter": 1.1} | moved
    return found


def test_the_marks_compare_what_they_say():
    bars = {bar.name.split(":")[0] + bar.direction: bar for bar in marks(table())}
    assert all(bar.passed for bar in bars.values()) and len(bars) >= 5
    assert marks(table())[:4] == [
        Bar("rare classes, clean: adversarial / natural", 0.5, 0.7, "at most"),
        Bar("frequent classes, clean: cost of weights, adversarial", pytest.approx(0.1), 0.08, "at least"),
        Bar("that cost - 4 times the cost in natural training", pytest.approx(0.1), 0.0, "at least"),
        Bar("clean: SRAT - late weights", pytest.approx(0.01), 0.007, "at least"),
    ]
    assert not marks(table(clean=0.505))[3].passed
    assert not marks(table(**{"rare, attacked": 0.18}))[4].passed
    assert not marks(table(scatter=0.9))[5].passed
    assert LATE in ARMS
