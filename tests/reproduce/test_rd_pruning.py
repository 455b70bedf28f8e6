"""The quick reproduction of rate-distortion pruning reaches its bar; its parts are what they say."""

import numpy as np
import pytest
import torch

from netweight.core.compressed import weight_of, weighted
from netweight.core.errors import BadInput
from netweight.data import digits
from netweight.reproduce import rd_pruning


def test_quick(monkeypatch):
    monkeypatch.setattr(rd_pruning, "RULES", {name: rd_pruning.RULES[name] for name in ("LAMP", "ERK")})
    claim = rd_pruning.reproduce(quick=True)
    (bar,) = claim.bars
    assert bar.bar == 0.05 and bar.passed, bar
    for name in ("RD", "LAMP", "ERK"):
        reached = claim.figures["digits"][name]["zeros"]
        assert len(reached) == 8 and 0.931 <= reached[-1] <= 0.94 and reached == sorted(reached)


def test_retraining_keeps_zeros_and_moves_the_rest():
    net = rd_pruning.network(0)
    for layer in weighted(net):
        weight_of(net, layer).flatten()[::2] = 0
    before = {layer: weight_of(net, layer).clone() for layer in weighted(net)}
    rd_pruning.retrain(net, digits.calibration(), 0)
    for layer, weight in before.items():
        after = weight_of(net, layer)
        assert torch.equal(after == 0, weight == 0) and not torch.equal(after, weight)


def test_programme_by_hand():
    curves, grids = {"a": [0.0, 1.0, 5.0], "b": [0.0, 2.0, 3.0]}, {"a": [4, 2, 0], "b": [6, 3, 0]}
    found = [rd_pruning.dynamic_programme(curves, grids, budget) for budget in (10, 9, 7, 5, 4, 3, 0)]
    assert found == [0.0, 1.0, 2.0, 3.0, 3.0, 4.0, 8.0]


def test_predicted_lies_between_the_steps():
    assert rd_pruning.predicted({"a": [0.0, 1.0, 5.0]}, {"a": [4, 2, 0]}, {"a": 1}) == 3.0
    assert np.isclose(rd_pruning.predicted({"a": [0.0, 1.0]}, {"a": [8, 0]}, {"a": 2}), 0.75)


def test_without_data_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    monkeypatch.setattr(rd_pruning, "tuned_resnet20", lambda seed: rd_pruning.network(seed))
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        rd_pruning.at_once(0)
