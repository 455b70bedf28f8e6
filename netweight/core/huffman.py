"""Huffman codes: how short a stream of symbols becomes when frequent ones get short codes.

Paper: Huffman, "A Method for the Construction of Minimum-Redundancy Codes", Proceedings of the IRE, 1952.

    entropy <= mean length < entropy + 1,        entropy = -sum p log2 p,        sum 2^-length = 1 (Kraft)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def lengths(counts: Sequence[int]) -> list[int]:
    """Bits of each symbol's code, 0 for a symbol that does not occur; a single symbol takes one bit.

    Raises ValueError for a negative count.
    """
    if any(count < 0 for count in counts):
        raise ValueError(f"counts of symbols are 0 or more, got {min(counts)}")
    found = [0] * len(counts)
    heap = [(count, place, [place]) for place, count in enumerate(counts) if count]
    if len(heap) == 1:
        found[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (less, _, some), (more, place, others) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in (*some, *others):
            found[symbol] += 1
        heapq.heappush(heap, (less + more, place, some + others))
    return found


def total_bits(counts: Sequence[int]) -> int:
    """Bits of the whole stream, without the table of codes."""
    return sum(count * length for count, length in zip(counts, lengths(counts), strict=True))


def entropy(counts: Sequence[int]) -> float:
    """Bits per symbol that no code of single symbols stays below."""
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)
