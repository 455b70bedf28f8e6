"""The quick reproduction of OFQ reaches its bars; what it compares is what it says."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from netweight.models.digits_vit import skeleton
from netweight.nn.quantizer import FromMean
from netweight.reproduce import ofq as reproduction
from netweight.reproduce.ofq import JOINED, LEARNT, OWN, ROWS, Fitted
from netweight.training.loop import Hooks, Moment, Training


def test_quick():
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [2.0, -0.003, 0.0]
    assert all(bar.passed for bar in claim.bars), claim.bars


def test_the_learnt_step_starts_on_statsqs_levels():
    weight = skeleton("digits-vit", {}).blocks[0].up.weight
    learnt, own = reproduction.learnt(weight), FromMean.stats(2)
    learnt.begin(weight)
    assert learnt.size(weight).flatten().tolist() == pytest.approx(
        own.size(weight).flatten().tolist(), rel=2e-3
    )
    assert learnt.levels == own.levels


def test_bars_are_of_pairs(monkeypatch):
    monkeypatch.setattr(reproduction, "ORDERS", 3)

    def fitted(accuracy: float, rate: float) -> Fitted:
        return Fitted(nn.Identity(), accuracy, {"changes by the step size": rate})

    found = {
        (OWN, 8, 0): fitted(0.9, 1.0), (LEARNT, 8, 0): fitted(0.8, 3.0), (ROWS, 8, 0): fitted(0.5, 4.0),
        (JOINED, 8, 0): fitted(0.1, 9.0), (OWN, 2, 0): fitted(0.7, 2.0), (LEARNT, 2, 0): fitted(0.7, 9.0),
        (ROWS, 2, 0): fitted(0.5, 2.0), (OWN, 2, 1): fitted(0.7, 99.0), (LEARNT, 2, 1): fitted(0.6, 99.0),
        (OWN, 2, 2): fitted(0.7, 99.0), (LEARNT, 2, 2): fitted(0.8, 99.0),
    }  # fmt: skip
    pairs, spread = reproduction.accuracies(found)
    assert (pairs.measured, spread.measured) == pytest.approx((0.025, -0.1))
    assert [bar.measured for bar in reproduction.scales(found)] == pytest.approx([0.25, 0.5])
    both = {
        "annealed": {"oscillations": 1e-5, "accuracy": 0.9, "spread": 0.01},
        "plain": {"oscillations": 3e-5, "accuracy": 0.8, "spread": 0.03},
    }
    bars, said = reproduction.stilled({OWN: both})
    assert [bar.measured for bar in bars] == pytest.approx([3.0, 0.1, -0.02]) and said["then"] == {OWN: both}


def test_late_accuracies_are_of_the_second_half(monkeypatch):
    monkeypatch.setattr(reproduction, "accuracy", lambda model: model.weight.item())
    seen: list[float] = []
    run = SimpleNamespace(model=nn.Linear(1, 1, bias=False))
    moved: list[int] = []
    hooks = reproduction.late(Hooks(after=lambda _, at: moved.append(at.step)), Training(2), seen)
    assert hooks.after is not None
    for step in range(20):
        nn.init.constant_(run.model.weight, step)
        hooks.after(run, Moment(step, step // 10, 10, torch.Generator()))
    assert seen == [14.0, 19.0] and moved == [*range(20)]
