"""What the scheduler is held against: random workloads, and the best schedule by looking at all of them.

`cheapest` shares nothing with the scheduler: it goes through every order and, in every step, through every
set of tensors that could be kept, and pays for writes and loads when they happen. It is for at most 8
operators.
"""

from __future__ import annotations

import functools
import itertools
import random

from netweight.core.errors import DoesNotFit
from netweight.deployment.scratchpad.workload import Workload

MOST = 8
NEVER = 1 << 62


def random_workload(operators: int, back: int, seed: int, largest: int = 8) -> Workload:
    """Operators that read one to three tensors among the `back` before them; sizes 1 to `largest` bytes.

    Those that read nothing read the one source. What nobody reads is an output.
    """
    draw = random.Random(seed)
    sizes = [draw.randint(1, largest) for _ in range(operators + 1)]
    reads: list[tuple[int, ...]] = []
    for i in range(operators):
        near = range(max(0, i - back), i)
        count = min(len(near), draw.randint(1, 3))
        reads.append(tuple(sorted(draw.sample(near, count))) if count else (operators,))
    used = {t for read in reads for t in read}
    names = (*(f"operator {i}" for i in range(operators)), "input")
    return Workload(names, tuple(reads), tuple(sizes), frozenset(range(operators)) - used)


def cheapest(work: Workload, memory: int) -> int:
    """Bytes moved by the best schedule (addresses left aside); raises `DoesNotFit` for over 8 operators."""
    if work.n > MOST:
        raise DoesNotFit(f"{work.n} operators: every schedule is looked at for at most {MOST}; use cosma()")
    sizes = work.sizes

    def total(tensors: frozenset[int]) -> int:
        return sum(sizes[t] for t in tensors)

    def wanted(tensors: frozenset[int], done: frozenset[int]) -> frozenset[int]:
        return frozenset(t for t in tensors if not done.issuperset(work.users[t]))

    @functools.cache
    def rest(done: frozenset[int], inside: frozenset[int], host: frozenset[int]) -> int:
        """Bytes still to move once those operators have run, with those tensors inside and on the host."""
        if len(done) == work.n:
            return 0
        best = NEVER
        for i in set(range(work.n)) - done:
            if not work.before[i] <= done:
                continue
            need = frozenset(work.touched(i))
            spare = sorted(inside - need)
            after = done | {i}
            for count in range(len(spare) + 1):
                for kept in itertools.combinations(spare, count):
                    now = need | set(kept)
                    loads = need - inside - {i}
                    writes = wanted(inside - now, done) - host
                    if total(now) > memory or not loads <= host | writes:
                        continue
                    writes |= {i} & work.outputs
                    moved = total(loads) + total(writes)
                    best = min(best, moved + rest(after, wanted(now, after), host | writes))
        return best

    return rest(frozenset(), frozenset(), frozenset(range(work.n, len(sizes))))
