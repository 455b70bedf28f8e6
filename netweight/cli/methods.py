"""netweight methods: the catalogue, with the state of each reproduction."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from netweight.cli import common

if TYPE_CHECKING:
    from rich.console import RenderableType


def methods(
    room: Annotated[str | None, typer.Option(metavar="ROOM", help="Only the methods of one room.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Only methods that are so, as arithmetic=dyadic."),
    ] = None,
    traits: Annotated[bool, typer.Option("--traits", help="What each method is, field by field.")] = False,
    json: common.Json = False,
) -> None:
    """List the methods and the state of their reproductions."""
    from netweight.core import catalogue, taxonomy
    from netweight.reproduce import harness

    folder = harness.results_folder()
    wanted = [taxonomy.parse(text) for text in where or ()]
    lines = [
        {**asdict(system), "state": harness.state(system, folder), "traits": taxonomy.traits(system.slug)}
        for system in catalogue.of_room(room)
        if all(taxonomy.fits(system.slug, *condition) for condition in wanted)
    ]

    def shown() -> RenderableType:
        from netweight.report import table

        return table.traits(lines) if traits else table.catalogue(lines)

    common.answer({"methods": lines}, shown, as_json=json)
