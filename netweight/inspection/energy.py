"""Energy of one call of something: counted where it can be read, else CPU time times a constant.

RAPL (running average power limit) counters of the Linux kernel give the energy of whole processor packages,
other processes included. Where they cannot be read (virtual machines, other systems, no permission), energy
is this process's CPU time times the watts of a core: then ratios of energies are ratios of CPU times, and
`how` says so. On a GPU its counter is added, with longer runs, as it counts in steps of up to 100 ms.
Several ways are measured in turns, a b c a b c, and medians are given: the machine's other work falls on all.
A whole run of something long is what `meters` is for.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from netweight.core.errors import BadInput
from netweight.core.progress import steps
from netweight.inspection.counters import Counter, GpuCounter, core_watts, counters, gpu_counter
from netweight.inspection.meters import waited

LEAST = 0.02  # CPU seconds that RAPL needs between two readings, as it counts in steps of about 1 ms
LEAST_GPU = 0.5  # wall seconds that NVML needs
FEWEST = 3  # turns, however slow


@dataclass(frozen=True)
class Reading:
    """Of one call: joules, CPU seconds of this process, how the joules are known, the joules of each turn."""

    joules: float
    seconds: float
    how: str
    all: tuple[float, ...] = ()
    measured: bool = False


def energy(
    ways: Mapping[str, Callable[[], object]],
    *,
    runs: int = 15,
    watts: float | None = None,
    meters: Sequence[Counter] | None = None,
    device: torch.device | None = None,
    limit: float = math.inf,
) -> dict[str, Reading]:
    """Median energy and CPU time of one call of each way, measured in turns after two calls to warm up.

    watts: of a busy core, by the processor's name by default. meters: the counters of the CPU to read, those
    of this machine by default. device: where the ways compute. limit: no turn begins after so many seconds,
    but for the first `FEWEST`. Raises `BadInput` for no runs.
    """
    watts = core_watts() if watts is None else watts
    if runs < 1 or not watts > 0:
        raise BadInput(f"runs={runs}, watts={watts}: a median needs a run, and a core some power; give more")
    read = counters() if meters is None else tuple(meters)
    gpu = gpu_counter(device)
    every: list[Counter | GpuCounter] = [*read, gpu] if gpu else [*read]
    clock, least = (time.perf_counter, LEAST_GPU) if gpu else (time.process_time, LEAST)
    repeats = {n: _repeats(way, device, clock, least if every else LEAST / 10) for n, way in ways.items()}
    joules: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begun = time.perf_counter()
    for turn in steps(range(runs), "Energy"):
        if turn >= FEWEST and time.perf_counter() - begun > limit:
            break
        for name, way in ways.items():
            before = [counter.read() for counter in every]
            start = time.process_time()
            for _ in range(repeats[name]):
                way()
            waited(device)
            spent = (time.process_time() - start) / repeats[name]
            used = sum((c.read() - b) % c.wraps for c, b in zip(every, before)) * 1e-6 / repeats[name]
            seconds[name].append(spent)
            joules[name].append(used if read else used + spent * watts)
    how = _how(len(read), gpu, watts, device)
    measured = bool(read) and (gpu is not None or device is None or device.type != "cuda")
    return {
        name: Reading(
            statistics.median(joules[name]),
            statistics.median(seconds[name]),
            how,
            tuple(joules[name]),
            measured,
        )
        for name in ways
    }


def _how(read: int, gpu: GpuCounter | None, watts: float, device: torch.device | None) -> str:
    how = (
        f"RAPL of {read} counters, other processes included"
        if read
        else f"CPU time of this process times {watts:.3g} W (no energy counter can be read here)"
    )
    if gpu is not None:
        return f"{how}; NVML's counter of the whole GPU"
    missing = device is not None and device.type == "cuda"
    return f"{how}; the GPU is not counted (NVML cannot be asked)" if missing else how


def _repeats(
    way: Callable[[], object], device: torch.device | None, clock: Callable[[], float], least: float
) -> int:
    """How many calls last `least` seconds of the clock, by the second of two calls."""
    way()
    waited(device)
    start = clock()
    way()
    waited(device)
    return max(1, round(least / max(clock() - start, 1e-6)))
