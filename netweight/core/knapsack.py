"""Multiple-choice knapsack, exact: of every group one option, the least summed value within all ceilings.

    minimise    sum_l sum_o v_lo z_lo
    subject to  sum_o z_lo = 1 for every group l,   sum_lo c^k_lo z_lo <= B_k for every ceiling k,   z binary

Most of the problem is decided before an integer solver sees it (Kellerer, Pferschy and Pisinger, "Knapsack
Problems", 2004, chapter 11). For multipliers m >= 0 and reduced values r_lo = v_lo + m . c_lo,

    L(m) = sum_l min_o r_lo - m . B

is a lower bound, tightest at the multipliers of the linear programme. With U the value of any plan that fits,
an option with r_lo - min_o r_lo > U - L(m) is part of no better plan and is dropped. What is left goes to HiGHS,
scaled by U - L(m); what comes back is checked against the ceilings without the solver's tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

SLACK = 1e-12  # a sum of costs may pass its ceiling by this share: the rounding of the sum


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

    @property
    def scale(self) -> Float[np.ndarray, " k"]:
        """The size of the costs: rows divided by it suit a solver."""
        return np.abs(self.cost).max(0, initial=0) + np.finfo(float).tiny


def solve(
    values: Sequence[np.ndarray], costs: Sequence[np.ndarray], ceilings: Sequence[float]
) -> list[int] | None:
    """The chosen option of each group, None where no plan fits.

    values: an array for each group. costs: `options k` for each group. ceilings: k numbers. Of equal options of a
    group the first is chosen.
    """
    sizes = [len(value) for value in values]
    first = np.cumsum([0, *sizes[:-1]])
    group = np.repeat(np.arange(len(sizes)), sizes)
    whole = Problem(group, np.concatenate(values), np.concatenate(costs), np.asarray(ceilings, float))
    left = np.flatnonzero(undominated(values, costs))
    problem = whole.only(left)
    m = multipliers(problem)
    if m is None:
        return None
    plan = good_plan(problem, m)
    if plan is None:
        plan = programme(problem, float(np.ptp(problem.value)))
    else:
        kept, gap = undecided(problem, m, plan)
        if len(kept) > len(sizes):
            left, problem = left[kept], problem.only(kept)
            plan = programme(problem, gap)
        
    return None if plan is None else (left[plan] - first).tolist()


def undominated(values: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> Bool[np.ndarray, " n"]:
    """False for every option that another of its group equals or beats in value and in all costs."""
    masks = []
    for value, cost in zip(values, costs):
        rows = np.column_stack([value, cost])
        matches = (rows[:, None] <= rows[None]).all(-1)
        earlier = np.triu(np.ones(matches.shape, bool), 1)
        masks.append(~(matches & (~matches.T | earlier)).any(0))
    return np.concatenate(masks)


def one_each(problem: Problem):  # noqa: ANN201
    """The matrix whose product with z counts the options chosen in each group."""
    from scipy.sparse import csr_array

    n = len(problem.group)
    return csr_array((np.ones(n), (problem.group, np.arange(n))))


def multipliers(problem: Problem) -> Float[np.ndarray, " k"] | None:
    """m: what one more unit under each ceiling is worth in the linear programme, None where that has no plan."""
    from scipy.optimize import linprog

    unit = np.abs(problem.value).max() or 1.0
    found = linprog(
        problem.value / unit,
        A_ub=(problem.cost / problem.scale).T,
        b_ub=problem.ceiling / problem.scale,
        A_eq=one_each(problem),
        b_eq=np.ones(problem.group[-1] + 1),
        bounds=(0, None),
        method="highs",
    )
    if found.status == 2:
        return None
    return np.maximum(-found.ineqlin.marginals, 0) * unit / problem.scale


def good_plan(problem: Problem, m: Float[np.ndarray, " k"]) -> Int[np.ndarray, " groups"] | None:
    """Places of a plan that fits: the best for m, mended, then bettered one group at a time; None if mending fails."""
    plan = problem.least(problem.value + problem.cost @ m)
    while True:
        now = plan[problem.group]
        total = problem.cost[plan].sum(0)
        gain, extra = problem.value - problem.value[now], problem.cost - problem.cost[now]
        if problem.fits(total):
            moves = np.flatnonzero(problem.fits(total + extra) & (gain < 0))
            price = gain[moves]
        else:
            over = np.maximum(np.stack([total + extra, np.broadcast_to(total, extra.shape)]) - problem.ceiling, 0)
            less, before = (over / problem.scale).sum(-1)
            moves = np.flatnonzero(less < before * (1 - 1e-9))
            price = (gain + extra @ m)[moves] / (before - less)[moves]
            if not len(moves):
                return None
        if not len(moves):
            return plan
        move = moves[price.argmin()]
        plan[problem.group[move]] = move


def undecided(
    problem: Problem, m: Float[np.ndarray, " k"], plan: Int[np.ndarray, " groups"]
) -> tuple[Int[np.ndarray, " kept"], float]:
    """The options that may be part of a plan at least as good as this one, and U - L(m)."""
    reduced = problem.value + problem.cost @ m
    least = reduced[problem.least(reduced)]
    upper = problem.value[plan].sum()
    gap = upper - (least.sum() - m @ problem.ceiling)
    rounding = 1e-12 * (np.abs(upper) + np.abs(least).sum())
    kept = reduced - least[problem.group] <= gap + rounding
    kept[plan] = True
    return np.flatnonzero(kept), max(gap, rounding)


def programme(problem: Problem, unit: float) -> Int[np.ndarray, " groups"] | None:
    """Places of the best plan, None where none fits, by an integer programme that is exact to 1e-6 units."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    base = problem.least(problem.value)[problem.group]
    value = (problem.value - problem.value[base]) / (unit or 1.0)
    extra, room = problem.cost - problem.cost[base], problem.ceiling - problem.cost[problem.least(problem.value)].sum(0)
    scale = np.abs(extra).max(0) + np.finfo(float).tiny
    limits = [
        LinearConstraint(one_each(problem), lb=1.0, ub=1.0),
        LinearConstraint((extra / scale).T, ub=room / scale),
    ]
    while True:
        found = milp(
            value,
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
        taken = np.zeros(len(value))  # within the solver's tolerance alone: this plan and no other is forbidden
        taken[plan] = 1
        limits.append(LinearConstraint(taken, ub=len(plan) - 1))
