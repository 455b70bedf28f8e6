"""How sure a measured number is: intervals for shares, means, differences and quantiles.

Clopper-Pearson    share of n independent trials, exact                  Clopper and Pearson, 1934
paired difference  shares gained and lost, each at half the error: covers by the union bound
bootstrap          percentiles of the means of resampled examples        Efron, 1979
quantile           order statistics, exact for any distribution          David and Nagaraja, 2003
Hoeffding          mean of values in [0, 1], from above                  Hoeffding, 1963
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy.stats import beta, binom

CHUNK = 1 << 22  # resampled values in memory at a time


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval (low, high) of a share seen `hits` times in n; covers it with at least `level`."""
    _check(hits, n, level)
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def upper_bound(hits: int, n: int, confidence: float = 0.99) -> float:
    """With that confidence the share is at most this: the one-sided Clopper-Pearson bound."""
    _check(hits, n, confidence)
    return 1.0 if hits == n else float(beta.ppf(confidence, hits + 1, n - hits))


def upper_mean(values: Float[np.ndarray, " n"], confidence: float = 0.99) -> float:
    """With that confidence the mean is at most this: Clopper-Pearson for 0 and 1, Hoeffding between them."""
    if ((values < 0) | (values > 1)).any():
        raise ValueError("need values in [0, 1]")
    if is_rate(values):
        return upper_bound(int(values.sum()), len(values), confidence)
    return min(1.0, float(values.mean()) + math.sqrt(math.log(1 / (1 - confidence)) / (2 * len(values))))


def paired_difference(gained: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of share(gained) - share(lost): two judgements of 0 or 1 on the same n examples."""
    half = 1 - (1 - level) / 2
    (gain_low, gain_high), (loss_low, loss_high) = (
        clopper_pearson(gained, n, half),
        clopper_pearson(lost, n, half),
    )
    return gain_low - loss_high, gain_high - loss_low


def resampled_means(
    values: Float[np.ndarray, "n columns"], draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "draws columns"]:
    """Column means of `draws` resamplings of the rows, the same rows for all columns."""
    generator = np.random.default_rng(seed)
    n, means = len(values), []
    each = max(1, CHUNK // n)
    for start in range(0, draws, each):
        rows = generator.integers(n, size=(min(each, draws - start), n))
        means.append(np.stack([column[rows].mean(1) for column in values.T], 1))
    return np.concatenate(means)


def bootstrap_mean(
    values: Float[np.ndarray, " n"], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean; one value alone says nothing: (-inf, inf)."""
    _check(0, len(values), level)
    if len(values) == 1:
        return -math.inf, math.inf
    return percentiles(resampled_means(np.asarray(values, dtype=float)[:, None], seed=seed)[:, 0], level)


def percentiles(values: Float[np.ndarray, " draws"], level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Float[np.ndarray, " n"], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Clopper-Pearson where all values are 0 or 1, else bootstrap."""
    if is_rate(values):
        return clopper_pearson(int(values.sum()), len(values), level)
    return bootstrap_mean(values, level, seed)


def is_rate(values: Float[np.ndarray, "*any"]) -> bool:
    """Whether all values are 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def quantile_interval(values: Float[np.ndarray, " n"], q: float, level: float = 0.95) -> tuple[float, float]:
    """Two of the values with the q-quantile between them, at least at `level`; infinite if n is too small."""
    _check(0, len(values), level)
    ranked, n, tail = np.sort(values), len(values), (1 - level) / 2
    below = int(binom.ppf(tail, n, q))  # P(fewer than `below` values lie under the quantile) <= tail
    above = int(binom.isf(tail, n, q)) + 1
    low = float(ranked[below - 1]) if below > 0 else -math.inf
    return low, (float(ranked[above - 1]) if above <= n else math.inf)


def _check(hits: int, n: int, level: float) -> None:
    if not (0 <= hits <= n and n > 0 and 0 < level < 1):
        raise ValueError(f"need 0 <= hits <= n, n > 0 and a level between 0 and 1, got {hits}, {n}, {level}")
