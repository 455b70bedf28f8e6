"""Predicted beside measured distortion of random plans."""

import math

import pytest
import torch

from netweight.core.plan import Option
from netweight.evidence.agreement import Agreement, agreement, total
from netweight.testing import tiny_model, tiny_task


def test_predictions_rank_random_plans_and_seeds_draw_them():
    model, task = tiny_model(), tiny_task()
    found = agreement(model, task, plans=12, examples=16)
    assert {*found} == {"output", "kl", "network", "curvature"}
    assert all(len(each.predicted) == len(each.measured) == 12 for each in found.values())
    assert len({each.measured for each in found.values()}) == 1  # the same plans for each measure
    assert found["network"].correlation > 0.6 and found["kl"].correlation > 0.6
    again = agreement(model, task, plans=12, examples=16, distortions=["network"])
    assert again["network"] == found["network"]
    other = agreement(model, task, plans=12, examples=16, seed=1, distortions=["network"])
    assert other["network"].measured != found["network"].measured


def test_the_correlation_is_of_ranks():
    assert Agreement((1.0, 2.0, 3.0), (1.0, 10.0, 100.0)).correlation == pytest.approx(1)
    assert Agreement((1.0, 2.0, 3.0), (3.0, 2.0, 1.0)).correlation == pytest.approx(-1)
    assert math.isnan(Agreement((0.0, 0.0), (3.0, 2.0)).correlation)


def test_a_prediction_is_the_sum_over_layers():
    cost = {"bits": 1.0, "weights": 1.0}
    options = [Option("a", "rtn", {"bits": b}, cost, b / 10) for b in (2, 3)]
    options += [Option("b", "rtn", {"bits": 4}, cost, 7.0), Option("b", "keep", {}, cost, 0.0)]
    assert total(options, {"a": 3, "b": 4}) == pytest.approx(7.3)
    with pytest.raises(KeyError):
        total(options, {"a": 8, "b": 4})


def test_the_network_is_left_as_it_was():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    agreement(model, tiny_task(), plans=2, examples=8, distortions=["kl"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
