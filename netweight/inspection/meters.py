"""What running something costs in energy: a meter around it, that says of each part how it is known.

    with Meter() as meter:
        train(...)
    meter.energy.joules, meter.energy.watts, meter.energy.known, meter.energy.grams(intensity=56)

Where the joules come from is in `counters`. Watts are joules a second: power may stay as it is while energy
halves with the time. Carbon is joules / 3.6e6 * PUE * g/kWh (PUE: what the building uses for each joule that
its computers use).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from netweight.core.errors import BadInput, unknown
from netweight.inspection.counters import Source, cpu_seconds, sources

WORLD = 475.0  # g/kWh, of all electricity (IEA, 2019)
INTENSITY = {  # g/kWh of CO2 and its equivalents, 2023 (Ember, as Our World in Data shows it)
    "AR": 354, "AT": 111, "AU": 549, "BE": 138, "BR": 98, "CA": 170, "CL": 291, "CN": 582, "CZ": 450,
    "DE": 381, "DK": 152, "FI": 79, "FR": 56, "GB": 238, "GR": 337, "HU": 204, "IE": 291, "IN": 713,
    "NO": 30, "US": 369,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one source saw: its joules, whether they are measured (else modelled), and how."""

    name: str
    joules: float
    measured: bool
    how: str


@dataclass(frozen=True)
class Energy:
    """Of one run: its parts, wall seconds, and CPU seconds of this process and its finished children."""

    parts: tuple[Part, ...]
    seconds: float
    cpu: float

    @property
    def joules(self) -> float:
        """Of all parts."""
        return math.fsum(part.joules for part in self.parts)

    @property
    def hours(self) -> float:
        """The same in watt hours."""
        return self.joules / 3600

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds if self.seconds else math.nan

    @property
    def known(self) -> str:
        """ "measured", "modelled" or "partly measured"."""
        kinds = {part.measured for part in self.parts}
        return "partly measured" if len(kinds) == 2 else "measured" if kinds == {True} else "modelled"

    @property
    def how(self) -> str:
        """Every part with its source."""
        return "; ".join(f"{part.name}: {part.how}" for part in self.parts)

    def grams(self, intensity: float | str = WORLD, pue: float = 1.0) -> float:
        """CO2 and its equivalents. intensity: g/kWh, or a country of `INTENSITY` by its two letters."""
        if isinstance(intensity, str):
            if intensity not in INTENSITY:
                raise unknown("country", intensity, INTENSITY)
            intensity = INTENSITY[intensity]
        if not (0 <= intensity < math.inf and 1 <= pue < math.inf):
            raise BadInput(f"{intensity} g/kWh, PUE {pue}: grams are not below 0, and PUE not below 1")
        return self.joules / 3.6e6 * pue * intensity

    def net(self, rest: float) -> Energy:
        """Without what the machine takes at `rest` watts (see `resting`); never below 0."""
        factor = max(0.0, self.joules - rest * self.seconds) / self.joules if self.joules else 1.0
        return replace(self, parts=tuple(replace(p, joules=p.joules * factor) for p in self.parts))

    def told(self, examples: int = 0, intensity: float | str = WORLD, pue: float = 1.0) -> dict[str, Any]:
        """As JSON values. examples: seen in this run, 0 where that is not known."""
        told = {"joules": self.joules, "known": self.known, "watt_hours": self.hours, "watts": self.watts}
        told |= {"seconds": self.seconds, "cpu_seconds": self.cpu, "grams_co2": self.grams(intensity, pue)}
        told |= {"grams_per_kwh": INTENSITY.get(intensity, intensity), "pue": pue, "how": self.how}
        if examples:
            told["joules_per_example"] = self.joules / examples
        return told | {"parts": {part.name: part.joules for part in self.parts}}

    def line(self) -> str:
        """In a few words."""
        return f"{self.joules:.4g} J at {self.watts:.3g} W ({self.known}), {self.grams():.3g} g CO2"


def together(runs: Sequence[Energy]) -> Energy:
    """Of processes that ran beside each other on one machine; what a counter of the machine saw counts once.

    Processes that share a GPU share its counter: it counts as often as its name differs.
    """
    counted: dict[str, Part] = {}
    modelled: dict[str, list[Part]] = {}
    for part in (part for run in runs for part in run.parts):
        if not part.measured:
            modelled.setdefault(part.name, []).append(part)
        elif part.name not in counted or part.joules > counted[part.name].joules:
            counted[part.name] = part
    parts = [replace(of[0], joules=math.fsum(p.joules for p in of)) for of in modelled.values()]
    seconds = max(run.seconds for run in runs)
    return Energy((*counted.values(), *parts), seconds, math.fsum(run.cpu for run in runs))


class Meter:
    """Joules between `begin` and `end`, or of a `with` block; `energy` holds them afterwards.

    device: the one that computes; its work is waited for. read: the sources, those of this machine by
    default. Meters may be nested.
    """

    def __init__(self, device: torch.device | None = None, read: Sequence[Source] | None = None):
        self.device, self.read, self._energy = device, read, None
        self.running: tuple[Any, ...] | None = None

    @property
    def energy(self) -> Energy:
        """Of the last run that ended."""
        if self._energy is None:
            raise ValueError("this meter has measured nothing yet")
        return self._energy

    def begin(self) -> None:
        """Start, or start anew."""
        if self.running is not None:
            self.end()
        read = sources(self.device) if self.read is None else self.read
        waited(self.device)
        first, stop = [source.joules() for source in read], threading.Event()
        every = min((source.every for source in read), default=math.inf)
        thread = threading.Thread(target=_asked, args=(read, stop, every), daemon=True)
        if every < math.inf:
            thread.start()
        self.running = (read, first, stop, thread, cpu_seconds(), time.perf_counter())

    def end(self) -> Energy:
        """Stop; what it took."""
        if self.running is None:
            raise ValueError("this meter is not running")
        waited(self.device)
        read, first, stop, thread, cpu, wall = self.running
        seconds, self.running = time.perf_counter() - wall, None
        parts = tuple(Part(s.name, s.joules() - before, s.measured, s.how) for s, before in zip(read, first))
        self._energy = Energy(parts, seconds, cpu_seconds() - cpu)
        stop.set()
        if thread.is_alive():
            thread.join()
        return self._energy

    def __enter__(self) -> Meter:
        """Begin."""
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self.end()


def _asked(read: Sequence[Source], stop: threading.Event, every: float) -> None:
    """Asks the sources in time, in a thread of its own, until it is told to stop."""
    while not stop.wait(every):
        for source in read:
            source.joules()


def waited(device: torch.device | None) -> None:
    """Wait for what a CUDA device still has to do."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def resting(seconds: float = 5.0, device: torch.device | None = None) -> float:
    """Mean watts while this process does nothing: to be subtracted, see `Energy.net`."""
    with Meter(device) as meter:
        time.sleep(seconds)
    return meter.energy.watts
