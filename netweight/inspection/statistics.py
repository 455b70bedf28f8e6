"""Whether measurements differ: Welch's t, one-way analysis of variance, Hedges' g, a ratio's interval.

Sources: Welch, "The generalization of Student's problem when several different population variances are
involved", Biometrika 1947; Fisher, "Statistical Methods for Research Workers", 1925; Hedges, "Distribution
theory for Glass's estimator of effect size", Journal of Educational Statistics 1981; the tests are SciPy's.

    g = (mean b - mean a) / s * (1 - 3 / (4 (n_a + n_b) - 9)),    s^2 the variance pooled over both groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from netweight.core.errors import BadInput
from netweight.core.intervals import percentiles, resampled_means


@dataclass(frozen=True)
class Difference:
    """Of group b from group a.

    ratio: of their means, b over a, in low..high at 95 % (bootstrap). p: of Welch's test, two-sided: how
    likely a difference as large is where there is none. g: the difference in standard deviations.
    """

    ratio: float
    low: float
    high: float
    p: float
    g: float


def difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Difference:
    """Of two groups of independent measurements; raises `BadInput` for fewer than two in one."""
    first, second = (checked(group) for group in (a, b))
    means = [
        resampled_means(group[:, None], seed=2 * seed + index)[:, 0]
        for index, group in enumerate((first, second))
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentiles(means[1] / means[0])
        ratio = float(second.mean() / first.mean())
    return Difference(ratio, low, high, welch(first, second), hedges(first, second))


def welch(a: np.ndarray, b: np.ndarray) -> float:
    """p of equal means, whatever the variances; of groups without any variance 0 or 1."""
    if a.std() == b.std() == 0:
        return float(a.mean() == b.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that hardly differ: p is right all the same
        return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def hedges(a: np.ndarray, b: np.ndarray) -> float:
    """g, infinite where groups without variance differ."""
    n = len(a) + len(b)
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (n - 2)
    apart = float(b.mean() - a.mean())
    if pooled == 0:
        return math.copysign(math.inf, apart) if apart else 0.0
    return apart / math.sqrt(pooled) * (1 - 3 / (4 * n - 9))


def anova(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(F, p) of equal means in all groups, two or more of at least two measurements each."""
    if len(groups) < 2:
        raise BadInput(f"{len(groups)} groups: an analysis of variance compares two or more")
    checked_groups = [checked(group) for group in groups]
    if all(group.std() == 0 for group in checked_groups):
        same = len({float(group.mean()) for group in checked_groups}) == 1
        return (0.0, 1.0) if same else (math.inf, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.f_oneway(*checked_groups)
    return float(found.statistic), float(found.pvalue)


def checked(group: Sequence[float]) -> np.ndarray:
    """As float64; raises `BadInput` for fewer than two or values that are not finite."""
    values = np.asarray(group, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise BadInput(f"{len(values)} measurements: a group needs two or more finite numbers; repeat more")
    return values
