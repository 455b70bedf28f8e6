"""The attack bench: what its answer says, with and without peers."""

import pytest
import torch

from netweight.bench import attack
from netweight.testing import tiny_model, tiny_task


@pytest.fixture
def network():
    return tiny_model(), tiny_task()


def test_ours_are_measured_without_any_peer(monkeypatch, network):
    monkeypatch.setattr(attack, "find_spec", lambda name: None)
    found = attack.bench(network=network, images=6, turns=1, radii=(0.1, 0.3))
    assert [row["attack"] for row in found["rows"]] == ["PGD, ours", "APGD, ours", "all, ours"] * 2
    assert not found["bars"] and len(found["missing"]) == 2 and "pip install foolbox" in found["missing"][0]
    for row in found["rows"]:
        assert 0 <= row["robust_accuracy"] <= 1 and row["images_per_second"] > 0 and "seconds" not in row


def test_bars_hold_ours_against_each_peer():
    def of(*seconds: float, right: float) -> dict:
        return {"seconds": list(seconds), "robust_accuracy": right}

    found = {
        "PGD, ours": of(1.0, 2.0, 3.0, right=0.4),
        "all, ours": of(9.0, right=0.41),
        "PGD, Foolbox": of(2.0, 3.0, 6.0, right=0.5),
        "all, torchattacks": of(1.0, right=0.4),
    }
    speed, right, whole = attack.compared(found, "eps 1/255")
    assert speed.measured == 2.0 and speed.passed and "ours / Foolbox, eps 1/255" in speed.name
    assert right.measured == pytest.approx(-0.1) and right.passed
    assert whole.measured == pytest.approx(0.01) and not whole.passed


def test_every_way_is_one_point_for_each_image(monkeypatch, network):
    monkeypatch.setattr(attack, "find_spec", lambda name: None)
    model, task = network[0].eval(), network[1]
    x, y = task.test.x[:4], task.test.y[:4]
    quick, whole = attack.attacks(model, x, y, 0.2)
    for way in (*quick.values(), *whole.values()):
        points = way()
        assert points.shape == x.shape and (points - x).abs().max() <= 0.2 + 1e-6
    before = torch.get_rng_state()
    attack.measured(model, y, quick, 0)
    assert torch.equal(torch.get_rng_state(), before)
