"""netweight bench: speed and memory, measured on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from netweight.cli import common

BENCHES = {
    "allocate": "netweight.bench.allocate:bench",
    "attack": "netweight.bench.attack:bench",
    "compress": "netweight.bench.compress:bench",
    "distortion": "netweight.bench.distortion:bench",
    "run": "netweight.bench.run:bench",
    "stream": "netweight.bench.stream:bench",
    "train": "netweight.bench.train:bench",
    "verify": "netweight.bench.verify:bench",
    "vnncomp": "netweight.bench.vnncomp:bench",
}
OPTIONS = {
    "verify": ("peer_python", "plot"),
    "compress": ("peer_python",),
    "distortion": ("plot",),
    "vnncomp": ("family", "limit", "timeout"),
}


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(BENCHES)}.")],
    peer_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="verify: the Python of an environment that has auto_LiRPA; compress: llmcompressor.",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE.png", help="verify: the curves of cost; distortion: its panels."),
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="vnncomp: one family of properties; all by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="vnncomp: properties of each family.")] = None,
    timeout: Annotated[float | None, typer.Option(help="vnncomp: seconds for each property.")] = None,
    json: common.Json = False,
) -> bool:
    """Measure the planner, compressing, packed products, memory, training, attacks or proofs here."""
    from netweight.core.errors import BadInput, unknown
    from netweight.core.origin import named

    if name not in BENCHES:
        raise unknown("bench", name, BENCHES)
    options = {"peer_python": peer_python, "plot": plot, "family": family, "limit": limit, "timeout": timeout}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() - set(OPTIONS.get(name, ())):
        owner = next(bench for bench, keys in OPTIONS.items() if key in keys)
        raise BadInput(f"bench {name} takes no --{key.replace('_', '-')}; give it to bench {owner}")
    with common.working():
        measured = named(BENCHES[name])(**given)
    common.answer(measured, lambda: table(measured), as_json=json)
    return all(bar["reached"] for bar in measured.get("bars", []))


def table(measured: dict[str, Any]) -> str:
    """The single figures a line each, then the figures of each row, then the bars."""
    from netweight.core.result import short

    rows = [
        "\n".join(
            f"  {name.replace('_', ' ')}: {short(v) if isinstance(v, float) else v}"
            for name, v in row.items()
        )
        for row in measured.get("rows", [])
    ]
    held = [
        f"  {'reached' if bar['reached'] else 'not reached'}: {bar['name']}: {short(float(bar['measured']))}"
        f" ({bar['direction']} {short(float(bar['bar']))})"
        for bar in measured.get("bars", [])
    ]
    return "\n\n".join([common.lines(measured), *rows, *(["\n".join(held)] if held else [])])
