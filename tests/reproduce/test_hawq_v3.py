"""The quick reproduction of HAWQ-V3 reaches its bars; its parts are what they say."""

import random

import pytest
import torch

from netweight.core.compressed import weighted
from netweight.reproduce import hawq_v3
from netweight.testing import tiny_model, tiny_task


def test_quick():
    claim = hawq_v3.reproduce(quick=True)
    assert [bar.passed for bar in claim.bars] == [True] * 3
    assert [bar.bar for bar in claim.bars] == [0, 0, 1 + 1e-9]
    assert claim.figures["assignments"] == 4**4
    assert claim.figures["W8A8, integers alone"] >= claim.figures["float accuracy"] - 0.01


@pytest.fixture(scope="module")
def table():
    return hawq_v3.priced(tiny_model(), tiny_task(), False, 0)


def test_random_assignments_fit_and_leave_no_room(table):
    limit = table.sum(table.uniform(3), "bits")
    drawn = [table.drawn(limit, random.Random(seed)) for seed in range(8)]
    assert len({tuple(bits.values()) for bits in drawn}) > 1
    for bits in drawn:
        assert table.sum(bits, "bits") <= limit
        assert all(table.sum(wider, "bits") > limit for wider in hawq_v3.moved(bits, -1))


def test_the_programme_and_its_inverse(table):
    limit = table.sum(table.uniform(3), "bits")
    best, inverse = table.best(limit), table.best(limit, inverse=True)
    assert max(table.sum(best, "bits"), table.sum(inverse, "bits")) <= limit
    drawn = [table.drawn(limit, random.Random(seed)) for seed in range(8)]
    assert table.sum(best) <= min(table.sum(bits) for bits in [*drawn, inverse])
    assert set(best) == set(weighted(tiny_model()))
    net = table.made(best)
    assert [net.get_submodule(layer).form.bits_per_code for layer in best] == list(best.values())
    assert all(net.get_submodule(layer).form.zero is not None for layer in best)


def test_a_difference_of_one_image_and_a_floating_tensor_are_seen(monkeypatch):
    model, task = tiny_model(), tiny_task()

    def off_by_one(network, *, join_as_real=False):
        def run(x):
            logits = network(x).double() * network.scale
            one = (torch.arange(len(x)) == 1) & (len(x) == 6)  # of the last batch alone
            return logits + network.scale * one[:, None]

        twin = torch.nn.Module()
        twin.forward = run
        return twin

    honest = hawq_v3.on_integers(model, task, 8, {"bits": (8,)}, 0.01, joined=True)
    assert [bar.measured for bar in honest.bars[:2]] == [0, 0]
    assert honest.bars[3].measured == 0 and not honest.bars[3].passed  # there is no residual
    few = hawq_v3.on_integers(model, task, 8, {"bits": (8,)}, checked=7)
    assert few.figures["W8A8, images compared"] == 7 and len(few.bars) == 2
    monkeypatch.setattr(hawq_v3, "simulation", off_by_one)
    monkeypatch.setattr(hawq_v3, "executed", lambda network, x: {("add", "float32"): 2, ("mul", "int32"): 1})
    bars = hawq_v3.on_integers(model, task, 8, {"bits": (8,)}).bars
    assert [bar.measured for bar in bars] == [1, 1] and not any(bar.passed for bar in bars)


def test_counting_what_is_no_worse():
    assert hawq_v3.below([1.0, 2.0, 3.0], 2.0) == 2
