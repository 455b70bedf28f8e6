"""BLEU of translations against one reference each, for the whole corpus, in [0, 100].

Paper: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002:

    100 min(1, exp(1 - r / c)) exp(mean over n = 1 .. 4 of log p_n),

p_n the share of the n-grams of all translations that are in their reference, each n-gram at most as often as
there; c and r the lengths of all translations and references. 0 where some p_n is 0 (no smoothing).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from netweight.core.errors import BadInput

ORDER = 4


def bleu(found: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> float:
    """BLEU of token sequences; raises `BadInput` unless there is one reference for each, and at least one."""
    if len(found) != len(references) or not found:
        raise BadInput(f"{len(found)} translations, {len(references)} references; give one for each")
    right, all_ = [0] * ORDER, [0] * ORDER
    for own, wanted in zip(found, references):
        for n in range(1, ORDER + 1):
            counts = grams(own, n)
            right[n - 1] += (counts & grams(wanted, n)).total()
            all_[n - 1] += counts.total()
    if not all(right):
        return 0.0
    c, r = sum(map(len, found)), sum(map(len, references))
    precision = sum(math.log(a / b) for a, b in zip(right, all_)) / ORDER
    return 100 * math.exp(min(0.0, 1 - r / c) + precision)


def grams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    """The n-grams of a sequence and how often they are there."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
