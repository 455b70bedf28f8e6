"""netweight export: a compressed network in the form that another runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netweight.cli import common
from netweight.core.errors import unknown

TARGETS = ("onnx",)


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that `netweight compress` wrote.")],
    data: common.DataName,
    to: Annotated[str, typer.Option("--to", metavar="FORM", help=" or ".join(TARGETS))] = "onnx",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write; by default DIR/model.onnx.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, where DIR cannot say how it is built.")
    ] = None,
    json: common.Json = False,
) -> bool:
    """Write a compressed network for another runtime, and check it."""
    from netweight import pipeline
    from netweight.deployment import onnx

    if to not in TARGETS:
        raise unknown("form", to, TARGETS)
    path = out or Path(folder) / "model.onnx"
    with common.working():
        small = pipeline.load(folder, like=common.open_model(like)[0] if like else None)
        example = common.open_task(data, small.model).test.take(8).x
        made = onnx.export(small, path, example)
    content = {"path": str(path), "bytes": path.stat().st_size, **vars(made)}
    common.answer(content, lambda: common.lines(content), as_json=json)
    return made.same
