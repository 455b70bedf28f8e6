"""Classes of different sizes: the profiles, the cut, and what cannot be cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data
from netweight.data.imbalanced import counts_of, cut, long_tail_counts, step_counts


def numbered(count: int = 60, classes: int = 4) -> Data:
    return Data(torch.arange(count).float()[:, None], torch.arange(count) % classes, classes=tuple("abcdef"))


def test_profiles_by_hand():
    assert step_counts(4, 500, 10, (0, 2)) == (50, 500, 50, 500)
    assert step_counts(5, 30, 100) == (30, 30, 1, 1, 1)
    assert long_tail_counts(3, 400, 100) == (400, 40, 4)
    assert long_tail_counts(1, 7, 10) == (7,)


@settings(deadline=None)
@given(classes=st.integers(2, 12), most=st.integers(1, 1000), ratio=st.floats(1, 1000))
def test_profiles_go_from_most_to_most_over_ratio(classes, most, ratio):
    tail, least = long_tail_counts(classes, most, ratio), max(1, round(most / ratio))
    assert tail[0] == most and abs(tail[-1] - least) <= 1 and [*tail] == sorted(tail, reverse=True)
    assert set(step_counts(classes, most, ratio)) == {most, least}


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 15), min_size=4, max_size=4).filter(any), seed=st.integers(0, 99))
def test_a_cut_holds_what_was_asked_for_and_keeps_order_and_labels(counts, seed):
    data = numbered()
    found = cut(data, counts, seed)
    assert counts_of(found, 4).tolist() == counts
    places = found.x[:, 0].long()
    assert (places.diff() > 0).all() and torch.equal(found.y, data.y[places])
    assert torch.equal(cut(data, counts, seed).x, found.x)


def test_the_seed_chooses_and_the_data_stay():
    data = numbered()
    assert not torch.equal(cut(data, (5, 5, 5, 5), 0).x, cut(data, (5, 5, 5, 5), 1).x)
    assert len(data) == 60 and len(cut(data, (5, 0, 0, 0))) == 5


def test_empty_classes_are_counted():
    assert counts_of(numbered()).tolist() == [15, 15, 15, 15, 0, 0]


def test_what_cannot_be_cut():
    with pytest.raises(BadInput, match="16 examples of class 1 are asked for, it has 15"):
        cut(numbered(), (1, 16))
    with pytest.raises(BadInput, match="-1 examples"):
        cut(numbered(), (1, -1))
    for bad in ((0, 5, 2.0), (3, 0, 2.0), (3, 5, 0.5), (3, 5, float("nan")), (3, 5, float("inf"))):
        with pytest.raises(BadInput, match="classes="):
            step_counts(*bad)
        with pytest.raises(BadInput, match="classes="):
            long_tail_counts(*bad)
    with pytest.raises(BadInput, match="rare="):
        step_counts(3, 5, 2.0, (3,))
    for y in (None, torch.rand(4), torch.zeros(4, 2, dtype=torch.int64)):
        with pytest.raises(DoesNotFit, match="class"):
            counts_of(Data(torch.rand(4, 1), y))
    with pytest.raises(DoesNotFit, match="from -1 to 1"):
        counts_of(Data(torch.rand(2, 1), torch.tensor([-1, 1])))
