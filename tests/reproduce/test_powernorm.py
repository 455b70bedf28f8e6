"""The quick reproduction of PowerNorm reaches its bars; its parts are what they say."""

import pytest
import torch
from torch import nn

from netweight.core.errors import BadInput
from netweight.core.task import Data
from netweight.nn.power_norm import PowerNorm
from netweight.reproduce import powernorm as reproduction


def test_quick():
    try:
        reproduction.shakespeare()
    except BadInput:
        pytest.skip("the data folder is not there")
    claim = reproduction.reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [1.03, 1, 1e-5, 1e-9]
    assert all(bar.passed for bar in claim.bars), claim.bars
    assert claim.figures["characters"]["perplexity"]["PN"] < 40  # of 113 tokens: something was learnt


def test_fluctuation_by_hand():
    norm = PowerNorm(2, groups=0, warmup=0)
    norm.power.copy_(torch.tensor([3.0, 4.0]))
    x = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]])  # squares 1, 4: off by 2, 0 of 5
    assert reproduction.fluctuation(nn.Sequential(norm), Data(x)) == pytest.approx(0.4)
    batch = reproduction.TokenBatchNorm(2)
    batch.inner.running_var.copy_(torch.tensor([3.0, 4.0]))
    assert reproduction.fluctuation(batch, Data(x)) == pytest.approx(1.0)
    assert batch(torch.ones(2, 3, 2)).shape == (2, 3, 2)
