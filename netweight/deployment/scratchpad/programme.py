"""Order and replacement as one integer programme (the formulation of the scheduler without addresses).

Operators i and steps s = 1 .. n, tensors t of S_t bytes; binary y_is (i has run by the end of step s),
r_ts (t is resident in step s), L_ts (t is loaded for step s), w_t (t is written); x_is = y_is - y_i,s-1.

    minimise    sum_t S_t w_t + sum_ts S_t L_ts
    order       y_is >= y_i,s-1,   sum_i y_is = s,   y_is <= y_p,s-1 for p before i,
                y_is = 0 for s <= |before i|,   y_is = 1 for s > n - 1 - |after i|
    residents   r_ts <= r_t,s-1 + L_ts + x_ts,   x_is <= r_ts for what i reads and makes
    loads       L_ts <= w_t (w_t = 1 and free for sources),   L_ts <= y_t,s-1,   L_ts <= sum of x_is over
    users room        sum_t S_t r_ts + sum_i P_i x_is <= M.

A tensor never changes, so one write is enough and w_t has no step. P_i are the bytes of the sources that i
alone reads: they are loaded once and are no choice. With the order fixed (y given) it chooses what to drop.
"""

from __future__ import annotations

from collections.abc import Sequence

from netweight.core.milp import Programme, Solved
from netweight.deployment.scratchpad.workload import Schedule, Workload, schedule_of


def programme(
    work: Workload, memory: int, *, order: Sequence[int] | None = None, most: int | None = None
) -> Programme:
    """The integer programme. order: fixed. most: traffic that some schedule is known to have."""
    p, n = Programme(), work.n
    shared = [t for t in range(len(work.sizes)) if not work.private(t) and (t < n or work.users[t])]
    _order(p, work, order)
    for t in shared:
        size = work.sizes[t]
        source = t >= n
        p.binary(("w", t), cost=0 if source else size, low=int(source or t in work.outputs))
        for s in range(1, n + 1):
            p.binary(("r", t, s))
            p.binary(("L", t, s), cost=size)
            made = [] if source else _x(t, s, -1)
            held = [] if s == 1 else [(("r", t, s - 1), -1)]
            p.row([(("r", t, s), 1), *held, (("L", t, s), -1), *made], high=0)
            p.row([(("L", t, s), 1), (("w", t), -1)], high=0)
            uses = [term for i in work.users[t] for term in _x(i, s, -1)]
            p.row([(("L", t, s), 1), *uses], high=0)
            if not source:
                p.row([(("L", t, s), 1), *([(("y", t, s - 1), -1)] if s > 1 else [])], high=0)
    for s in range(1, n + 1):
        for i in range(n):
            for t in work.touched(i):
                if not work.private(t):
                    p.row([*_x(i, s, 1), (("r", t, s), -1)], high=0)
        room = [(("r", t, s), work.sizes[t]) for t in shared]
        p.row([*room, *(term for i in range(n) for term in _x(i, s, work.passing[i]))], high=memory)
    if most is not None:
        passing = sum(work.passing)
        cost = [(("w", t), work.sizes[t]) for t in shared if t < n]
        cost += [(("L", t, s), work.sizes[t]) for t in shared for s in range(1, n + 1)]
        p.row(cost, high=most - passing)
    return p


def _order(p: Programme, work: Workload, order: Sequence[int] | None) -> None:
    """y and its rows."""
    n = work.n
    after = [sum(i in work.before[j] for j in range(n)) for i in range(n)]
    place = None if order is None else {i: s for s, i in enumerate(order, 1)}
    for i in range(n):
        for s in range(1, n + 1):
            low, high = int(s > n - 1 - after[i]), int(s > len(work.before[i]))
            if place is not None:
                low = high = int(s >= place[i])
            p.binary(("y", i, s), low=low, high=high)
            if s > 1:
                p.row([(("y", i, s), 1), (("y", i, s - 1), -1)], low=0)
                for t in work.reads[i]:
                    if t < n:
                        p.row([(("y", i, s), 1), (("y", t, s - 1), -1)], high=0)
    for s in range(1, n + 1):
        p.row([(("y", i, s), 1) for i in range(n)], low=s, high=s)


def _x(i: int, s: int, factor: float) -> list[tuple[tuple[str, int, int], float]]:
    """factor * x_is as terms of a row."""
    return [(("y", i, s), factor), *([(("y", i, s - 1), -factor)] if s > 1 else [])]


def solved(
    work: Workload,
    memory: int,
    *,
    order: Sequence[int] | None = None,
    most: int | None = None,
    seconds: float = 60.0,
) -> tuple[Schedule | None, Solved]:
    """The schedule that the solver found in `seconds`, without addresses, and what it says about it.

    The bound in it counts all bytes but the loads of sources that one operator alone reads.
    """
    work.check_room(memory)
    found = programme(work, memory, order=order, most=most).solve(seconds)
    if not found.values:
        return None, found
    n = work.n
    steps = {i: next(s for s in range(1, n + 1) if found.on(("y", i, s))) for i in range(n)}
    chosen = sorted(range(n), key=steps.__getitem__)
    shared = [t for t in range(len(work.sizes)) if ("r", t, 1) in found.values]
    inside = [
        [
            *(t for t in shared if found.on(("r", t, s))),
            *(t for t in work.reads[chosen[s - 1]] if work.private(t)),
        ]
        for s in range(1, n + 1)
    ]
    return schedule_of(work, chosen, inside), found
