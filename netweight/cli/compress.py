"""netweight compress: plan, compress, gather the evidence, write the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netweight.cli import common


def compress(
    model: common.Model,
    data: common.DataName,
    budget: common.BudgetText,
    method: common.Method = "auto",
    within: common.Within = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    metric: common.MetricName = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="More examples and more search.")] = False,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> bool:
    """Make MODEL as small as a budget says; show what that broke."""
    from netweight import pipeline
    from netweight.core.plan import Budget
    from netweight.report import table

    ceilings, inside = Budget.parse(budget), common.perturbation(within)
    with common.working():
        original, _ = common.open_model(model)
        task = common.open_task(data, original, metric)
        small = pipeline.compress(original, task, ceilings, method=method, out=out, resume=resume)
        found = pipeline.compare(original, small, task, within=inside, thorough=thorough, seed=seed)
        if out is not None:
            pipeline.write(out, original, small, found, task)
    content = {
        "out": None if out is None else str(out),
        "plan": small.plan.to_json(),
        "evidence": found.to_json(),
    }
    common.answer(content, lambda: table.evidence(found), as_json=json)
    if out is not None and not json:
        typer.echo(f"written to {out}; open {out / 'report.html'}")
    return True
