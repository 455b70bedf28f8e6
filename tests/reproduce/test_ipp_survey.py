"""The quick variant of the reproduction reaches its bars; what its helpers make."""

import pytest
import torch
from torch import nn

from netweight.core.task import Data
from netweight.reproduce import ipp_survey
from netweight.reproduce.ipp_survey import (
    BITS4,
    DISTILLED,
    FIT,
    PRUNED50,
    TUNED,
    accuracy,
    built,
    probe,
    reproduce,
    suspects,
    worst,
)
from netweight.testing import tiny_model, tiny_task


def test_the_quick_variant_reaches_its_bars():
    claim = reproduce(quick=True)
    assert len(claim.bars) == 4 and all(bar.passed for bar in claim.bars)
    rows = claim.figures["weight mark"]["suspects"]
    assert {"itself", TUNED, PRUNED50, BITS4, DISTILLED, "overwritten", "other 3"} <= rows.keys()
    assert claim.figures["boundary fingerprint"]["suspects"]["itself"]["matching"] == 1.0


def test_parts_of_the_world_share_no_image(monkeypatch):
    monkeypatch.setattr(ipp_survey, "fitted", lambda model, *_: model)
    world = built(3, 1)
    parts = (world.own, world.attacker, world.public)
    assert [len(part) for part in parts] == [700, 500, 597] and len(world.test) == 540
    images = torch.cat([part.x for part in parts]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


def test_an_attacker_leaves_the_network_as_it_is():
    world = built(0, 1)
    before = [p.clone() for p in world.plain.parameters()]
    made = suspects(world.plain, world)
    assert all(torch.equal(p, q) for p, q in zip(before, world.plain.parameters()))
    assert made["itself"] is world.plain and accuracy(made[DISTILLED], world.test) > 0.9
    zeros = float((made[PRUNED50][4].weight == 0).float().mean())  # type: ignore[index]
    assert zeros == pytest.approx(0.5, abs=0.01)
    assert len(made[BITS4][4].weight[0].unique()) <= 16  # type: ignore[index]
    tuned, old = made[TUNED], world.plain
    assert not any(torch.equal(p, q) for p, q in zip(tuned.parameters(), old.parameters()))


def test_a_probe_is_a_new_head_on_the_same_features():
    model, data = tiny_model(), tiny_task().train
    assert data is not None
    net = probe(model, data, 0)
    for name, p in model.named_parameters():
        assert torch.equal(p, net.get_parameter(name)) != name.startswith("9.")
    assert FIT.epochs > 1 and torch.equal(net[1].running_mean, model[1].running_mean)  # type: ignore[index]


def test_the_worst_of_some_suspects():
    rows = {"itself": {"p": 0.1}, "8 bit": {"p": 0.3}, "other 1": {"p": 0.9}, "other 2": {"p": 0.4}}
    assert worst(rows, "p", ("itself", "8 bit")) == 0.3
    assert worst(rows, "p", least=True) == 0.4 and worst(rows, "p") == 0.9
    data = Data(torch.eye(3), torch.tensor([0, 1, 1]))
    assert accuracy(nn.Identity(), data) == pytest.approx(2 / 3)
