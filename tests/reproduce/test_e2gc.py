"""The quick reproduction of E2GC reaches its bars; its parts are what they say."""

import pytest
import torch
from torch import nn

from netweight.reproduce import e2gc
from netweight.training.loop import Moment


def test_quick():
    bars = e2gc.reproduce(quick=True).bars
    assert [bar.bar for bar in bars] == [1.3, 0.001, 0]
    assert all(bar.passed for bar in bars)


def test_mixes_have_the_macs_of_the_count():
    total = {name: sum(one.macs for one in stack) for name, stack in e2gc.stacks().items()}
    assert [round(total[f"g {g}"] / 1e6, 1) for g in (4, 8, 16)] == [11.8, 5.9, 2.9]
    joules = {name: float(macs) for name, macs in total.items()}  # energy that is MACs: nothing is won
    assert [e2gc.matched(joules, g) for g in (4, 8, 16)] == pytest.approx([1.0] * 3)
    joules["g 8"] *= 2
    assert e2gc.matched(joules, 8) == pytest.approx(0.5)


def test_the_loss_turns_half_of_the_images():
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 10)

    x = torch.arange(4.0).expand(400, 1, 1, 4)
    e2gc.loss(Net(), x, torch.zeros(400, dtype=torch.long), Moment(0, 0, 1, torch.Generator().manual_seed(0)))
    turned = (seen[0][:, 0, 0, 0] == 3).float().mean()
    assert 0.4 < turned < 0.6
    assert torch.equal(seen[0].sort(-1).values, x)


def test_the_trained_nets_have_the_same_macs():
    x = torch.zeros(1, 3, 32, 32)
    size, count = (
        e2gc.macs(e2gc.mobile(e2gc.WIDTHS, rule).eval(), x)
        for rule in (lambda m: e2gc.SIZE, lambda m: m // e2gc.SIZE)
    )
    assert abs(size / count - 1) < 0.05 and size < count
