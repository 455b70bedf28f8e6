"""The quick reproduction of NUPES reaches its bars; the parts of the full one do what they say."""

import pytest
from torch import nn

from netweight.core.compressed import weighted
from netweight.core.errors import BadInput
from netweight.core.rewrite import FoldBatchNorm, rewritten
from netweight.core.task import outputs
from netweight.reproduce import nupes
from netweight.testing import tiny_model, tiny_task


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setattr(nupes, "STEPS", 5)
    model = tiny_model()
    return nupes.Subject.of(model, tiny_task(), weighted(model)[1:-1])


def test_quick():
    claim = nupes.reproduce(quick=True)
    assert [(bar.bar, bar.direction) for bar in claim.bars] == [(0.03, "at least"), (0.995, "at least")]
    assert all(bar.passed for bar in claim.bars), claim.bars


def test_learning_gives_both_bars(subject):
    claim = nupes.with_data(subject, 0)
    assert [(bar.bar, bar.direction) for bar in claim.bars] == [(0.02, "at least"), (0.7, "at most")]
    (figures,) = claim.figures.values()
    assert claim.bars[0].measured == figures["accuracy"]["NUPES"] - figures["accuracy"]["AdaRound"]
    assert claim.bars[1].measured == figures["logit error"]["NUPES"] / figures["logit error"]["AdaRound"]


def test_starts_are_compared_layer_by_layer(subject, monkeypatch):
    (bar,) = nupes.starts(subject, 0).bars
    assert bar.bar == 0.8 and not bar.passed  # 5 steps do not bring 1.0 and 0.6 together
    monkeypatch.setattr(nupes, "STARTS", (0.7, 0.7))
    (bar,) = nupes.starts(subject, 0).bars
    assert bar.measured == 1


def test_both_sides(subject):
    claim = nupes.both_sides(subject)
    (bar,), (found,) = claim.bars, claim.figures.values()
    assert bar.bar == 0.04 and bar.measured == found["power"] - found["even"]


def test_integers_are_compared_with_the_decoded_network(subject, monkeypatch):
    model = rewritten(subject.model, [FoldBatchNorm("0", "1"), FoldBatchNorm("3", "4")])
    folded = nupes.Subject.of(model, subject.task, subject.layers)
    (bar,) = nupes.on_integers(folded, {"3": "7"}, bits=4).bars
    assert bar.bar == 0.995 and bar.measured == 1
    monkeypatch.setattr(nupes, "in_integers", lambda model, joined: nn.Sequential(model, Reversed()))
    (bar,) = nupes.on_integers(folded, {"3": "7"}, bits=4).bars
    assert bar.measured < 0.5


class Reversed(nn.Module):
    """The least likely class becomes the likeliest."""

    def forward(self, x):
        return -x


def test_a_logit_error_is_a_share_of_the_variance(subject):
    answer = outputs(subject.model, subject.task.test)
    assert subject.logit_error(answer) == 0
    spread = answer.var() ** 0.5
    assert subject.logit_error(answer + spread) == pytest.approx(1)


def test_without_data_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="set NETWEIGHT_DATA"):
        nupes.reproduce()
