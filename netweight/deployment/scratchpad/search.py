"""The best order and the best choice of what to drop, by search over the states of the scratchpad.

A state is (operators done, live tensors resident, live tensors on the host). Running an operator loads what
it misses and drops the least that makes room for it: a tensor that could be dropped later need not be dropped
now. A dropped tensor is live, so that it will be loaded again; that load, and the write where the host does
not hold it, are paid when it is dropped. So the cost of a path only grows, never exceeds what the schedule
moves beyond the compulsory bytes, and equals it in the end. States are taken by cost, then by depth
(Dijkstra, which is A* here: the prepaid loads are the estimate of what is to come); the first that is done
is the best.

Three things keep the number of states small, none of which loses the best schedule:
- after the same operators, a state from which another can be had by dropping, at no more than the difference
  of their costs, makes that other one superfluous (`dominates`);
- an operator that fits now without dropping anything, and whose result takes no more room than a tensor it
  kills that would have to be written, runs at once (`free_move`): wherever a schedule keeps, drops or loads
  the killed tensor until its last use, it can do so with the result instead;
- live tensors that have to stay over a coming operator and do not fit beside it will cost their excess
  (`ahead`).
Where the states run out of `limit`, the least cost of those that are left is a lower bound, and a window of
the order is searched after the other (`deployment/scratchpad/cosma.py`).

The states are those of the schedulers for the least memory of Ahn et al., "Ordering chaos: memory-aware
scheduling of irregularly wired neural networks for edge devices", MLSys 2020, arXiv:2003.02369, with
replacement added; the search is this project's own.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from netweight.deployment.scratchpad.workload import Schedule, Workload, schedule_of

Tensors = int  # a set of tensors or operators as bits


@dataclass(frozen=True)
class State:
    """done: operators. resident: live tensors inside. host: live tensors outside (of sources: loaded before).

    cost: bytes beyond the compulsory ones, loads that are still to come for dropped tensors included.
    """

    done: int
    resident: int
    host: int
    cost: int


@dataclass(frozen=True)
class Move:
    """What happened in one step: the operator, and what was resident during it beside private sources."""

    operator: int
    resident: int


@dataclass(frozen=True)
class Searched:
    """moves: to the best goal found, None if none was. cost: beyond compulsory bytes. bound: none is less."""

    moves: tuple[Move, ...] | None
    end: State | None
    bound: int
    states: int

    @property
    def proven(self) -> bool:
        """Whether the best schedule was found."""
        return self.end is not None and self.end.cost <= self.bound


def bits(numbers: Iterable[int]) -> int:
    """The set as an integer."""
    found = 0
    for number in numbers:
        found |= 1 << number
    return found


@lru_cache(maxsize=1 << 16)
def members(found: int) -> tuple[int, ...]:
    """The numbers in a set of bits, ascending; remembered, as the same sets are asked for again and again."""
    numbers = []
    while found:
        low = found & -found
        numbers.append(low.bit_length() - 1)
        found ^= low
    return tuple(numbers)


class Machine:
    """The moves of one workload in one memory; everything that does not change is worked out once."""

    def __init__(self, work: Workload, memory: int) -> None:
        self.work, self.memory, n = work, memory, work.n
        self.sizes = work.sizes
        shared = [t for t in range(len(work.sizes)) if not work.private(t)]
        self.users = {t: bits(work.users[t]) for t in shared}
        self.before = [bits(found) for found in work.before]
        after = [bits(i for i in range(n) if j in work.before[i]) for j in range(n)]
        self.reads = [bits(t for t in work.reads[i] if not work.private(t)) for i in range(n)]
        # live while operator j runs, if they are inside before it: somebody who runs after j reads them
        self.over = [bits(t for t in shared if self.users[t] & after[j]) & ~self.reads[j] for j in range(n)]
        self.beside = [self.reads[j] | 1 << j for j in range(n)]
        self.outputs = bits(work.outputs)
        self.sources = bits(t for t in shared if t >= n)
        self.total = lru_cache(maxsize=1 << 18)(self._total)

    def _total(self, tensors: int) -> int:
        """Bytes of a set of tensors."""
        return sum(self.sizes[t] for t in members(tensors))

    def start(self) -> State:
        """Nothing has run, nothing is inside."""
        return State(0, 0, 0, 0)

    def ready(self, done: int, among: int) -> list[int]:
        """Operators that can run now."""
        return [i for i in members(among & ~done) if not self.before[i] & ~done]

    def step(self, state: State, i: int, dropped: int) -> tuple[State, Move]:
        """The state after dropping those and running operator i."""
        cost = state.cost + self.price(dropped, state.host)
        host = state.host | dropped
        resident = state.resident & ~dropped | self.reads[i] | 1 << i
        host |= self.reads[i] & self.sources | (1 << i & self.outputs)
        done = state.done | 1 << i
        dead = bits(t for t in members(self.reads[i] | 1 << i) if not self.users[t] & ~done)
        return State(done, resident & ~dead, host & ~dead, cost), Move(i, resident)

    def price(self, dropped: int, host: int) -> int:
        """Bytes that dropping those moves: a load of each, a write of each that the host does not hold."""
        return self.total(dropped) + self.total(dropped & ~host & ~self.sources)

    def excess(self, state: State, i: int) -> int:
        """Bytes that have to go for operator i to run."""
        inside = self.total(state.resident | self.beside[i]) + self.work.passing[i]
        return inside - self.memory

    def drops(self, state: State, i: int) -> list[int]:
        """The sets of tensors to drop for operator i: those of which no part would do."""
        excess = self.excess(state, i)
        if excess <= 0:
            return [0]
        spare = sorted(members(state.resident & ~self.reads[i]), key=lambda t: -self.sizes[t])
        rest = [*itertools.accumulate((self.sizes[t] for t in reversed(spare)), initial=0)][::-1]
        found: list[int] = []

        def grow(place: int, chosen: int, missing: int, smallest: int) -> None:
            if missing <= 0:
                if -missing < smallest:  # without its smallest member it would not do
                    found.append(chosen)
                return
            if place < len(spare) and rest[place] >= missing:
                size = self.sizes[spare[place]]
                if size:
                    grow(place + 1, chosen | 1 << spare[place], missing - size, min(smallest, size))
                grow(place + 1, chosen, missing, smallest)

        grow(0, 0, excess, 1 << 62)
        return found

    def free_move(self, state: State, among: int) -> int | None:
        """An operator that may as well run now; see the head of this file."""
        for i in self.ready(state.done, among):
            if self.reads[i] & ~state.resident or self.excess(state, i) > 0:
                continue
            done = state.done | 1 << i
            if not self.users[i]:
                return i
            killed = [
                self.sizes[t]
                for t in members(self.reads[i] & ~state.host & ~self.sources)
                if not self.users[t] & ~done
            ]
            if killed and max(killed) >= self.sizes[i]:
                return i
        return None

    def dominates(self, one: State, other: State) -> bool:
        """Whether `other`, after the same operators, can be had from `one` at no more than the difference.

        What `one` has dropped and `other` holds is paid for: `one` may do without it until it is read.
        """
        lost = one.resident & ~other.resident
        more = self.total(lost) + self.total((lost | other.host) & ~one.host & ~self.sources)
        return one.cost + more <= other.cost

    def ahead(self, state: State, among: int) -> int:
        """Bytes that some operator to come will cost at least: live tensors that do not fit beside it.

        Of those tensors the clean ones cost a load each when dropped, the others a write as well.
        """
        worst = 0
        for j in members(among & ~state.done):
            kept = state.resident & self.over[j]
            if kept:
                excess = self.total(kept | self.beside[j]) + self.work.passing[j] - self.memory
                if excess > worst // 2:
                    clean = self.total(kept & (state.host | self.sources))
                    worst = max(worst, excess, 2 * excess - clean)
        return worst


def search(
    machine: Machine, start: State, among: int, *, limit: int = 200_000, most: int | None = None
) -> Searched:
    """The cheapest way from `start` to where all operators `among` are done.

    limit: of states looked at. most: schedules that cost this or more are not looked for.
    """
    goal = start.done | among
    serial = itertools.count()
    first = start.cost + machine.ahead(start, among)
    queue: list[tuple[int, int, int, State, tuple | None]] = [(first, 0, next(serial), start, None)]
    closed: dict[int, list[State]] = {}
    looked = 0
    while queue:
        estimate, _, _, state, trail = heapq.heappop(queue)
        if most is not None and estimate >= most:
            return Searched(None, None, most, looked)
        if state.done == goal:
            return Searched(_moves(trail), state, estimate, looked)
        found = closed.setdefault(state.done, [])
        if any(machine.dominates(other, state) for other in found):
            continue
        found.append(state)
        looked += 1
        if looked > limit:
            return Searched(None, None, estimate, looked)
        free = machine.free_move(state, among)
        for i in [free] if free is not None else machine.ready(state.done, among):
            for dropped in machine.drops(state, i):
                after, move = machine.step(state, i, dropped)
                cost = max(estimate, after.cost + machine.ahead(after, among))
                depth = -after.done.bit_count()
                heapq.heappush(queue, (cost, depth, next(serial), after, (move, trail)))
    return Searched(None, None, 1 << 62, looked)


def _moves(trail: tuple | None) -> tuple[Move, ...]:
    moves = []
    while trail is not None:
        move, trail = trail
        moves.append(move)
    return tuple(reversed(moves))


def schedule_from(work: Workload, moves: tuple[Move, ...]) -> Schedule:
    """The schedule of a whole path."""
    order = [move.operator for move in moves]
    inside = [
        [*members(move.resident), *(t for t in work.reads[move.operator] if work.private(t))]
        for move in moves
    ]
    return schedule_of(work, order, inside)
