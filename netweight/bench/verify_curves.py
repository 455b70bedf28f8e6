"""How the cost of bounds grows with the width and depth of a network and the number of specifications.

Random fully connected ReLU networks on 64 inputs, one example, `real` arithmetic, CPU milliseconds of one
thread, medians. The slope is that of a straight line through log cost against log size over the larger half
of the sizes: cost ~ size ** slope there; fixed costs hide it below.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from netweight.bench.verify_nets import fill, mlp
from netweight.core import progress
from netweight.core.io import write_bytes
from netweight.core.perturbation import Linf
from netweight.report.plots import COLOURS
from netweight.verification.bounds import bounds, captured

INPUTS, EPS = 64, 0.02
SWEEPS: Mapping[str, tuple[int, ...]] = {  # what is varied: its values
    "width": (32, 64, 128, 256, 512, 1024, 2048),  # of 3 hidden layers, 10 specifications
    "depth": (2, 4, 8, 16, 32),  # hidden layers of 64, 10 specifications
    "specifications": (4, 16, 64, 256, 1024, 4096, 16_384),  # of 3 hidden layers of 128
}
METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")


def curves(
    *, sweeps: Mapping[str, Sequence[int]] = SWEEPS, methods: Sequence[str] = METHODS, runs: int = 7
) -> list[dict[str, Any]]:
    """For each sweep and method: sizes, milliseconds, slope."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        jobs = [(against, method) for against in sweeps for method in methods]
        return [
            curve(against, sweeps[against], method, runs)
            for against, method in progress.steps(jobs, "Cost curves")
        ]
    finally:
        torch.set_num_threads(before)


def curve(against: str, sizes: Sequence[int], method: str, runs: int) -> dict[str, Any]:
    """One method over the sizes of one sweep."""
    milliseconds = [1e3 * median_seconds(problem(against, size, method), runs) for size in sizes]
    return {
        "against": against,
        "method": method,
        "sizes": list(sizes),
        "ms": milliseconds,
        "slope": slope(sizes, milliseconds),
    }


def problem(against: str, size: int, method: str) -> Callable[[], Any]:
    """The bounds of one network, traced beforehand."""
    width = size if against == "width" else 64 if against == "depth" else 128
    depth = size if against == "depth" else 3
    rows = size if against == "specifications" else 10
    generator = torch.Generator().manual_seed(0)
    model = mlp(INPUTS, *(depth * [width]), 10)
    fill(model, generator)
    x = torch.rand(1, INPUTS, generator=generator)
    objective = torch.randn(1, rows, 10, generator=generator)
    graph = captured(model.eval(), x)
    options: dict[str, Any] = {"objective": objective, "method": method, "arithmetic": "real", "upper": False}
    return lambda: bounds(graph, x, Linf(EPS), **options)


def median_seconds(work: Callable[[], Any], runs: int) -> float:
    """Median CPU seconds of `runs` calls after one; of 3 where a call takes over a second."""
    seconds = []
    while len(seconds) < 1 + (runs if max(seconds, default=0.0) < 1 else 3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent of cost ~ size ** exponent over the larger half of the sizes, by least squares."""
    half = min(len(sizes) // 2, len(sizes) - 2)
    x, y = ([math.log(value) for value in values[half:]] for values in (sizes, costs))
    return float(np.polyfit(x, y, 1)[0])


def draw(found: Sequence[Mapping[str, Any]], path: str) -> None:
    """One panel for each sweep, a line for each method with its slope, as PNG."""
    sweeps = list(dict.fromkeys(curve["against"] for curve in found))
    methods = list(dict.fromkeys(curve["method"] for curve in found))
    figure = Figure(figsize=(3.6 * len(sweeps), 3.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for panel, against in zip(panels, sweeps):
        for one in (curve for curve in found if curve["against"] == against):
            colour = COLOURS[methods.index(one["method"])]
            label = f"{one['method']}, slope {one['slope']:.1f}"
            panel.plot(one["sizes"], one["ms"], marker="o", markersize=3.5, color=colour, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel(against)
        panel.legend(fontsize=7.5, framealpha=1, edgecolor="none", loc="upper left")
        panel.grid(color="#dddddd", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("CPU ms, one thread")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, high * (high / low) ** 0.4)  # room for the legends
    image = io.BytesIO()
    canvas.print_png(image)
    write_bytes(path, image.getvalue())
