"""Bounds beside those of auto_LiRPA: time, memory and tightness on its own pretrained networks.

Every row is one network, a batch of test images, an L-infinity ball around each, and the lower bounds of all
nine margins (output of the class minus each other output). Both sides take turns, each in a process with one
thread; times are CPU seconds, medians; tracing a network is not timed on either side. Memory is the growth of
the peak of a fresh process while a method runs once. A ratio is ours / theirs.

Our times are those of "real" arithmetic (float32 without a bound on its own rounding), which is what the peer
computes in; `float32` and `float64` are the rigorous ones, which it has not.

Without a peer, ours stand beside the figures of the brief, which were measured on another machine and on
other images: their times are an orientation, their bounds cannot be compared.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netweight.bench.verify_nets import EXAMPLES, random_network, trained
from netweight.bench.verify_sides import Ask, in_turns, side
from netweight.bench.verify_worker import METHODS, write_case
from netweight.core import progress
from netweight.core.result import Bar
from netweight.data.arrays import read_arrays
from netweight.data.images import mnist
from netweight.data.shared import shared_file
from netweight.verification.bounds import margins

RIGOROUS = ("float32", "float64")
NOISE = 1 << 20  # bytes of growth that are not told apart from none
Answer = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A network, how many images, the radius (input units).

    brief: milliseconds of the peer by method, on another machine.
    """

    network: str
    batch: int
    eps: float
    brief: Mapping[str, float] = field(default_factory=dict)


ROWS = (
    Row("mnist_fc_3layer", 2, 0.02, dict(zip(METHODS, (1.0, 2.0, 4.9, 84, 209)))),
    Row("mnist_fc_3layer", 128, 0.02, {"ibp": 2.0, "crown-ibp": 12.4, "crown": 123, "alpha-crown-all": 3970}),
    Row("mnist_a_adv", 2, 0.1, dict(zip(METHODS, (1.7, 4.5, 28.4, 200, 1600)))),
    Row("mnist_a_adv", 32, 0.1, {"ibp": 3.4, "crown-ibp": 29.7, "crown": 396, "alpha-crown-all": 47_600}),
    Row("kw_mnist", 2, 0.1, dict(zip(METHODS, (1.7, 4.4, 50, 216, 2475)))),
    Row("mnist_cnn_small", 2, 0.02, {"ibp": 1.6, "crown-ibp": 3.9, "crown": 5.8, "alpha-crown-all": 788}),
    Row("cifar_2c2f", 10, 2 / 255, {"ibp": 2.7, "crown-ibp": 15.5, "crown": 160, "alpha-crown-all": 20_600}),
    Row("resnet20", 1, 0.02 / 255),
)


def bench(
    *,
    peer_python: str | None = None,
    runs: int = 7,
    rows: Sequence[Row] = ROWS,
    methods: Sequence[str] = METHODS,
    random: int = 200,
    plot: str | None = None,
) -> dict[str, Any]:
    """The table, the bars, and the comparison on random networks; `plot` draws the cost curves there as PNG.

    peer_python: the Python of an environment with auto_LiRPA (see `verify_peer`). Raises `BadInput` where
    the data folder is not there or the peer cannot be started.
    """
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        cases = [write(row, Path(place) / f"{index}.npz") for index, row in enumerate(rows)]
        sides = {"ours": stack.enter_context(side(None))}
        if peer_python:
            sides["peer"] = stack.enter_context(side(peer_python))
        asks = {name: ask for name, (_, ask) in sides.items()}
        jobs = [(*pair, method) for pair in zip(rows, cases) for method in methods]
        table = [compared(*job, asks, peer_python, runs) for job in progress.steps(jobs, "Bounding")]
        agreement = on_random(random, Path(place), asks) if random and peer_python else None
    held = bars(table, agreement)
    measured: dict[str, Any] = {
        "threads": 1,
        "images": "the first test images that the network classifies right",
        "times": "CPU milliseconds, medians; ours in real arithmetic",
        "sides": ", ".join(f"{about['name']} on torch {about['torch']}" for about, _ in sides.values()),
        "rows": table,
        "random": agreement,
        "bars": [{**asdict(bar), "reached": bar.passed} for bar in held],
    }
    if not peer_python:
        measured["note"] = "no peer: brief_ms was measured on another machine; give --peer-python PATH"
    if plot:
        from netweight.bench.verify_curves import curves, draw

        measured["curves"] = curves()
        draw(measured["curves"], plot)
    return measured


# One row -------------------------------------------------------------------------------------------------


def write(row: Row, path: Path) -> dict[str, Any]:
    """Write the case of a row; gives what a request for it has in common."""
    model = trained(row.network)
    x, labels = images(model, row.network, row.batch)
    return written(path, row.network, model, x, labels, row.eps)


def written(path: Path, name: str, model: nn.Module, x: Tensor, labels: Tensor, eps: float) -> dict[str, Any]:
    """Write a case with all margins of the labels."""
    write_case(path, model, x, margins(labels, 10))
    return {"case": str(path), "network": name, "eps": eps}


def images(model: nn.Module, name: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` test images that the network classifies right, in [0, 1], and their classes."""
    if name in EXAMPLES and EXAMPLES[name].shape[0] == 1:
        test = mnist().test(4 * count)
        x, y = test.x, test.y
    else:
        arrays = read_arrays(shared_file("cifar10/cifar10_test_a_lossless.npz"), ("x", "y"))
        x = torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(arrays["y"]).long()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:count]
    return x[right], y[right]


def compared(
    row: Row,
    case: Mapping[str, Any],
    method: str,
    asks: Mapping[str, Ask],
    peer_python: str | None,
    runs: int,
) -> Answer:
    """One row and method: both sides in turns, then the memory of each in a fresh process."""

    def way(name: str, how: str):
        return lambda: asks[name]({**case, "method": how, "do": "time"})

    found = in_turns({name: way(name, method) for name in asks}, runs)
    result: Answer = {"network": row.network, "batch": row.batch, "eps": row.eps, "method": method}
    for name, answer in found.items():
        result |= {f"{name}_{key}": value for key, value in figures(answer).items()}
    if method in row.brief:
        result["brief_ms"] = row.brief[method]
    if all("error" not in answer for answer in found.values()) and len(found) == 2:
        result["ratio"] = found["ours"]["seconds"] / found["peer"]["seconds"]
        ours, theirs = (torch.tensor(found[name]["lower"]) for name in ("ours", "peer"))
        result["shortfall"] = float((theirs.mean() - ours.mean()).clamp(min=0))
        result["shortfall_of_one"] = float((theirs - ours).max().clamp(min=0))
    if method == "crown" and "error" not in found["ours"] and found["ours"]["runs"] == runs:
        rigorous = in_turns({name: way("ours", f"{method}:{name}") for name in RIGOROUS}, runs)
        for name, answer in rigorous.items():
            result |= {f"{name}_{key}": value for key, value in figures(answer).items()}
    if not method.endswith("-all"):
        result |= memory(
            case, method, {"ours": None, **({"peer": peer_python} if peer_python else {})}, found
        )
    return result


def figures(answer: Answer) -> Answer:
    """What is shown of an answer: the mean lower bound stands for all margins of all images."""
    if "error" in answer:
        return {"error": answer["error"]}
    lower = torch.tensor(answer["lower"])
    return {
        "ms": 1e3 * answer["seconds"],
        "runs": answer["runs"],
        "lower": float(lower.mean()),
        "least": float(lower.min()),
    }


def memory(
    case: Mapping[str, Any], method: str, pythons: Mapping[str, str | None], found: Mapping[str, Answer]
) -> Answer:
    """Peak bytes of each side that can do this, each in a process of its own."""
    result = {}
    for name, python in pythons.items():
        if "error" in found[name]:
            continue
        with side(python) as (_, ask):
            answer = ask({**case, "method": method, "do": "memory"})
        result[f"{name}_bytes"] = answer.get("bytes", answer.get("error"))
    if all(isinstance(result.get(f"{name}_bytes"), int) for name in ("ours", "peer")):
        result["bytes_ratio"] = max(NOISE, result["ours_bytes"]) / max(NOISE, result["peer_bytes"])
    return result


# Random networks -----------------------------------------------------------------------------------------


def on_random(count: int, place: Path, asks: Mapping[str, Ask]) -> Answer:
    """CROWN on `count` random networks: on how many no margin is looser by more than 1e-4 of the largest."""
    reached, worst, tighter, failed = 0, 0.0, 0, []
    for seed in progress.steps(range(count), "Random networks"):
        request = {**random_case(seed, place / f"random-{seed}.npz"), "method": "crown", "do": "time"}
        answers = {name: ask(request) for name, ask in asks.items()}
        errors = [f"{name}, {seed}: {a['error']}" for name, a in answers.items() if "error" in a]
        failed += errors
        if errors:
            continue
        ours, theirs = (torch.tensor(answers[name]["lower"]) for name in ("ours", "peer"))
        short = float((theirs - ours).max() / theirs.abs().max())
        worst, reached = max(worst, short), reached + (short <= 1e-4)
        tighter += bool(((ours - theirs).max() / theirs.abs().max()) > 1e-4)
    return {
        "networks": count,
        "within 1e-4 or better": reached,
        "tighter somewhere": tighter,
        "worst shortfall": worst,
        "errors": failed,
    }


def random_case(seed: int, path: Path) -> dict[str, Any]:
    """Two random inputs of a random network, the classes it gives them, and a random radius."""
    model, shape = random_network(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, *shape, generator=generator)
    eps = 0.01 + 0.09 * float(torch.rand((), generator=generator))
    with torch.no_grad():
        labels = model(x).argmax(1)
    return written(path, f"random-{seed}", model, x, labels, eps)


# Bars ----------------------------------------------------------------------------------------------------


def bars(table: Sequence[Answer], agreement: Answer | None) -> list[Bar]:
    """What is promised, as far as this run can tell: without a peer only the ResNet."""
    found = list(_of_peer(table))
    for row in table:
        if row["network"] == "resnet20" and row["method"] == "crown":
            found += [
                Bar("ResNet-20 CROWN, CPU seconds", row.get("ours_ms", math.nan) / 1e3, 120.0, "at most"),
                Bar("ResNet-20 CROWN, mean margin", row.get("ours_lower", math.nan), 7.9, "at least"),
            ]
    if agreement:
        name = "random networks within 1e-4 or better"
        found.append(Bar(name, agreement["within 1e-4 or better"], agreement["networks"], "at least"))
    return found


def _of_peer(table: Sequence[Answer]) -> Iterator[Bar]:
    """Bars on ratios and shortfalls; a row that only the peer can do counts as infinite."""
    able = [row for row in table if "peer_ms" in row]
    for method, mean, worst in (("crown", 0.5, 1.0), ("alpha-crown", 0.4, None)):
        ratios = [row.get("ratio", math.inf) for row in able if row["method"] == method]
        if ratios:
            name = f"{method} time / peer's"
            yield Bar(f"{name}, geometric mean", statistics.geometric_mean(ratios), mean, "at most")
            if worst:
                yield Bar(f"{name}, worst row", max(ratios), worst, "at most")
    compared_rows = [row for row in able if not row["method"].endswith("-all")]
    if compared_rows:
        short = max(row.get("shortfall", math.inf) for row in compared_rows)
        yield Bar("lower bound below the peer's, worst row", short, 1e-3, "at most")
        most = max(row.get("bytes_ratio", math.inf) for row in compared_rows)
        yield Bar("peak memory / peer's (of 1 MiB at least), worst row", most, 1.0, "at most")
