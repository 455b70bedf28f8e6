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
    json: common.Json = False,
) -> None:
    """List the methods and the state of their reproductions."""
    from netweight.core import catalogue
    from netweight.reproduce import harness

    folder = harness.results_folder()
    lines = [{**asdict(system), "state": harness.state(system, folder)} for system in catalogue.of_room(room)]

    def shown() -> RenderableType:
        from netweight.report import table

        return table.catalogue(lines)

    common.answer({"methods": lines}, shown, as_json=json)
