"""How likely chance alone gives as much: tails of the binomial, of a cosine, and several of them as one.

    tail       P(X >= k), X ~ Binomial(n, q): hits by luck
    cosine     P(cos(u, v) >= t) for a direction u drawn at random in d dimensions
                   = 1/2 I_{1-t^2}((d - 1) / 2, 1/2) for t >= 0                Iscen et al. 2017
    combined   P(chi^2_{2k} >= -2 sum ln p_i) of k independent tests           Fisher 1925

I is the regularised incomplete beta function. Each is uniform on [0, 1] where nothing but chance is at work
(the first one at most as small, because hits are whole).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special, stats

from netweight.core.errors import BadInput

LEAST = 1e-300  # a product of p-values is taken of numbers that have a logarithm


def tail(hits: int, n: int, chance: float) -> float:
    """P(X >= hits) in n trials of that chance; raises `BadInput` for hits or a chance that there are none."""
    if not (0 <= hits <= n and n >= 1):
        raise BadInput(f"{hits} hits of {n}: a tail takes 0 to n hits of at least one trial")
    if not 0 <= chance <= 1:
        raise BadInput(f"chance={chance}: a chance lies between 0 and 1")
    return float(stats.binom.sf(hits - 1, n, chance))


def cosine(t: float, d: int) -> float:
    """P(cos >= t) in d >= 2 dimensions; raises `BadInput` for fewer or what is no cosine."""
    if d < 2 or not -1 <= t <= 1:
        raise BadInput(f"a cosine of {t} in {d} dimensions: give -1 to 1 in at least two dimensions")
    beyond = 0.5 * float(special.betainc((d - 1) / 2, 0.5, 1 - t * t))
    return beyond if t >= 0 else 1 - beyond


def combined(ps: Sequence[float]) -> float:
    """One p-value of several independent tests; raises `BadInput` for none, or what is no p-value."""
    if not ps or not all(0 <= p <= 1 for p in ps):
        raise BadInput(f"{list(ps)}: p-values lie between 0 and 1, and at least one is combined")
    return float(stats.chi2.sf(-2 * sum(math.log(max(p, LEAST)) for p in ps), 2 * len(ps)))
