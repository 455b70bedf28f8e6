"""Runs a reproduction over its seeds, and writes down what came out: results/SLUG.json and RESULTS.md.

    outcome = run("awq", seeds=3)
    outcome.passed                      # every bar reached by the MEAN over the seeds

Only a full run is recorded. Each finished seed is kept in the cache, so that `resume` goes on after a kill;
what is kept there counts only for the same code. results/ is written here alone, RESULTS.md is made from it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import netweight
from netweight.core import io
from netweight.core.catalogue import System, reproduction, reproductions
from netweight.core.errors import BadInput, need
from netweight.core.progress import doing
from netweight.core.result import Bar, short

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "transformers")
ROOT = Path(netweight.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mark:
    """One bar over all seeds: what each seed measured, and what the mean is held against."""

    name: str
    measured: tuple[float, ...]
    bar: float
    direction: Literal["at most", "at least"]

    @property
    def mean(self) -> float:
        """Mean over the seeds, NaN where one is NaN."""
        return sum(self.measured) / len(self.measured)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds, 0 for one seed, NaN where one is not finite."""
        if not all(map(math.isfinite, self.measured)):
            return math.nan
        return statistics.stdev(self.measured) if len(self.measured) > 1 else 0.0

    @property
    def passed(self) -> bool:
        """Whether the mean reaches the mark."""
        return Bar(self.name, self.mean, self.bar, self.direction).passed


@dataclass(frozen=True)
class Outcome:
    """A reproduction over its seeds. claim: the first line of its module. seconds: of all seeds together."""

    slug: str
    claim: str
    marks: tuple[Mark, ...]
    seeds: tuple[int, ...]
    seconds: float
    figures: tuple[Any, ...]
    quick: bool
    circumstances: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every bar is reached."""
        return all(mark.passed for mark in self.marks)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not finite becomes null (NaN) or "inf" and "-inf"."""
        bars = [
            {**asdict(mark), "mean": mark.mean, "std": mark.std, "passed": mark.passed} for mark in self.marks
        ]
        head = {
            "slug": self.slug,
            "claim": self.claim,
            "passed": self.passed,
            "quick": self.quick,
            "bars": bars,
        }
        tail = {"seeds": self.seeds, "seconds": round(self.seconds, 1), **self.circumstances}
        return _finite({**head, **tail, "figures": self.figures})


def run(
    slug: str,
    seeds: int = 3,
    *,
    seed: int = 0,
    quick: bool = False,
    data_dir: Path | None = None,
    resume: bool = False,
    workers: int = 1,
    results: Path | None = None,
) -> Outcome:
    """Reproduce `slug` with the seeds `seed`, `seed` + 1, ...; a full run is recorded in results/.

    data_dir: where the data sets lie, in place of NETWEIGHT_DATA. workers: seeds at the same time, on Ray if
    that is more than one. results: the folder to record in. Raises `BadInput` for an unknown slug or no seed.
    """
    system = reproduction(slug)
    if seeds < 1:
        raise BadInput(f"seeds={seeds}: a mean needs at least one seed")
    module = importlib.import_module(system.reproduction)
    wanted = tuple(range(seed, seed + seeds))
    code = circumstances()
    with _data_in(data_dir):
        parts = _finished(slug, wanted, quick, code) if resume else {}
        missing = [number for number in wanted if number not in parts]
        with doing(f"{slug}: seeds", len(missing)) as advance:
            for part in _measure(system.reproduction, missing, quick, workers):
                parts[part["seed"]] = part
                io.write_json(_part_file(slug, part["seed"], quick), {"code": code, **_finite(part)})
                advance()
    found = [parts[number] for number in wanted]
    claim = (module.__doc__ or "").strip().partition("\n")[0]
    outcome = Outcome(
        slug=slug,
        claim=claim,
        marks=_marks(slug, found),
        seeds=wanted,
        seconds=sum(part["seconds"] for part in found),
        figures=tuple(part["figures"] for part in found),
        quick=quick,
        circumstances=code,
    )
    if not quick:
        record(outcome, results or results_folder())
    for number in wanted:
        _part_file(slug, number, quick).unlink(missing_ok=True)
    return outcome


def one_seed(module: str, seed: int, quick: bool) -> dict[str, Any]:
    """One seed of the reproduction in `module`: its bars, figures and seconds as JSON values."""
    reproduce: Callable[..., Any] = importlib.import_module(module).reproduce
    started = time.perf_counter()
    claim = reproduce(seed=seed, quick=quick)
    seconds = time.perf_counter() - started
    bars = [asdict(bar) for bar in claim.bars]
    return {"seed": seed, "seconds": seconds, "bars": bars, "figures": dict(claim.figures)}


def _measure(module: str, seeds: Iterable[int], quick: bool, workers: int) -> Iterator[dict[str, Any]]:
    """The parts as they become ready, one after the other here or several at once on Ray."""
    if workers == 1:
        for number in seeds:
            yield one_seed(module, number, quick)
        return
    ray = need("ray")
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        far = ray.remote(num_cpus=1)(one_seed)
        waiting = [far.remote(module, number, quick) for number in seeds]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)
    finally:
        ray.shutdown()


def _marks(slug: str, parts: list[dict[str, Any]]) -> tuple[Mark, ...]:
    """The bars of all seeds side by side; raises where seeds do not hold the same bars."""
    held = [[(bar["name"], bar["bar"], bar["direction"]) for bar in part["bars"]] for part in parts]
    if any(bars != held[0] for bars in held) or not held[0]:
        raise ValueError(f"{slug}: every seed has to be held against the same bars, and against at least one")
    return tuple(
        Mark(name, tuple(_number(part["bars"][index]["measured"]) for part in parts), bar, direction)
        for index, (name, bar, direction) in enumerate(held[0])
    )


def _finished(
    slug: str, seeds: Iterable[int], quick: bool, code: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Seeds that an earlier run of the same code finished."""
    found = {}
    for number in seeds:
        path = _part_file(slug, number, quick)
        if path.exists():
            part = io.read_json(path, "a finished seed")
            if part.pop("code", None) == code:
                found[number] = part
    return found


def _part_file(slug: str, seed: int, quick: bool) -> Path:
    return io.cache_dir() / "reproduce" / f"{slug}-{'quick' if quick else 'full'}-{seed}.json"


@contextlib.contextmanager
def _data_in(folder: Path | None) -> Iterator[None]:
    """NETWEIGHT_DATA names `folder` inside this block."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise BadInput(
            f"{folder}: there is no such folder; --data-dir names the one that holds the data sets"
        )
    before = os.environ.get("NETWEIGHT_DATA")
    os.environ["NETWEIGHT_DATA"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["NETWEIGHT_DATA"]
        else:
            os.environ["NETWEIGHT_DATA"] = before


def circumstances() -> dict[str, Any]:
    """Versions, machine and commit: what has to be the same for two numbers to be comparable."""
    versions = {"python": platform.python_version(), "netweight": netweight.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()}
    return {"versions": versions, "machine": machine, "commit": _commit()}


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that this code runs from, with a + where its files differ from it; else "unknown"."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "netweight"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def results_folder() -> Path:
    """results/ of the checkout that this code runs from, else of the folder that one is in."""
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / "results"


def record(outcome: Outcome, results: Path) -> None:
    """Write results/SLUG.json, then RESULTS.md beside the folder; each file whole or not at all."""
    io.write_json(results / f"{outcome.slug}.json", outcome.to_json())
    io.write_bytes(results.parent / "RESULTS.md", overview(results).encode())


def recorded(slug: str, results: Path) -> dict[str, Any] | None:
    """What was recorded for a reproduction, if anything was."""
    path = results / f"{slug}.json"
    return io.read_json(path, "a recorded result") if path.exists() else None


def state(system: System, results: Path) -> str:
    """The state of a line of the catalogue, in a few words: "4 of 4 bars reached", "not run yet", ""."""
    if not system.result:
        return ""
    found = recorded(system.result.removesuffix(".json"), results)
    if found is None:
        return "not run yet"
    reached = sum(bar["passed"] for bar in found["bars"])
    return f"{reached} of {len(found['bars'])} bars reached"


def overview(results: Path) -> str:
    """RESULTS.md, made from the files of results/: a table per system, what is not reached included."""
    text = [
        "# Results",
        "",
        "Made from `results/*.json` by `netweight reproduce`; every number is a mean over seeds.",
        "",
    ]
    for system in reproductions():
        found = recorded(system.slug, results)
        text += [f"## {system.slug}: {system.title} ({system.venue}, {system.year})", ""]
        text += ["Not run yet.", ""] if found is None else _section(found)
    return "\n".join(text)


def _section(found: dict[str, Any]) -> list[str]:
    rows = [
        f"| {_cell(bar['name'])} | {_shown(bar['mean'])} ± {_shown(bar['std'])} | "
        f"{bar['direction']} {_shown(bar['bar'])} | {'yes' if bar['passed'] else '**no**'} |"
        for bar in found["bars"]
    ]
    seeds = ", ".join(map(str, found["seeds"]))
    machine, versions = found["machine"], found["versions"]
    told = (
        f"Seeds {seeds}; {_shown(found['seconds'])} s; {machine['cpu']}, {machine['cores']} cores; "
        f"torch {versions.get('torch', '?')}; commit {found['commit'][:12]}."
    )
    return [
        found["claim"],
        "",
        "| bar | measured | mark | reached |",
        "|---|---|---|---|",
        *rows,
        "",
        told,
        "",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _shown(value: float | str | None) -> str:
    return short(_number(value))


def _number(value: float | str | None) -> float:
    return float("nan") if value is None else float(value)


def _finite(value: Any) -> Any:
    """JSON values: NaN becomes null, infinities the words "inf" and "-inf"."""
    if isinstance(value, float) and value - value != 0:
        return None if value != value else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return json.loads(json.dumps(value))
