"""How well each measure of distortion ranks random plans: predicted beside measured, on one network.

The planner adds up a number per layer; what counts is whether the sum orders whole plans as they turn out
(`evidence.agreement`). `plot` draws one panel for each measure.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from netweight.core.io import write_bytes
from netweight.core.task import Task
from netweight.data import files
from netweight.evidence.agreement import Agreement, agreement
from netweight.models.load import load

MODEL, DATA = "resnet20", "cifar10"
NOTHING = 1e-12  # where a distortion of 0 is drawn


def bench(*, plans: int = 24, examples: int = 64, seed: int = 0, plot: str | None = None) -> dict[str, Any]:
    """Spearman's rank correlation of predicted and measured distortion over random plans of ResNet-20."""
    model = load(MODEL)
    split = files.load(DATA, model=model)
    found = agreement(model, Task(split.calibration, split.test), plans=plans, examples=examples, seed=seed)
    if plot is not None:
        draw(found, plot)
    return {
        "model": MODEL,
        "data": DATA,
        "plans": plans,
        "examples": examples,
        "seed": seed,
        "rows": [
            {
                "distortion": name,
                "rank_correlation": each.correlation,
                "predicted": list(each.predicted),
                "measured": list(each.measured),
            }
            for name, each in found.items()
        ],
    }


def draw(found: Mapping[str, Agreement], path: str) -> None:
    """One panel for each measure, both axes logarithmic, as a picture at `path`."""
    figure = Figure(figsize=(3 * len(found), 3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, (name, each) in enumerate(found.items(), 1):
        axes = figure.add_subplot(1, len(found), place)
        ends = ([max(value, NOTHING) for value in values] for values in (each.predicted, each.measured))
        axes.scatter(*ends, s=14, color="#3b82c4")
        axes.set(xscale="log", yscale="log", xlabel="predicted: sum over layers")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{name}: rank correlation {each.correlation:.2f}", fontsize=10)
        if place == 1:
            axes.set_ylabel("measured KL, nats")
    image = io.BytesIO()
    canvas.print_png(image)
    write_bytes(path, image.getvalue())
