"""COSMA: operator order, addresses and replacement in a scratchpad, with the fewest bytes moved off the chip.

Paper: Li, Gupta and Malik, "Combined Scheduling, Memory Allocation and Tensor Replacement for Minimizing
Off-Chip Data Accesses of DNN Accelerators", 2023, arXiv:2311.18246.

    work = workload(capture(model, x))
    found = cosma(work, memory=64_000)
    found.traffic, found.compulsory, found.bound       # bytes; found.proven: no schedule moves fewer
    replay(work, found.schedule, 64_000)               # every byte counted again, every address checked

Three things are chosen together: which operator runs in which step, which tensors stay, and where each of
them lies. Order and replacement are solved without addresses first, which gives a lower bound; if addresses
for that schedule exist, it is the best of the whole problem. If none are found, stays are cut until there
are, and the gap to the bound is stated.

Two exact engines for order and replacement: `search` (`search.py`) and the integer programme
(`programme.py`); the first is the default, being faster on every graph we tried, and the second
confirms it in the tests. Where the search runs out of states the graph is divided: windows of operators,
cut where an order has the fewest live bytes, are solved one after the other, each from the state of the
scratchpad that the last one left; then again along the order found, with other cuts. The bound is then the
larger of two: what the search of the whole graph had proved when it stopped, and the sum over windows of the
best that each could do alone, every tensor counted in one of them.

Differs from the paper: weights are sources that are read once, fused elementwise operators count as one,
views cost nothing; a tensor is written at most once, as it never changes. The paper's own variables and
baselines were not read: formulation and search are this project's own, exact for the problem stated in
`workload.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from netweight.core.errors import unknown
from netweight.core.progress import steps
from netweight.deployment.scratchpad.orders import belady, greedy, topological
from netweight.deployment.scratchpad.place import placed, repaired
from netweight.deployment.scratchpad.programme import solved
from netweight.deployment.scratchpad.search import Machine, Move, bits, schedule_from, search
from netweight.deployment.scratchpad.workload import Schedule, Workload

Method = Literal["search", "milp", "divide"]
METHODS = ("search", "milp", "divide")
STATES = 15_000  # of a search of the whole graph
WINDOW = 16  # operators in a window, at most
PART = 4_000  # states of the search of a window
SHARES = (0.98, 0.95, 0.92, 0.88, 0.84)  # of the memory, where addresses are hard to find


@dataclass(frozen=True)
class Solution:
    """A schedule with addresses. traffic, compulsory, bound: bytes; no schedule moves less than `bound`.

    method: how the order was had. seconds: spent. cut: whether stays were cut for the sake of addresses.
    """

    schedule: Schedule
    memory: int
    traffic: int
    compulsory: int
    bound: int
    method: str
    seconds: float
    cut: bool

    @property
    def proven(self) -> bool:
        """Whether no schedule moves fewer bytes."""
        return self.traffic <= self.bound

    @property
    def avoidable(self) -> int:
        """Bytes moved beyond the compulsory ones."""
        return self.traffic - self.compulsory


def cosma(
    work: Workload,
    memory: int,
    *,
    method: Method = "search",
    seconds: float = 60.0,
    states: int = STATES,
    window: int = WINDOW,
) -> Solution:
    """The best schedule found for a scratchpad of `memory` bytes, with addresses.

    method: "search" (divides where the states run out), "milp" (the integer programme within `seconds`), or
    "divide" (windows at once). Raises `ImpossibleBudget` where the largest step does not fit, which says
    what would.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    work.check_room(memory)
    started = time.perf_counter()
    known = min((belady(work, order, memory) for order in orders(work)), key=lambda s: s.traffic(work))
    best, bound, how = known, work.compulsory, "greedy"
    if known.traffic(work) > bound:
        if method == "milp":
            best, bound = _programme(work, memory, known, seconds)
            how = "integer programme"
        else:
            limit = states if method == "search" else 0
            best, bound, how = _searched(work, memory, known, limit, window)
    schedule, cut = _addresses(work, memory, (best, known))
    if cut and method != "milp":
        schedule = _roomier(work, memory, schedule, window)
    spent, traffic = time.perf_counter() - started, schedule.traffic(work)
    return Solution(schedule, memory, traffic, work.compulsory, min(bound, traffic), how, spent, cut)


def orders(work: Workload) -> list[tuple[int, ...]]:
    """The orders that a good one is looked for from."""
    return [topological(work), greedy(work)]


def _addresses(work: Workload, memory: int, found: Sequence[Schedule]) -> tuple[Schedule, bool]:
    """The schedule with addresses that moves the fewest bytes, and whether stays were cut for it."""
    fits = [s for s in (placed(work, one, memory) for one in dict.fromkeys(found)) if s is not None]
    if not fits or fits[0].traffic(work) > found[0].traffic(work):
        fits += [repaired(work, one, memory) for one in dict.fromkeys(found)]
    best = min(fits, key=lambda s: s.traffic(work))
    return best, best.traffic(work) > min(one.traffic(work) for one in found)


def _roomier(work: Workload, memory: int, known: Schedule, window: int) -> Schedule:
    """A better schedule, from solving for a little less memory: addresses for that come easier."""
    for share in SHARES:
        room = int(share * memory)
        if room < work.least or known.traffic(work) == work.compulsory:
            break
        found, bound, _ = _searched(work, room, known, PART, window)
        fits = placed(work, found, memory) if found is not known else None
        known = known if fits is None else min(known, fits, key=lambda s: s.traffic(work))
        if bound >= known.traffic(work):
            break
    return known


def _programme(work: Workload, memory: int, known: Schedule, seconds: float) -> tuple[Schedule, int]:
    """The schedule and the bound of the integer programme; the known one where it found none."""
    schedule, found = solved(work, memory, most=known.traffic(work), seconds=seconds)
    rest = sum(work.passing)
    bound = max(work.compulsory, -int(-(found.bound - 1e-6 * max(1.0, abs(found.bound))) // 1) + rest)
    return (known if schedule is None else schedule), bound


def _searched(
    work: Workload, memory: int, known: Schedule, limit: int, window: int
) -> tuple[Schedule, int, str]:
    """The schedule, the bound and how: one search of everything, windows where that is too much."""
    bound = work.compulsory
    if limit:
        machine = Machine(work, memory)
        most = known.traffic(work) - work.compulsory
        found = search(machine, machine.start(), bits(range(work.n)), limit=limit, most=most)
        bound += min(found.bound, most)
        if found.moves is not None:
            return schedule_from(work, found.moves), bound, "search"
        if found.bound >= most:
            return known, bound, "search"
    best = divided(work, memory, known, window)
    return best, max(bound, work.compulsory + apart(work, memory, best.order, window)), "divide and conquer"


def divided(work: Workload, memory: int, known: Schedule, window: int = WINDOW) -> Schedule:
    """Window after window along several orders, then along the best order found; never worse than `known`."""
    best = known
    tried = [(order, shift) for order in (*orders(work), known.order) for shift in (0, window // 2)]
    seen: set[tuple[tuple[int, ...], int]] = set()
    machine = Machine(work, memory)
    for order, shift in steps(tried, "Windows"):
        while (order, shift) not in seen:
            seen.add((order, shift))
            moves = _windows(machine, windows(work, order, window, shift))
            found = schedule_from(work, tuple(moves))
            if found.traffic(work) >= best.traffic(work):
                break
            best, order, shift = found, found.order, window // 2 - shift
    return best


def windows(work: Workload, order: Sequence[int], most: int, shift: int = 0) -> list[tuple[int, ...]]:
    """The order in parts of at most `most` operators, cut where the fewest bytes are live.

    shift: operators by which the first part may be shorter.
    """
    live = live_bytes(work, order)
    parts, start, longest = [], 0, most - shift
    while start < len(order):
        stop = min(start + longest, len(order))
        if stop < len(order):
            low = start + max(1, (3 * longest) // 4)
            stop = min(range(low, stop + 1), key=lambda s: (live[s - 1], -s))
        parts.append(tuple(order[start:stop]))
        start, longest = stop, most
    return parts


def live_bytes(work: Workload, order: Sequence[int]) -> list[int]:
    """Bytes of tensors that are made and still to be read, after each step."""
    place = {i: s for s, i in enumerate(order)}
    change = [0] * (len(order) + 1)
    for t in range(work.n):
        if work.users[t]:
            change[place[t]] += work.sizes[t]
            change[max(place[i] for i in work.users[t])] -= work.sizes[t]
    total, found = 0, []
    for step in range(len(order)):
        total += change[step]
        found.append(total)
    return found


def _windows(machine: Machine, parts: Sequence[Sequence[int]]) -> list[Move]:
    """Each part solved from the state that the last one left; a part that is too much is halved."""
    state, moves = machine.start(), []
    queue = list(parts)
    while queue:
        part = queue.pop(0)
        found = search(machine, state, bits(part), limit=PART if len(part) > 1 else 1 << 30)
        if found.moves is None or found.end is None:
            half = len(part) // 2
            queue[:0] = [part[:half], part[half:]]
            continue
        moves += found.moves
        state = found.end
    return moves


def apart(work: Workload, memory: int, order: Sequence[int], window: int = WINDOW) -> int:
    """Bytes beyond the compulsory ones that every schedule moves: windows, each at its best for itself.

    A schedule of the whole, looked at in the steps of one window, is a schedule of that window. Each tensor
    is counted in one window only, the one with most of its users; elsewhere its loads are free.
    """
    parts = windows(work, order, window)
    where = {i: k for k, part in enumerate(parts) for i in part}
    home: dict[int, int] = {}
    for t, users in enumerate(work.users):
        if users:
            inside = [where[i] for i in (*users, *((t,) if t < work.n else ()))]
            home[t] = max(dict.fromkeys(inside), key=inside.count)
    total = 0
    for k, part in enumerate(parts):
        alone = _alone(work, part, {t for t, at in home.items() if at == k})
        machine = Machine(alone, memory)
        total += min(search(machine, machine.start(), bits(range(alone.n)), limit=PART).bound, 1 << 60)
    return total


def _alone(work: Workload, part: Sequence[int], counted: set[int]) -> Workload:
    """The operators of a window with the tensors that are counted there; others are sources of one user."""
    ordered = sorted(part)
    place = {i: k for k, i in enumerate(ordered)}
    names, sizes = [work.names[i] for i in ordered], [work.sizes[i] for i in ordered]
    reads: list[list[int]] = []
    shared: dict[int, int] = {}
    for i in ordered:
        read: list[int] = []
        for t in work.reads[i]:
            if t in place and t in counted:
                read.append(place[t])
                continue
            if t in counted and t in shared:
                read.append(shared[t])
                continue
            shared[t] = len(sizes)
            read.append(len(sizes))
            names.append(work.names[t])
            sizes.append(work.sizes[t])
        reads.append(read)
    outputs = frozenset(place[t] for t in work.outputs if t in place and t in counted)
    return Workload(tuple(names), tuple(map(tuple, reads)), tuple(sizes), outputs)
