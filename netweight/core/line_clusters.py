"""k-means of numbers, exact: no seeds, no local minima.

    minimise  sum_c sum_{v in c} (v - mean c)^2   over all partitions of n numbers into k clusters.

On a line the clusters of the best partition are intervals, so with the numbers sorted

    D_m(j) = min_i  D_{m-1}(i) + cost(i, j),      cost(i, j) = sum_{i<=t<j} (v_t - mean)^2,

from sums of v and v^2 alone. The best i never falls as j grows, so each D_m takes O(n log n) (Wu, "Optimal
quantization by matrix searching", 1991; Wang and Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

POINTS = 1 << 18  # more numbers than these are first averaged over runs of neighbours


def centres(values: Float[np.ndarray, " n"], clusters: int) -> Float[np.ndarray, " clusters"]:
    """The ascending means of the best partition; the largest is repeated where there are fewer numbers.

    Exact in float64 up to `POINTS` numbers; beyond, exact for the means of runs of equally many neighbours.
    Of equally good partitions the one whose upper clusters begin lowest is taken.
    """
    if clusters < 1 or not len(values):
        raise ValueError(f"need at least one cluster and one number, got {clusters} of {len(values)}")
    points, counts = _points(np.sort(np.asarray(values, dtype=float)))
    sums = Sums(points, counts)
    n, parts = len(points), min(clusters, len(points))
    best = sums.cost(np.zeros(n + 1, int), np.arange(n + 1))
    begins: list[np.ndarray] = []
    for part in range(2, parts):
        best, begin = _add(sums, best, part)
        begins.append(begin)
    if parts > 1:  # of the last cluster only the whole is asked for
        before = np.arange(parts - 1, n)
        whole = best[before] + sums.cost(before, np.full(len(before), n))
        begins.append(np.full(n + 1, before[int(whole.argmin())]))
    ends = [n]
    for begin in reversed(begins):
        ends.append(int(begin[ends[-1]]))
    edges = np.array([0, *reversed(ends)])
    means = sums.mean(edges[:-1], edges[1:])
    return np.concatenate([means, np.full(clusters - parts, means[-1])])


class Sums:
    """Sums over all numbers before each place, of which costs are differences."""

    def __init__(self, points: Float[np.ndarray, " n"], counts: Float[np.ndarray, " n"]) -> None:
        self.middle = float(points @ counts / counts.sum())
        around = points - self.middle  # squares of large numbers would cancel
        self.count = np.concatenate([[0.0], counts.cumsum()])
        self.first = np.concatenate([[0.0], (around * counts).cumsum()])
        self.second = np.concatenate([[0.0], (around * around * counts).cumsum()])

    def mean(self, i: Int[np.ndarray, " m"], j: Int[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """Of the numbers i to j - 1."""
        return self.middle + (self.first[j] - self.first[i]) / (self.count[j] - self.count[i])

    def cost(self, i: Int[np.ndarray, " m"], j: Int[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """Their summed squared distances from their mean, 0 for none."""
        total = self.first[j] - self.first[i]
        count = np.maximum(self.count[j] - self.count[i], 1e-300)
        return np.maximum(self.second[j] - self.second[i] - total * total / count, 0.0)


def _points(ordered: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and how often each counts."""
    if len(ordered) <= POINTS:
        return ordered, np.ones(len(ordered))
    begins = np.linspace(0, len(ordered), POINTS, endpoint=False).astype(int)
    counts = np.diff(np.append(begins, len(ordered))).astype(float)
    return np.add.reduceat(ordered, begins) / counts, counts


def _add(sums: Sums, best: Float[np.ndarray, " m"], part: int) -> tuple[np.ndarray, np.ndarray]:
    """D_part and where its last cluster begins, for every end, from D_(part - 1).

    The middle end of every open span is solved, which halves the span; all spans of a round at once.
    """
    n = len(best) - 1
    value, begin = np.full(n + 1, np.inf), np.zeros(n + 1, int)
    spans = np.array([[part, n, part - 1, n - 1]])  # ends from, to; begins from, to
    while len(spans):
        end = (spans[:, 0] + spans[:, 1]) // 2
        last = np.minimum(spans[:, 3], end - 1)
        width = last - spans[:, 2] + 1
        starts = np.concatenate([[0], width.cumsum()[:-1]])
        row = np.repeat(np.arange(len(spans)), width)
        i = np.arange(len(row)) - starts[row] + spans[row, 2]
        total = best[i] + sums.cost(i, end[row])
        least = np.minimum.reduceat(total, starts)
        chosen = np.minimum.reduceat(np.where(total == least[row], i, n), starts)
        value[end], begin[end] = least, chosen
        left = np.column_stack([spans[:, 0], end - 1, spans[:, 2], chosen])
        right = np.column_stack([end + 1, spans[:, 1], chosen, spans[:, 3]])
        spans = np.concatenate([left, right])
        spans = spans[spans[:, 0] <= spans[:, 1]]
    return value, begin
