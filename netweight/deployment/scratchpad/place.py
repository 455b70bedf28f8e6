"""Addresses: stays are rectangles of steps times bytes, and no two may overlap inside the memory.

Find A_a in [0, M - S_a] so that of two stays that share a step one ends, in bytes, before the other begins.
First-fit puts one after the other at the lowest free address; a stay that found no room goes first in the
next round. Where that fails for small schedules an integer programme decides: for each pair that shares a
step one binary b with A_a + S_a <= A_b + M (1 - b) and A_b + S_b <= A_a + M b. Where there are no addresses,
`repaired` cuts a stay in two: the tensor is dropped and loaded again, at another address, which costs bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from netweight.core.errors import NetweightError
from netweight.core.milp import Programme
from netweight.deployment.scratchpad.workload import Schedule, Stay, Workload

ROUNDS = 150  # of first-fit
PAIRS = 150  # that share a step, at most, for the integer programme
SECONDS = 5.0  # of the integer programme


def placed(work: Workload, schedule: Schedule, memory: int, *, exact: bool = True) -> Schedule | None:
    """The schedule with addresses, None where none were found. exact: ask the integer programme as well."""
    stays = list(schedule.stays)
    found, _ = first_fit(work, stays, memory)
    if found is None and exact:
        found = by_programme(work, stays, memory)
    return None if found is None else Schedule(schedule.order, tuple(found))


def first_fit(work: Workload, stays: Sequence[Stay], memory: int) -> tuple[list[Stay] | None, int]:
    """The stays with addresses, and else None with the stay (its place) that was last found no room for."""
    size = [work.sizes[stay.tensor] for stay in stays]
    starts = (
        sorted(range(len(stays)), key=lambda k: (-size[k], stays[k].start)),
        sorted(range(len(stays)), key=lambda k: (stays[k].start - stays[k].stop, -size[k])),
        sorted(range(len(stays)), key=lambda k: (stays[k].start, stays[k].start - stays[k].stop)),
    )
    near = _near(stays)
    often = [0] * len(stays)  # how often a stay found no room
    for order in starts:
        for _ in range(ROUNDS // len(starts)):
            address: dict[int, int] = {}
            for k in order:
                spot = _lowest(size[k], ((address[j], size[j]) for j in near[k] if j in address), memory)
                if spot is None:
                    often[k] += 1
                    order = sorted(order, key=lambda k: -often[k])
                    break
                address[k] = spot
            else:
                return [stay.at(address[k]) for k, stay in enumerate(stays)], -1
    return None, max(range(len(stays)), key=often.__getitem__)


def _near(stays: Sequence[Stay]) -> list[list[int]]:
    """Of each stay, those that share a step with it."""
    return [
        [j for j, b in enumerate(stays) if j != k and a.start < b.stop and b.start < a.stop]
        for k, a in enumerate(stays)
    ]


def _lowest(size: int, taken: Iterable[tuple[int, int]], memory: int) -> int | None:
    """The lowest address with that much room beside what is taken."""
    spot = 0
    for address, length in sorted(taken):
        if address - spot >= size:
            break
        spot = max(spot, address + length)
    return spot if spot + size <= memory else None


def by_programme(work: Workload, stays: Sequence[Stay], memory: int) -> list[Stay] | None:
    """Addresses by an integer programme; None where there are none, or too many pairs, or too little time."""
    pairs = [(k, j) for k, near in enumerate(_near(stays)) for j in near if k < j]
    if len(pairs) > PAIRS or any(work.sizes[stay.tensor] > memory for stay in stays):
        return None
    programme = Programme()
    unit = math.gcd(*(work.sizes[stay.tensor] for stay in stays)) or 1
    room = memory // unit
    size = [work.sizes[stay.tensor] // unit for stay in stays]
    for k in range(len(stays)):
        programme.variable(("address", k), high=room - size[k])
    for k, j in pairs:
        programme.binary((k, j))
        programme.row([(("address", k), 1), (("address", j), -1), ((k, j), room)], high=room - size[k])
        programme.row([(("address", j), 1), (("address", k), -1), ((k, j), -room)], high=-size[j])
    found = programme.solve(SECONDS)
    if not found.values:
        return None
    address: dict[int, int] = {}  # from the solver's order anew, in whole numbers: its own are rounded
    for k in sorted(range(len(stays)), key=lambda k: found["address", k]):
        below = [j for j in address if (min(j, k), max(j, k)) in pairs and _under(found, j, k)]
        address[k] = max((address[j] + size[j] for j in below), default=0)
    if any(address[k] + size[k] > room for k in address):
        return None
    return [stay.at(address[k] * unit) for k, stay in enumerate(stays)]


def _under(found: object, j: int, k: int) -> bool:
    """Whether the programme put stay j below stay k."""
    return found.on((j, k)) if j < k else not found.on((k, j))  # type: ignore[attr-defined]


def repaired(work: Workload, schedule: Schedule, memory: int) -> Schedule:
    """A schedule with addresses that moves as few bytes more as a simple rule finds: stays cut in two.

    Ends, as stays of one step each fit where every step does.
    """
    stays = list(schedule.stays)
    while True:
        found, failed = first_fit(work, stays, memory)
        if found is not None:
            return Schedule(schedule.order, tuple(sorted(found, key=lambda s: (s.start, s.tensor))))
        where = [failed, *_near(stays)[failed]]
        long = [k for k in where if stays[k].stop - stays[k].start > 1] or [
            k for k, stay in enumerate(stays) if stay.stop - stay.start > 1
        ]
        if not long:
            raise NetweightError(
                f"no addresses in {memory} bytes though every step fits; report this schedule"
            )
        touches = _touches(work, schedule.order)
        loaded = {stay.tensor for stay in Schedule(schedule.order, tuple(stays)).loads()}
        cut = min(long, key=lambda k: _price(work, stays[k], touches, loaded))
        stay = stays.pop(cut)
        before, after = _gap(stay, touches)
        stays += [Stay(stay.tensor, stay.start, before + 1), Stay(stay.tensor, after, stay.stop)]


def _price(work: Workload, stay: Stay, touches: Sequence[Sequence[int]], loaded: set[int]) -> float:
    """Bytes that a cut of the stay moves for each byte and step that it frees."""
    before, after = _gap(stay, touches)
    clean = stay.tensor >= work.n or stay.tensor in work.outputs or stay.tensor in loaded
    return (1 if clean else 2) / (after - before - 0.75)


def _gap(stay: Stay, touches: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The two touches of a stay that lie farthest apart."""
    inside = [s for s in touches[stay.tensor] if stay.start <= s < stay.stop]
    return max(zip(inside, inside[1:]), key=lambda pair: pair[1] - pair[0])


def _touches(work: Workload, order: Sequence[int]) -> list[list[int]]:
    """Of each tensor, the steps that read or make it, ascending."""
    place = {i: s for s, i in enumerate(order)}
    return [
        sorted([*(place[i] for i in users), *([place[t]] if t < work.n else [])])
        for t, users in enumerate(work.users)
    ]
