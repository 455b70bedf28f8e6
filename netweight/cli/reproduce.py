"""netweight reproduce: a paper's claim beside what is measured here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.cli import common
from netweight.core.errors import BadInput

if TYPE_CHECKING:
    from rich.console import RenderableType


def reproduce(
    slug: Annotated[
        str | None, typer.Argument(metavar="SLUG", help="A system of `netweight methods`.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every system.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small run that shows it works; nothing is recorded.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds the mean is taken over.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the data sets lie.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the seeds that a stopped run finished.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Seeds at the same time (more than 1 needs Ray).")] = 1,
    json: common.Json = False,
) -> bool:
    """Hold a paper's claim against what is measured here."""
    from netweight.core import catalogue
    from netweight.reproduce import harness

    if (slug is None) == (not everything):
        raise BadInput("reproduce needs one SLUG or --all; `netweight methods` lists the slugs")
    slugs = [line.slug for line in catalogue.reproductions()] if slug is None else [slug]
    outcomes = []
    with common.working():
        for name in slugs:
            outcomes.append(
                harness.run(
                    name, seeds, seed=seed, quick=quick, data_dir=data_dir, resume=resume, workers=workers
                )
            )
    found = [outcome.to_json() for outcome in outcomes]
    content = {"outcomes": found} if slug is None else found[0]

    common.answer(content, lambda: _told(found), as_json=json)
    return all(outcome.passed for outcome in outcomes)


def _told(found: list[dict[str, Any]]) -> RenderableType:
    """Each claim with its table of bars and how it was had."""
    from rich.console import Group

    from netweight.report import table

    parts: list[RenderableType] = []
    for one in found:
        seeds = ", ".join(map(str, one["seeds"]))
        where = "a quick run, not recorded" if one["quick"] else f"recorded in results/{one['slug']}.json"
        parts += [
            f"{one['slug']}: {one['claim']}",
            table.bars(one),
            f"seeds {seeds}; {one['seconds']:.0f} s; {where}",
        ]
    return Group(*parts)
