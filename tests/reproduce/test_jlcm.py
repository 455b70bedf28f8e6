"""The quick run reaches its bars; the other parts hold on the MLP."""

import math

import pytest
import torch

from netweight.core.compressed import Change
from netweight.core.errors import BadInput
from netweight.nn.codebook import Codebook
from netweight.reproduce import jlcm as reproduction


def test_the_quick_run_reaches_its_bars():
    claim = reproduction.reproduce(quick=True)
    assert len(claim.bars) == 5 and all(bar.passed for bar in claim.bars), claim.bars
    errors = claim.figures["MLP, K=4: logit error"]
    assert errors["joint"] < errors["entries alone"] < errors["k-means"] < errors["RTN"]


def test_groups_on_planted_rows():
    claim = reproduction.grouping(reproduction.digits_subject(0), seed=0)
    assert len(claim.bars) == 1 and claim.bars[0].passed, claim.bars
    figures = claim.figures["MLP, k-means, K=8: logit error"]
    assert figures["planted, G=1"] > 3 * figures["plain, G=1"]


def test_jumps_by_hand():
    def change(codes: list[list[int]]) -> Change:
        rows = torch.zeros(1, dtype=torch.int64)
        table = torch.arange(4.0)[None]
        return Change({"a": Codebook.of(torch.tensor(codes), table, torch.ones(1), rows, torch.zeros(1, 4))})

    before = change([[0, 1, 2, 3]])
    assert reproduction.jumps(before, change([[1, 1, 0, 3]])) == 0.5
    assert math.isnan(reproduction.jumps(before, before))


def test_without_data_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        reproduction.cifar_subject(0)
