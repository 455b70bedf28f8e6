"""The parts of the survey on the digits network; the whole quick run where the data is there."""

import pytest

from netweight.core.errors import BadInput
from netweight.core.result import Bar
from netweight.data.shared import shared_data
from netweight.nn.ranges import HOW
from netweight.reproduce import quantization_survey as survey

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here")


@pytest.fixture(scope="module")
def subject():
    return survey.digits_subject(0)


def check(bars: list[Bar], count: int) -> None:
    assert len(bars) == count and all(bar.passed for bar in bars), bars


def test_granularity_and_equalization(subject):
    check(survey.granularity(subject, 2).bars, 1)
    claim = survey.equalization(subject, 0, 4)
    check(claim.bars, 2)
    figures = claim.figures["planted imbalance"]
    assert figures["float"] == pytest.approx(subject.accuracy(), abs=0.004)


def test_ranges_tell_both_widths(subject):
    assert len(survey.ranges(subject).figures) == 4


def test_learning(subject):
    claim = survey.learning(subject, 2, 0.02, 0.02)
    check(claim.bars, 3)
    assert len(claim.figures["output error of GPTQ / RTN"]) == 4


def test_figures_of_the_baselines_without_a_bar(subject):
    blocks = survey.blocks(subject, 60)
    (learnt,) = blocks.figures.values()
    assert not blocks.bars and learnt["BRECQ"] > learnt["RTN"] + 0.1 < learnt["AdaRound"]
    assert learnt["BRECQ, inputs at 4 bits"] > learnt["RTN"]
    (by_range,) = survey.inputs(subject).figures.values()
    assert set(by_range) == set(HOW)
    assert all(by_range[how] > subject.accuracy() - 0.05 for how in HOW if how != "kl")
    free = survey.without_data(subject, 0, 3).figures["without data"]
    assert free["W3A6, ZeroQ"] > free["W3A6, calibrated"] - 0.03 and len(free) == 6


@needs_data
def test_smoothing():
    pytest.importorskip("transformers")
    check(survey.smoothing(0, quick=True).bars, 1)


def test_without_data_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    monkeypatch.setattr(survey, "tuned_resnet20", lambda seed: None)
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        survey.reproduce()
