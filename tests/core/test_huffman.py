"""Huffman codes by hand, against the entropy and Kraft's equality."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netweight.core.huffman import entropy, lengths, total_bits

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any)


def test_by_hand():
    assert lengths([8, 4, 2, 1, 1]) == [1, 2, 3, 4, 4]
    assert total_bits([8, 4, 2, 1, 1]) == 8 + 8 + 6 + 4 + 4
    assert entropy([8, 4, 2, 1, 1]) == 1.875 == total_bits([8, 4, 2, 1, 1]) / 16
    assert lengths([0, 7, 0]) == [0, 1, 0]
    assert lengths([0, 0]) == [0, 0] and total_bits([]) == 0
    with pytest.raises(ValueError, match="counts of symbols are 0 or more, got -1"):
        lengths([1, -1])


@given(COUNTS)
def test_lengths_are_a_code_and_as_short_as_the_entropy_allows(counts):
    found = lengths(counts)
    used = [length for length, count in zip(found, counts) if count]
    assert all((length == 0) == (count == 0) for length, count in zip(found, counts))
    if len(used) > 1:
        assert sum(2.0**-length for length in used) == 1
    mean = total_bits(counts) / sum(counts)
    assert entropy(counts) - 1e-9 <= mean < entropy(counts) + 1 + 1e-9
    ordered = sorted(zip(counts, found))
    assert all(a[1] >= b[1] for a, b in zip(ordered, ordered[1:]) if 0 < a[0] < b[0])
