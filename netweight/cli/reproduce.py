"""netweight reproduce: a paper's claim beside what is measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netweight.cli import common
from netweight.core.errors import BadInput


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
    """Run the reproduction of SLUG and hold its claim against what is measured."""
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

    def shown():  # noqa: ANN202
        from rich.console import Group

        from netweight.report import table

        return Group(
            *(
                part
                for one in found
                for part in (f"{one['slug']}: {one['claim']}", table.bars(one), "\n".join(_told(one)))
            )
        )

    common.answer(content, shown, as_json=json)
    return all(outcome.passed for outcome in outcomes)


def _told(outcome: dict) -> list[str]:
    seeds = ", ".join(map(str, outcome["seeds"]))
    where = "a quick run, not recorded" if outcome["quick"] else f"recorded in results/{outcome['slug']}.json"
    return [f"seeds {seeds}; {outcome['seconds']:.0f} s; {where}"]
