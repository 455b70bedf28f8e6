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

    x = torch.arange(8.0).expand(400, 1, 8, 8)  # rises from left to right
    e2gc.loss(Net(), x, torch.zeros(400, dtype=torch.long), Moment(0, 0, 1, torch.Generator().manual_seed(0)))
    rise = seen[0][:, 0, 4, 4] - seen[0][:, 0, 4, 3]
    assert set(rise.tolist()) == {-1.0, 1.0}
    assert 0.4 < (rise < 0).float().mean() < 0.6


def test_images_are_shifted_by_every_step_and_no_other():
    x = torch.rand(600, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = e2gc.shifted(x, torch.Generator().manual_seed(1))
    wide = nn.functional.pad(x, (2,) * 4, mode="reflect")
    steps = [(i, j) for i in range(5) for j in range(5)]
    equal = torch.stack([(wide[:, :, i : i + 8, j : j + 8] == found).flatten(1).all(1) for i, j in steps])
    assert (equal.sum(0) == 1).all()
    assert (equal.sum(1) > 5).all()


def test_the_trained_nets_have_the_same_macs():
    x = torch.zeros(1, 3, 32, 32)
    size, count = (
        e2gc.macs(e2gc.mobile(e2gc.WIDTHS, rule).eval(), x)
        for rule in (lambda m: e2gc.SIZE, lambda m: m // e2gc.SIZE)
    )
    assert abs(size / count - 1) < 0.05 and size < count
