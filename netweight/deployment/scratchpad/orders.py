"""Baselines of the scheduler: an order by a rule, and what to drop by a rule.

Orders: as captured (topological); greedy (of the operators that can run, the one that leaves the fewest live
bytes). Dropping when room is needed: least recently used (LRU); or Belady's rule with clean tensors first,
then the one whose next use is farthest (Belady, "A study of replacement algorithms for a virtual-storage
computer", 1966). With sizes and writes Belady's rule is not optimal: it is a baseline here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from netweight.deployment.scratchpad.workload import Schedule, Workload, schedule_of

Rank = Callable[[int, int], tuple[int, ...]]  # (tensor, step) -> the largest is dropped first


def topological(work: Workload) -> tuple[int, ...]:
    """The order that the workload is given in."""
    return tuple(range(work.n))


def greedy(work: Workload) -> tuple[int, ...]:
    """Step by step the operator after which the fewest bytes are live; the first of equals."""
    left = [len(users) for users in work.users]
    done: set[int] = set()
    ready = [i for i in range(work.n) if not work.before[i]]
    order: list[int] = []

    def grows(i: int) -> int:
        freed = sum(work.sizes[t] for t in work.reads[i] if left[t] == 1 and not work.private(t))
        kept = work.sizes[i] if work.users[i] else 0
        new = sum(work.sizes[t] for t in work.reads[i] if t >= work.n and left[t] == len(work.users[t]) > 1)
        return kept + new - freed

    while ready:
        i = min(ready, key=lambda i: (grows(i), i))
        ready.remove(i)
        order.append(i)
        done.add(i)
        for t in work.reads[i]:
            left[t] -= 1
        ready += [j for j in work.users[i] if work.before[j] <= done and j not in ready]
    return tuple(order)


def belady(work: Workload, order: Sequence[int], memory: int) -> Schedule:
    """Clean tensors first, then the farthest use. Raises `ImpossibleBudget` where a step does not fit."""
    place = {i: s for s, i in enumerate(order)}
    uses = [sorted(place[i] for i in users) for users in work.users]
    host = set(range(work.n, len(work.sizes))) | set(work.outputs)

    def rank(t: int, step: int) -> tuple[int, ...]:
        return int(t in host), next((s for s in uses[t] if s > step), work.n), t

    return dropping(work, order, memory, rank, host)


def lru(work: Workload, order: Sequence[int], memory: int) -> Schedule:
    """The least recently used tensor first. Raises `ImpossibleBudget` where a step does not fit."""
    place = {i: s for s, i in enumerate(order)}
    touches = [
        sorted([*(place[i] for i in users), *([place[t]] if t < work.n else [])])
        for t, users in enumerate(work.users)
    ]

    def rank(t: int, step: int) -> tuple[int, ...]:
        return -max(s for s in touches[t] if s < step), t

    return dropping(work, order, memory, rank, set())


def dropping(work: Workload, order: Sequence[int], memory: int, rank: Rank, host: set[int]) -> Schedule:
    """The schedule in which tensors are dropped by rank when a step needs room; dead ones are dropped at
    once.

    host: grows by the tensors that are dropped, which are written then.
    """
    work.check_room(memory)
    left = [len(users) for users in work.users]
    inside: set[int] = set()
    resident: list[set[int]] = []
    for step, i in enumerate(order):
        need = set(work.touched(i))
        room = memory - sum(work.sizes[t] for t in inside | need)
        for t in sorted(inside - need, key=lambda t: rank(t, step), reverse=True):
            if room >= 0:
                break
            inside.remove(t)
            host.add(t)
            room += work.sizes[t]
        inside |= need
        resident.append(set(inside))
        for t in work.reads[i]:
            left[t] -= 1
        inside = {t for t in inside if left[t]}
    return schedule_of(work, order, resident)
