"""netweight schedule: in which order operators run in a small memory, where tensors lie, what moves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netweight.cli import common
from netweight.core.errors import BadInput

if TYPE_CHECKING:
    from netweight.deployment.scratchpad.workload import Workload

UNITS = {"k": 1000, "M": 1000**2, "G": 1000**3, "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "x": 0}


def schedule(
    model: common.Model,
    data: common.DataName,
    memory: Annotated[
        str,
        typer.Option(
            metavar="BYTES", help="Size of the memory: 65536, 64k, 64Ki, or 1.15x the least possible."
        ),
    ] = "1x",
    method: Annotated[str, typer.Option(metavar="NAME", help="search, milp or divide.")] = "search",
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Time limit of the integer programme (milp).")
    ] = 60.0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write residency over the steps as a picture.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Find the operator order, addresses and replacement that move the fewest bytes, for one example."""
    from netweight.core.graph import capture
    from netweight.deployment.scratchpad.cosma import cosma
    from netweight.deployment.scratchpad.replay import replay
    from netweight.deployment.scratchpad.workload import workload

    with common.working():
        network, _ = common.open_model(model)
        task = common.open_task(data, network)
        work = workload(capture(network, task.test.x[:1]))
        room = size(memory, work)
        found = cosma(work, room, method=method, seconds=seconds)  # type: ignore[arg-type]
        played = replay(work, found.schedule, room)
    if plot is not None:
        from netweight.core import io
        from netweight.report import plots
        from netweight.report.residency import residency

        io.write_bytes(plot, plots.standalone(residency(work, found.schedule, room)).encode())
    content = {
        "operators": work.n,
        "memory": room,
        "least_memory": work.least,
        "traffic": played.traffic,
        "compulsory": found.compulsory,
        "bound": found.bound,
        "gap": found.traffic - found.bound,
        "proven": found.proven,
        "method": found.method,
        "seconds": found.seconds,
        "order": [work.names[i] for i in found.schedule.order],
        "stays": [
            {"tensor": work.names[s.tensor], "start": s.start, "stop": s.stop, "address": s.address}
            for s in found.schedule.stays
        ],
    }
    common.answer(content, lambda: shown(content), as_json=json)


def size(text: str, work: Workload) -> int:
    """Bytes of "65536", "64k", "64Ki", or "1.15x" of the least possible; raises `BadInput` for nonsense."""
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        number = float(text.removesuffix(unit))
        found = number * (work.least if unit == "x" else UNITS.get(unit, 1))
        if not 0 < found < 1 << 60:
            raise ValueError(text)
    except ValueError as error:
        raise BadInput(
            f"memory={text}: expected bytes as 65536, 64k, 64Ki or 1.15x (of the least, {work.least})"
        ) from error
    return int(found)


def shown(content: dict[str, Any]) -> str:
    """What people read: the figures in bytes, then the order."""
    order = "\n".join(f"  {step}  {name}" for step, name in enumerate(content["order"]))
    return f"{common.lines(content)}\n\norder:\n{order}"
