"""BLEU against a hand example and its own properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.bleu import bleu
from netweight.core.errors import BadInput

sentences = st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=9), min_size=1, max_size=5)


def test_by_hand():
    found, wanted = [[1, 1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 6, 7]]
    # 1-grams 5/6 (the second 1 is one too many), 2-grams 4/5, 3-grams 3/4, 4-grams 2/3; 6 tokens for 7
    precisions = (5 / 6) * (4 / 5) * (3 / 4) * (2 / 3)
    assert bleu(found, wanted) == pytest.approx(100 * math.exp(1 - 7 / 6) * precisions**0.25)


def test_counts_are_of_the_corpus():
    found, wanted = [[1, 2, 3, 4, 5], [9]], [[1, 2, 3, 4, 5], [8]]
    # the second phrase has no longer grams: it counts among single tokens alone
    assert bleu(found, wanted) == pytest.approx(100 * (5 / 6) ** 0.25)


@given(sentences)
def test_the_reference_itself_has_100_and_length_is_not_rewarded(references):
    assert bleu(references, references) == pytest.approx(100)
    assert bleu([[*r, 7] for r in references], references) < 100
    assert bleu([r[:-1] for r in references], references) < 100


def test_nothing_in_common_and_bad_input():
    assert bleu([[1, 2, 3, 4]], [[5, 6, 7, 8]]) == 0
    assert bleu([[1, 2, 3]], [[1, 2, 3]]) == 0  # no 4-gram, no smoothing
    for found, wanted in (([], []), ([[1]], [])):
        with pytest.raises(BadInput, match="give one for each"):
            bleu(found, wanted)
