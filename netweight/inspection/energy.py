"""Energy of running something: counted by the processor where it can be read, else CPU time times a constant.

RAPL (running average power limit) counters of the Linux kernel give the energy of whole processor packages,
other processes included. Where they cannot be read (virtual machines, other systems, no permission), energy
is this process's CPU time times `WATTS`: then ratios of energies are ratios of CPU times, and `how` says so.
Several ways are measured in turns, a b c a b c, and medians are given: the machine's other work falls on all.
Work on a GPU is not metered: its kernels do not run in this process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from netweight.core.errors import BadInput
from netweight.core.progress import steps

WATTS = 10.0  # of one busy core: an order of magnitude, for machines that cannot tell
COUNTERS = Path("/sys/class/powercap")
LEAST = 0.02  # CPU seconds that RAPL needs between two readings, as it counts in steps of about 1 ms


@dataclass(frozen=True)
class Counter:
    """One package's counter: its file, and the microjoules at which it begins anew."""

    path: Path
    wraps: int

    def read(self) -> int:
        """Microjoules since some moment."""
        return int(self.path.read_text())


@dataclass(frozen=True)
class Reading:
    """Of one run: joules, CPU seconds of this process, and how the joules are known."""

    joules: float
    seconds: float
    how: str


def counters(folder: Path = COUNTERS) -> tuple[Counter, ...]:
    """The counters of whole packages that this process may read; none where there are none."""
    found = []
    for place in sorted(folder.glob("*rapl:*")):
        if place.name.count(":") == 1:  # parts of a package have two
            try:
                counter = Counter(place / "energy_uj", int((place / "max_energy_range_uj").read_text()))
                counter.read()
            except (OSError, ValueError):
                continue
            found.append(counter)
    return tuple(found)


def energy(
    ways: Mapping[str, Callable[[], object]],
    *,
    runs: int = 15,
    watts: float = WATTS,
    meters: Sequence[Counter] | None = None,
) -> dict[str, Reading]:
    """Median energy and CPU time of one call of each way, measured in turns after two calls to warm up.

    meters: the counters to read, those of this machine by default. Raises `BadInput` for no runs.
    """
    if runs < 1 or not watts > 0:
        raise BadInput(f"runs={runs}, watts={watts}: a median needs a run, and a core some power; give more")
    read = counters() if meters is None else tuple(meters)
    least = LEAST if read else LEAST / 10
    repeats = {name: _repeats(way, least) for name, way in ways.items()}
    joules: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in steps(range(runs), "Energy"):
        for name, way in ways.items():
            before = [counter.read() for counter in read]
            start = time.process_time()
            for _ in range(repeats[name]):
                way()
            spent = (time.process_time() - start) / repeats[name]
            used = sum((c.read() - b) % c.wraps for c, b in zip(read, before)) * 1e-6 / repeats[name]
            seconds[name].append(spent)
            joules[name].append(used if read else spent * watts)
    how = (
        f"RAPL of {len(read)} packages, other processes included"
        if read
        else f"CPU time of this process times {watts:g} W (no energy counter can be read here)"
    )
    return {
        name: Reading(statistics.median(joules[name]), statistics.median(seconds[name]), how) for name in ways
    }


def _repeats(way: Callable[[], object], least: float) -> int:
    """How many calls last `least` CPU seconds, by the second of two calls."""
    way()
    start = time.process_time()
    way()
    return max(1, round(least / max(time.process_time() - start, 1e-6)))
