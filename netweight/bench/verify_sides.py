"""Starting the two sides of the comparison of verifiers and asking them, one at a time.

Each is a process of its own with one thread (`verify_worker`), so that CPU time and memory are its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import netweight
from netweight.core.errors import BadInput

LIMIT = 1800.0  # seconds that one answer may take
LONG = 20.0  # CPU seconds of a run from which on there are fewer runs
Ask = Callable[[Mapping[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def side(python: str | None) -> Iterator[tuple[dict[str, Any], Ask]]:
    """(who answers, ask): ours, or the peer in the environment of `python`; ended with the block.

    `ask` gives {"error": ...} where the process dies or takes longer than `LIMIT`. Raises `BadInput` if the
    peer cannot be started.
    """
    module = "netweight.bench.verify_peer" if python else "netweight.bench.verify_worker"
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **one, "PYTHONPATH": str(Path(netweight.__file__).parents[1])}
    with tempfile.TemporaryFile("w+") as log:
        try:
            process = subprocess.Popen(
                [python or sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise BadInput(
                f"{python}: {error.strerror}; give the Python of the peer's environment"
            ) from error
        try:
            about = _answer(process, log)
            if "error" in about:
                raise BadInput(
                    f"{python or sys.executable}: the verifier does not start there ({about['error']}); give "
                    "a Python with auto_LiRPA, numpy, safetensors and jaxtyping"
                )
            yield about, lambda request: _ask(process, log, request)
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _ask(process: subprocess.Popen[str], log: IO[str], request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return {"error": "the process has ended"}
    return _answer(process, log)


def _answer(process: subprocess.Popen[str], log: IO[str]) -> dict[str, Any]:
    """The next line of the process as JSON, or why there is none."""
    watch = threading.Timer(LIMIT, process.kill)
    watch.start()
    line = process.stdout.readline()
    watch.cancel()
    if line:
        return json.loads(line)
    log.seek(0)
    last = (log.read().strip().splitlines() or [f"no answer within {LIMIT:.0f} s, or killed"])[-1]
    return {"error": last[:200]}


def in_turns(ways: Mapping[str, Callable[[], dict[str, Any]]], runs: int) -> dict[str, dict[str, Any]]:
    """Each way asked A B C A B C, `runs` times after one to warm up; fewer where a run is long.

    A way's answer: seconds (median), runs, lower; or error. Where the slowest way takes over `LONG` seconds
    there are 3 runs, over 3 `LONG` one, and the warm-up counts.
    """
    first = {name: way() for name, way in ways.items()}
    working = {name: answer for name, answer in first.items() if "error" not in answer}
    slowest = max((answer["seconds"] for answer in working.values()), default=0.0)
    more = runs if slowest <= LONG else 2 if slowest <= 3 * LONG else 0
    seconds: dict[str, list[float]] = {
        name: [] if more == runs else [answer["seconds"]] for name, answer in working.items()
    }
    for _ in range(more):
        for name in working:
            seconds[name].append(ways[name]()["seconds"])
    for name, values in seconds.items():
        first[name] |= {"seconds": statistics.median(values), "runs": len(values)}
    return first
