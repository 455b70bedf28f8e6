"""netweight plan: what would be chosen for each layer, without compressing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netweight.cli import common


def plan(
    model: common.Model,
    data: common.DataName,
    budget: common.BudgetText,
    method: common.Method = "auto",
    distortion: common.DistortionName = "kl",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write distortion against cost as a picture.")
    ] = None,
    metric: common.MetricName = None,
    json: common.Json = False,
) -> None:
    """Show what would be chosen for each layer, without doing it."""
    from netweight import pipeline
    from netweight.core.plan import Budget
    from netweight.report import table

    ceilings = Budget.parse(budget)
    with common.working():
        network, _ = common.open_model(model)
        task = common.open_task(data, network, metric)
        chosen, options = pipeline.plan(network, task, ceilings, method=method, distortion=distortion)
    if plot is not None:
        from netweight.core import io
        from netweight.report import plots

        picture = plots.standalone(plots.distortion_against_cost(chosen, options))
        io.write_bytes(plot, picture.encode())
    content = {
        **chosen.to_json(),
        "bits_per_weight": chosen.bits_per_weight,
        "distortion": chosen.distortion,
        "options": len(options),
    }
    common.answer(content, lambda: table.plan(chosen), as_json=json)
