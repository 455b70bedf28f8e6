"""The quick reproduction of AdvStyle reaches its bars; what it measures is what it says."""

import pytest
import torch

from netweight.core.task import Data
from netweight.data.shared import shared_data
from netweight.reproduce import advstyle as reproduction
from netweight.reproduce.advstyle import ADVSTYLE, DSU, ERM, METHODS, TURNED, grown, mean_of, reproduce
from netweight.training.advstyle import stages


def test_quick():
    claim = reproduce(quick=True)
    assert [bar.bar for bar in claim.bars] == [-0.01, 2.0, 0.6]
    assert all(bar.passed for bar in claim.bars), claim.bars
    assert [*claim.figures["digits"]] == [ERM, ADVSTYLE, TURNED]


def test_layers_stand_behind_every_stage_but_the_last():
    assert stages(reproduction.network(reproduction.SPEECH, 0), torch.rand(3, 1, 32, 32)) == ("3", "7")
    assert stages(reproduction.network(reproduction.IMAGES, 0), torch.rand(3, 1, 8, 8)) == ("3",)
    assert (METHODS[ADVSTYLE].k, METHODS[TURNED].k, METHODS[ERM].kind) == (1.0, -1.0, "none")


def test_growth_is_a_mean_of_ratios_and_means_are_of_one_method():
    up, down = grown([[0.1, 0.7, 0.3], [0.2, 0.2]], [[0.5, 0.1]])
    assert (up.measured, down.measured) == (pytest.approx(2.0), pytest.approx(0.2))
    cells = {(0, ERM, 0): (0.2, 1.0, []), (1, ERM, 1): (0.4, 0.5, []), (0, DSU, 0): (0.9, 0.0, [])}
    assert mean_of(cells, ERM, lambda cell: cell[0]) == pytest.approx(0.3)
    assert mean_of(cells, ERM, lambda cell: cell[1]) == pytest.approx(0.75)


@pytest.mark.skipif(shared_data() is None, reason="the data folder is not here (NETWEIGHT_DATA)")
def test_a_speaker_is_trained_on_and_all_others_are_tested_on(monkeypatch):
    seen: dict[str, Data] = {}

    def fitted(model, data, how, name):
        seen[name] = data
        return reproduction.Trained(model.eval())

    tested = []
    monkeypatch.setattr(reproduction, "fitted", fitted)
    monkeypatch.setattr(reproduction, "accuracy", lambda model, data: tested.append(data) or len(data) / 1e4)
    outside, inside, spreads = reproduction.on_speech(0, 2, ERM)
    assert seen[ERM].domain.unique().tolist() == [2] and len(seen[ERM]) == 450 and spreads == []
    assert [len(data) for data in tested] == [1800, 120, 30]
    assert not any((data.domain == 2).any() for data in tested[:2]) and (tested[2].domain == 2).all()
    assert outside == pytest.approx((1800 * 0.18 + 120 * 0.012) / 1920) and inside == 0.003
