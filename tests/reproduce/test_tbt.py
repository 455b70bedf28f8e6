"""The baseline of the reproduction, and its quick variant."""

import pytest
import torch

from netweight.reproduce.tbt import Range, Signs, Threshold, bars, reproduce, until_end

pytest.importorskip("transformers")


def test_weights_of_the_baseline_by_hand():
    w = torch.tensor([[1.0, -2.0, 0.1, 3.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    # the mean of the first row is 1.525, 0.7 of it 1.0675: two weights are above
    q = Threshold()(w)
    assert torch.allclose(q, torch.tensor([[0, -2.5, 0, 2.5], [0, 0, 0, 0]]))
    q.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
    w = torch.tensor([[1.0, 3.0], [2.0, 6.0]])  # the mean of all is 3
    assert Signs()(w).tolist() == [[-2, 0], [-4, 4]]


def test_inputs_of_the_baseline_by_hand():
    x = torch.tensor([-2.0, -0.4, 0.2, 0.9, 9.0], requires_grad=True)
    y = Range(2, signed=True)(x)
    assert y.tolist() == [-2.5, 0, 0, 0, 2.5]  # clipped at 2.5
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 0]
    assert Range(1, signed=True)(x).tolist() == [-2.5, -2.5, 2.5, 2.5, 2.5]
    assert torch.allclose(Range(2, signed=False)(x), torch.tensor([-2.0, -0.5, -0.5, 1.0, 2.5]))
    rounding = Range(2, signed=True)
    rounding(torch.tensor([2.0]))
    rounding(torch.tensor([1.0]))
    assert float(rounding.high) == pytest.approx(1.9)
    assert rounding.eval()(torch.tensor([1.0])).tolist() == pytest.approx([1.9])


def test_which_bars_there_are_and_that_they_fail():
    names = [f"{n}{b}" for n in ("W2A8", "W1A8", "W2A2", "W1A1") for b in ("", " baseline")]
    scores, perplexities = dict.fromkeys(names, 20.0), dict.fromkeys(names, 2.0)
    found = {
        bar.name: bar for bar in bars({"float": 80.0, **scores}, perplexities, {"W2A8": 9.0, "W1A8": 12.0})
    }
    assert {name for name, bar in found.items() if bar.passed} == {
        f"{n}: BLEU, TBT - baseline" for n in ("W2A8", "W1A8", "W2A2", "W1A1")
    }
    assert len(found) == 11
    assert found["W1A1: BLEU / float"].measured == 0.25 and found["times smaller, the least"].measured == 9


def test_a_translation_ends():
    assert until_end([5, 6, 2, 7]) == [5, 6] and until_end([5, 1, 1]) == [5] and until_end([5]) == [5]


def test_quick():
    claim = reproduce(quick=True)
    assert [bar.name for bar in claim.bars if not bar.passed] == []
