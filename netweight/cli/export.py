"""netweight export: a compressed network in the form that another runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netweight.cli import common
from netweight.core.errors import unknown

FORMS = ("onnx", "onnx-int8", "onnxruntime", "openvino", "compressed-tensors", "integer")


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `netweight compress` wrote.")],
    data: common.DataName,
    to: Annotated[str, typer.Option("--to", metavar="FORM", help=", ".join(FORMS))] = "onnx",
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File or folder to write; by default inside DIR.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, where DIR cannot say how it is built.")
    ] = None,
    json: common.Json = False,
) -> bool:
    """Write a compressed network for another runtime, open it there, and compare."""
    if to not in FORMS:
        raise unknown("form", to, FORMS)
    from netweight import pipeline
    from netweight.deployment import exports

    with common.working():
        small = pipeline.load(folder, like=common.open_model(like)[0] if like else None)
        task = common.open_task(data, small.model)
        made = exports.export(small, task, to, out or Path(folder) / exports.PLACES[to])
        exports.record(Path(folder), to, made)
    common.answer(made, lambda: common.lines(made), as_json=json)
    return made["same"]
