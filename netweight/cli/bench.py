"""netweight bench: speed and memory, measured on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from netweight.cli import common

BENCHES = {
    "allocate": "netweight.bench.allocate:bench",
    "run": "netweight.bench.run:bench",
    "stream": "netweight.bench.stream:bench",
}


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(BENCHES)}.")],
    json: common.Json = False,
) -> None:
    """Measure the planner, packed products or block-by-block memory on this machine."""
    from netweight.core.errors import unknown
    from netweight.core.origin import named

    if name not in BENCHES:
        raise unknown("bench", name, BENCHES)
    with common.working():
        measured = named(BENCHES[name])()
    common.answer(measured, lambda: table(measured), as_json=json)


def table(measured: dict[str, Any]) -> str:
    """The single figures a line each, then the figures of each row."""
    from netweight.core.result import short

    rows = [
        "\n".join(
            f"  {name.replace('_', ' ')}: {short(v) if isinstance(v, float) else v}"
            for name, v in row.items()
        )
        for row in measured.get("rows", [])
    ]
    return "\n\n".join([common.lines(measured), *rows])
