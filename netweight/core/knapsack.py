"""Multiple-choice knapsack, exact: of every group one option, the least summed value within all ceilings.

    minimise    sum_l sum_o v_lo z_lo
    subject to  sum_o z_lo = 1 for every group l,   sum_lo c^k_lo z_lo <= B_k for every ceiling k,   z binary

For multipliers m >= 0 and reduced values r_lo = v_lo + m . c_lo,

    L(m) = sum_l min_o r_lo - m . B

is a lower bound, tightest at the multipliers of the linear programme (Kellerer, Pferschy and Pisinger,
"Knapsack Problems", 2004, chapter 11). A plan of reduced values at most g_lo = r_lo - min_o r_lo above the
least each has a value of at least L(m) + sum g, so with U the value of a plan that fits, no better plan has
sum g > U - L(m). Plans with little sum g are listed, half of the groups against the other half, until that
proves the best one.

Where the halves grow past `STATES` the rest is an integer programme for HiGHS, whose tolerance is 1e-6 of the
largest difference of two options' values; the better of its plan and the one known is taken.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

SLACK = 1e-12  # a sum of costs may pass its ceiling by this share: the rounding of the sum
STATES, PAIRS = 1_500_000, 20_000_000  # listed in one half; of both halves
CHUNK = 1_000_000  # pairs looked at together
ATTEMPTS, TOLERANCE = 10, 1e-6  # of the integer programme; of its solver
GROWTH = 1.3  # of the limit on sum g from round to round


@dataclass(frozen=True)
class Problem:
    """Options, those of group 0 first, then those of group 1 and so on; every group has at least one."""

    group: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    cost: Float[np.ndarray, "n k"]
    ceiling: Float[np.ndarray, " k"]

    def only(self, kept: np.ndarray) -> Problem:
        """The options that a mask or ascending places keep."""
        return Problem(self.group[kept], self.value[kept], self.cost[kept], self.ceiling)

    def fits(self, total: Float[np.ndarray, "*b k"]) -> Bool[np.ndarray, "*b"]:
        """Whether summed costs are within all ceilings."""
        return (total <= self.ceiling + SLACK * np.abs(self.ceiling)).all(-1)

    def least(self, amount: Float[np.ndarray, " n"]) -> Int[np.ndarray, " groups"]:
        """The place of the smallest amount in each group, the first of equals."""
        order = np.lexsort((amount, self.group))
        return order[np.flatnonzero(np.diff(self.group, prepend=-1))]

    def worth(self, plan: Int[np.ndarray, " groups"]) -> float:
        """The summed value of a plan, infinite if it does not fit."""
        return float(self.value[plan].sum()) if self.fits(self.cost[plan].sum(0)) else np.inf

    @property
    def scale(self) -> Float[np.ndarray, " k"]:
        """The size of the costs: rows divided by it suit a solver."""
        largest = np.abs(self.cost).max(0)
        return np.where(largest > 0, largest, 1.0)  # nothing costs anything: the ceiling stays a number


def solve(
    values: Sequence[np.ndarray], costs: Sequence[np.ndarray], ceilings: Sequence[float]
) -> list[int] | None:
    """The chosen option of each group, None where no plan fits.

    values: an array for each group. costs: `options k` for each group. ceilings: k numbers. Of equal options
    of a group the first is chosen.
    """
    sizes = [len(value) for value in values]
    whole = Problem(
        np.repeat(np.arange(len(sizes)), sizes),
        np.concatenate(values).astype(float),
        np.concatenate(costs).astype(float),
        np.asarray(ceilings, float),
    )
    left = np.flatnonzero(undominated(values, costs))
    problem = whole.only(left)
    m = multipliers(problem)
    plan = None if m is None else best_plan(problem, m)
    return None if plan is None else (left[plan] - np.cumsum([0, *sizes[:-1]])).tolist()


def undominated(values: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> Bool[np.ndarray, " n"]:
    """False for every option that another of its group equals or beats in value and in all costs."""
    masks = []
    for value, cost in zip(values, costs):
        rows = np.column_stack([value, cost])
        matches = (rows[:, None] <= rows[None]).all(-1)
        earlier = np.triu(np.ones(matches.shape, bool), 1)
        masks.append(~(matches & (~matches.T | earlier)).any(0))
    return np.concatenate(masks)


def one_each(problem: Problem) -> Any:
    """The sparse matrix whose product with z counts the options chosen in each group."""
    from scipy.sparse import csr_array

    n = len(problem.group)
    return csr_array((np.ones(n), (problem.group, np.arange(n))))


def multipliers(problem: Problem) -> Float[np.ndarray, " k"] | None:
    """m: what a unit of each ceiling is worth in the linear programme, None where that has no plan."""
    from scipy.optimize import linprog

    unit = np.abs(problem.value).max() or 1.0
    found = linprog(
        problem.value / unit,
        A_ub=(problem.cost / problem.scale).T,
        b_ub=problem.ceiling / problem.scale,
        A_eq=one_each(problem),
        b_eq=np.ones(problem.group[-1] + 1),
        bounds=(0, None),
        method="highs-ipm",
    )
    if found.status == 2:
        return None
    m = np.zeros(len(problem.ceiling)) if found.x is None else -found.ineqlin.marginals
    return np.maximum(m, 0) * unit / problem.scale


def best_plan(problem: Problem, m: Float[np.ndarray, " k"]) -> Int[np.ndarray, " groups"] | None:
    """Places of the best plan, None where none fits."""
    plan = good_plan(problem, m)
    if plan is None:
        return programme(problem)
    limit = gap_of(problem, m, plan) / 1024
    while True:
        kept = within(problem, m, plan, limit)
        better = listed(problem.only(kept), m, limit)
        if better is None:
            break
        plan = min(plan, kept[better], key=problem.worth) if len(better) else plan
        gap = gap_of(problem, m, plan)
        if gap <= limit:
            return plan
        limit = min(GROWTH * limit, gap)
    kept = within(problem, m, plan, gap_of(problem, m, plan))
    other = programme(problem.only(kept))
    return plan if other is None else min(plan, kept[other], key=problem.worth)


def good_plan(problem: Problem, m: Float[np.ndarray, " k"]) -> Int[np.ndarray, " groups"] | None:
    """A plan that fits: the best for m, mended, then bettered group by group; None if mending fails."""
    plan = problem.least(problem.value + problem.cost @ m)
    while True:
        now = plan[problem.group]
        total = problem.cost[plan].sum(0)
        gain, extra = problem.value - problem.value[now], problem.cost - problem.cost[now]
        if problem.fits(total):
            moves = np.flatnonzero(problem.fits(total + extra) & (gain < 0))
            price = gain[moves]
        else:
            over = np.maximum(total - problem.ceiling, 0) / problem.scale
            less = over.sum() - (np.maximum(total + extra - problem.ceiling, 0) / problem.scale).sum(-1)
            moves = np.flatnonzero(less > 1e-9 * over.sum())
            price = (gain + extra @ m)[moves] / less[moves]
            if not len(moves):
                return None
        if not len(moves):
            return plan
        move = moves[price.argmin()]
        plan[problem.group[move]] = move


def gap_of(problem: Problem, m: Float[np.ndarray, " k"], plan: Int[np.ndarray, " groups"]) -> float:
    """U - L(m) for a plan that fits, with what rounding may take from it."""
    reduced = problem.value + problem.cost @ m
    least = reduced[problem.least(reduced)]
    chosen = problem.value[plan]
    rounding = 1e-12 * (np.abs(chosen).sum() + np.abs(least).sum())
    return float(max(chosen.sum() - (least.sum() - m @ problem.ceiling), 0.0) + rounding)


def within(
    problem: Problem, m: Float[np.ndarray, " k"], plan: Int[np.ndarray, " groups"], limit: float
) -> Int[np.ndarray, " kept"]:
    """The options that a plan with sum g <= limit may hold."""
    reduced = problem.value + problem.cost @ m
    return np.flatnonzero(reduced - reduced[problem.least(reduced)][problem.group] <= limit)


def listed(problem: Problem, m: Float[np.ndarray, " k"], limit: float) -> Int[np.ndarray, " groups"] | None:
    """The best plan that fits with sum g <= limit; empty if there is none, None if they are too many."""
    reduced = problem.value + problem.cost @ m
    base = problem.least(reduced)
    above = reduced - reduced[base[problem.group]]
    decided = np.bincount(problem.group) == 1
    others = above.copy()
    others[base] = np.inf
    nearest = np.minimum.reduceat(others, np.flatnonzero(np.diff(problem.group, prepend=-1)))
    open_ = np.flatnonzero(~decided)
    open_ = open_[np.argsort(-nearest[open_], kind="stable")]  # those that split often come last
    one, other = Half(problem, above, limit), Half(problem, above, limit)
    if not (one.extend(open_[::2]) and other.extend(open_[1::2])):
        return None
    one.cost += problem.cost[base[decided]].sum(0)
    pair = best_pair(problem, m, limit, one, other)
    if pair is None:
        return None
    plan = base.copy()
    for half, state in zip((one, other), pair):
        for place in half.places(state):
            plan[problem.group[place]] = place
    return plan if pair else np.empty(0, int)


class Half:
    """All choices in some groups with sum g <= limit: g, value and cost of each, and how each came about."""

    def __init__(self, problem: Problem, above: Float[np.ndarray, " n"], limit: float) -> None:
        self.problem, self.above, self.limit = problem, above, limit
        self.g, self.value, self.cost = np.zeros(1), np.zeros(1), np.zeros((1, len(problem.ceiling)))
        self.trail: list[tuple[np.ndarray, np.ndarray]] = []

    def extend(self, groups: Int[np.ndarray, " half"]) -> bool:
        """Add those groups; False if there are more than `STATES` choices."""
        for group in groups:
            options = np.flatnonzero(self.problem.group == group)
            sums = self.g[:, None] + self.above[options]
            state, option = np.nonzero(sums <= self.limit)
            if len(state) > STATES:
                return False
            chosen = options[option]
            self.g = sums[state, option]
            self.value = self.value[state] + self.problem.value[chosen]
            self.cost = self.cost[state] + self.problem.cost[chosen]
            self.trail.append((state, chosen))
        return True

    def places(self, state: int) -> list[int]:
        """The options of one of the choices."""
        found = []
        for parents, chosen in reversed(self.trail):
            found.append(int(chosen[state]))
            state = parents[state]
        return found


def best_pair(
    problem: Problem, m: Float[np.ndarray, " k"], limit: float, one: Half, other: Half
) -> tuple[int, int] | tuple[()] | None:
    """The choices of two halves that fit together at the least value; empty if there are none, None if too
    many.

    A plan of value at most L(m) + limit has m_k (B_k - c_k) <= limit for every ceiling k: partners lie in a
    narrow window. It is looked up in cells as wide as itself, along the two ceilings that tell most apart.
    """
    tell = m * np.ptp(other.cost, axis=0)
    axes = np.argsort(-tell, kind="stable")[:2]
    axes = axes[tell[axes] > 0]
    rounding = 4 * SLACK * np.abs(problem.ceiling[axes])
    width = np.maximum(limit / m[axes], np.ptp(other.cost[:, axes], axis=0) / 2**30) + rounding
    low = other.cost[:, axes].min(0)
    cell = ((other.cost[:, axes] - low) / width).astype(np.int64)
    size = cell.max(0, initial=0) + 1
    stride = np.array([1, size[0]] if len(axes) == 2 else [1] * len(axes), np.int64)
    order = (cell @ stride).argsort(kind="stable")
    keys = (cell @ stride)[order]
    top = np.floor((problem.ceiling[axes] + rounding / 2 - one.cost[:, axes] - low) / width)

    best, pair, looked = np.inf, (), 0
    for below in itertools.product((0, 1), repeat=len(axes)):
        wanted = np.clip(top - below, -1, size).astype(np.int64)
        inside = ((wanted >= 0) & (wanted < size)).all(1)
        start, stop = (np.searchsorted(keys, wanted @ stride, side=side) for side in ("left", "right"))
        counts = np.where(inside, stop - start, 0)
        ends = counts.cumsum()
        looked += int(ends[-1])
        if looked > PAIRS:
            return None
        for first in range(0, int(ends[-1]), CHUNK):
            number = np.arange(first, min(first + CHUNK, int(ends[-1])))
            a = np.searchsorted(ends, number, side="right")
            b = order[start[a] + number - (ends[a] - counts[a])]
            fits = problem.fits(one.cost[a] + other.cost[b])
            value = np.where(fits, one.value[a] + other.value[b], np.inf)
            least = int(value.argmin())
            if value[least] < best:
                best, pair = value[least], (int(a[least]), int(b[least]))
    return pair


def programme(problem: Problem) -> Int[np.ndarray, " groups"] | None:
    """Places of the best plan to the solver's tolerance, None where none fits, by an integer programme."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    base = problem.least(problem.value)
    value, extra = (
        problem.value - problem.value[base][problem.group],
        problem.cost - problem.cost[base][problem.group],
    )
    scale = np.abs(extra).max(0) + np.finfo(float).tiny
    limits = [
        LinearConstraint(one_each(problem), lb=1.0, ub=1.0),
        LinearConstraint((extra / scale).T, ub=(problem.ceiling - problem.cost[base].sum(0)) / scale),
    ]
    for attempt in range(3 * ATTEMPTS):
        with silent():
            found = milp(
                value / (value.max() or 1.0),
                constraints=limits,
                integrality=np.ones(len(value)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0},
            )
        if found.x is None:
            return None
        plan = problem.least(-found.x)
        if problem.fits(problem.cost[plan].sum(0)):
            return plan
        taken = np.zeros(len(value))  # it fits within the solver's tolerance alone: forbid it, look again
        taken[plan] = 1
        limits.append(LinearConstraint(taken, ub=len(plan) - 1))
        if attempt >= ATTEMPTS:  # there are many such plans: stay clear of the ceilings
            limits[1] = LinearConstraint(limits[1].A, ub=limits[1].ub - TOLERANCE)
    return None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing reaches standard output: HiGHS writes there although told not to, and --json promises JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
