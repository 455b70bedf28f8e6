"""The quick reproduction of AWQ reaches its bar; its parts are what they say."""

import pytest
import torch
from torch import nn

from netweight.core.compressed import weight_of, weighted
from netweight.core.grid import Grid, nearest
from netweight.data.shared import shared_data
from netweight.reproduce import awq
from netweight.testing import tiny_language_model, tiny_text_task

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here")


@needs_data
def test_quick():
    pytest.importorskip("transformers")
    (bar,) = awq.reproduce(quick=True).bars
    assert bar.bar == 0.6 and bar.passed


def test_columns_of_the_highest_score_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(awq, "GROUP", 8)
    model, task = tiny_language_model(), tiny_text_task()
    layers = [layer for layer in weighted(model) if layer != "head"]
    kept = awq.keeping(model, task.calibration, layers, awq.scores(0)["weight norm"])
    for layer in layers:
        before, after = weight_of(model, layer), weight_of(kept, layer)
        same = (before == after).all(0)
        best = before.norm(dim=0).topk(round(0.06 * before.shape[1])).indices
        assert same[best].all() and same.sum() == len(best)
        assert torch.equal(after[:, ~same], nearest(before, Grid(3, group=8))[:, ~same])


def test_likelihood_does_not_depend_on_the_parts():
    model, task = tiny_language_model(), tiny_text_task()
    assert awq.nll(model, task.test, 3) == pytest.approx(awq.nll(model, task.test, 100), rel=1e-6)


@needs_data
def test_calibration_is_spread_over_the_text():
    data = awq.calibration("".join(chr(97 + i * 26 // 30000) for i in range(30000)))
    assert tuple(data.x.shape) == (32, 128) and len(set(data.x[:, 0].tolist())) >= 25


def test_without_data_one_sentence(monkeypatch, tmp_path):
    from netweight.core.errors import BadInput

    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    monkeypatch.setattr(awq, "small_opt", lambda seed, quick: nn.Linear(1, 1))
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        awq.reproduce(quick=True)
