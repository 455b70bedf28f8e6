"""netweight compare: the three answers for two networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netweight.cli import common


def compare(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="The network before.")],
    smaller: Annotated[
        str, typer.Argument(metavar="SMALLER", help="The network after: a folder or a MODEL.")
    ],
    data: common.DataName,
    within: common.Within = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for evidence.json and report.html.")
    ] = None,
    metric: common.MetricName = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="More examples and more search.")] = False,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Show what turning ORIGINAL into SMALLER did."""
    from netweight import pipeline
    from netweight.evidence import energy
    from netweight.report import table

    inside = common.perturbation(within)
    with common.working():
        before, _ = common.open_model(original)
        after = common.packed(smaller, before)
        task = common.open_task(data, before, metric)
        found = pipeline.compare(before, after, task, within=inside, thorough=thorough, seed=seed)
        found.rows += energy.training_rows(original, smaller)
        if out is not None:
            from netweight.core import io
            from netweight.report import html

            found.save(out)
            page = html.render(found, after.plan, [], html.examples(before, after, task, found))
            io.write_bytes(out / "report.html", page.encode())
    content = {"out": None if out is None else str(out), "evidence": found.to_json()}
    common.answer(content, lambda: table.evidence(found), as_json=json)
