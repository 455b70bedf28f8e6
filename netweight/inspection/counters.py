"""Where energy can be read on this machine: counters of the kernel and of NVML, or a model of the processor.

CPU, memory  measured: RAPL (running average power limit) counters of the Linux kernel, of whole packages and
             of memory that is not part of them ("psys" holds both and is left out), other processes included.
             Else modelled: CPU seconds of this process and its finished children, times the watts of a busy
             core, and 0.375 W for each GB that it holds. An estimate, give or take half.
GPU          measured: the energy counter of NVML (Volta and newer), else its power ten times a second,
             integrated by trapezoids. Of the whole GPU. Needs nvidia-ml-py; without it, it is not counted.

The constant of memory is codecarbon's; thermal design powers are those of the makers' data sheets.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

COUNTERS = Path("/sys/class/powercap")
PROCESSOR = Path("/proc/cpuinfo")
WATTS = 10.0  # of one busy core of an unknown processor: 65 W over the six or seven of a common one
PER_GB = 0.375  # watts of memory: 3 W for 8 GB
DESIGN = {  # watts of a whole processor and its cores
    "EPYC 7543": (225, 32), "EPYC 7742": (225, 64), "EPYC 7763": (280, 64), "EPYC 9554": (360, 64),
    "EPYC 9654": (360, 96), "Gold 6248": (150, 20), "Platinum 8280": (205, 28), "Platinum 8380": (270, 40),
    "Platinum 8480": (350, 56), "Ryzen 9 5950X": (105, 16), "Ryzen 9 7950X": (170, 16),
    "i7-12700K": (125, 12), "i9-13900K": (125, 24),
}  # fmt: skip


@dataclass(frozen=True)
class Counter:
    """One counter of the kernel: its file, and the microjoules at which it begins anew."""

    path: Path
    wraps: int

    def read(self) -> int:
        """Microjoules since some moment."""
        return int(self.path.read_text())


@dataclass(frozen=True)
class GpuCounter:
    """The energy counter of one GPU."""

    read: Callable[[], int]  # microjoules since the driver was loaded
    wraps: int = 1 << 63


def counters(folder: Path = COUNTERS) -> tuple[Counter, ...]:
    """The counters of packages and of memory that this process may read; none where there are none."""
    found = []
    for place in sorted(folder.glob("*rapl:*")):
        try:
            label = (place / "name").read_text().strip() if (place / "name").exists() else ""
            whole = place.name.count(":") == 1 and label != "psys"  # parts of a package have two
            if whole or label == "dram":
                counter = Counter(place / "energy_uj", int((place / "max_energy_range_uj").read_text()))
                counter.read()
                found.append(counter)
        except (OSError, ValueError):
            continue
    return tuple(found)


def gpu(device: torch.device | None) -> tuple[str, Any, Any] | None:
    """Its name, the module pynvml and NVML's handle; None for another device or where NVML cannot be had."""
    if device is None or device.type != "cuda":
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return f"GPU {uuid[4:12]}", pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None


def gpu_counter(device: torch.device | None) -> GpuCounter | None:
    """The energy counter of a CUDA device, None where it has none."""
    if (found := gpu(device)) is None:
        return None
    _, nvml, handle = found
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
    return GpuCounter(lambda: 1000 * nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def core_watts(about: Path = PROCESSOR) -> float:
    """Of one busy core of this processor: its thermal design power over its cores, else `WATTS`."""
    try:
        named = next(line for line in about.read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return WATTS
    return next((watts / cores for name, (watts, cores) in DESIGN.items() if name in named), WATTS)


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def resident() -> float:
    """GB of memory that this process holds; where the system does not say, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, ValueError, IndexError, AttributeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# Sources --------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Something that knows energy: joules since it was made, right if asked every `every` seconds."""

    name: str
    measured: bool
    how: str
    every: float

    def joules(self) -> float: ...


class Counted:
    """A source that reads counters, each of which begins anew at its `wraps`."""

    def __init__(self, name: str, counters: Iterable[Counter | GpuCounter], how: str, every: float = 30.0):
        self.name, self.how, self.every, self.measured = name, how, every, True
        self.last = [(counter, counter.read()) for counter in counters]
        self.total, self.lock = 0.0, threading.Lock()

    def joules(self) -> float:
        """Since it was made."""
        with self.lock:
            now = [(counter, counter.read()) for counter, _ in self.last]
            steps = ((n - b) % counter.wraps for (counter, n), (_, b) in zip(now, self.last))
            self.last, self.total = now, self.total + sum(steps) * 1e-6
            return self.total


class Drawn:
    """A source that integrates power by trapezoids between the moments at which it is asked."""

    def __init__(
        self,
        name: str,
        watts: Callable[[], float],
        how: str,
        *,
        measured: bool,
        every: float = 0.1,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.name, self.how, self.every, self.measured = name, how, every, measured
        self.watts, self.clock, self.last = watts, clock, (clock(), watts())
        self.total, self.lock = 0.0, threading.Lock()

    def joules(self) -> float:
        """Since it was made."""
        with self.lock:
            now = (self.clock(), self.watts())
            self.total += (now[0] - self.last[0]) * (now[1] + self.last[1]) / 2
            self.last = now
            return self.total


class Busy:
    """A source that takes `watts` for each CPU second."""

    def __init__(self, watts: float):
        self.name, self.every, self.measured = "CPU", math.inf, False
        self.watts, self.start = watts, cpu_seconds()
        self.how = f"modelled, give or take half: CPU seconds times {watts:.3g} W (no counter can be read)"

    def joules(self) -> float:
        """Since it was made."""
        return self.watts * (cpu_seconds() - self.start)


def sources(
    device: torch.device | None = None, *, rapl: Sequence[Counter] | None = None, watts: float | None = None
) -> list[Source]:
    """Of this machine, and of the GPU if that is the device. rapl, watts: instead of what is found here."""
    read = counters() if rapl is None else rapl
    if read:
        how = f"measured: {len(read)} RAPL counters, other processes included"
        found: list[Source] = [Counted("CPU and memory", read, how)]
    else:
        memory = f"modelled: {PER_GB} W for each GB held"
        held = Drawn("memory", lambda: PER_GB * resident(), memory, measured=False, every=1.0)
        found = [Busy(core_watts() if watts is None else watts), held]
    if device is None or device.type != "cuda":
        return found
    if (nvml := gpu(device)) is None:
        how = "not counted: NVML cannot be asked; install nvidia-ml-py"
        return [*found, Drawn("GPU", lambda: 0.0, how, measured=False, every=math.inf)]
    name, module, handle = nvml
    if (counter := gpu_counter(device)) is not None:
        return [*found, Counted(name, [counter], "measured: NVML's energy counter, of the whole GPU")]
    how = "measured: NVML's power, of the whole GPU, every 0.1 s"
    return [*found, Drawn(name, lambda: module.nvmlDeviceGetPowerUsage(handle) / 1000, how, measured=True)]
