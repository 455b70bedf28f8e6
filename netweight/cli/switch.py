"""netweight switch: another bit width for a network that was trained for several, in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from netweight.cli import common
from netweight.core import widths

EXPORTS = ("*.onnx", "*.xml", "integer", "compressed-tensors")  # what `netweight export` writes into DIR


def switch(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of `netweight train --method double-rounding`.")
    ],
    bits: Annotated[
        str | None,
        typer.Option(metavar="BITS", help="For all layers (4), or for some (8,layer1.0.conv2=4)."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Measure every width on it, for the report.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The original, to stand beside them.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, where DIR cannot say how it is built.")
    ] = None,
    metric: common.MetricName = None,
    json: common.Json = False,
) -> None:
    """Change the bit width of a network in place; without --bits show what it has."""
    done = widths.switch(folder, bits)
    if data is not None:
        measure(folder, data, against, like, metric)
    changed = sum(done.before[layer] != b for layer, b in done.after.items())
    content: dict[str, Any] = {
        "folder": folder,
        "widths": list(done.widths),
        "before": done.before,
        "after": done.after,
        "changed": changed,
        "seconds": done.seconds,
        "exports_of_other_widths": exported(Path(folder)) if changed else [],
        "evidence": measured(Path(folder)),
    }
    common.answer(content, lambda: shown(content), as_json=json)


def measure(folder: str, data: str, against: str | None, like: str | None, metric: str | None) -> None:
    """Measure all widths and put them into the folder's evidence.json and report.html."""
    from netweight import pipeline

    with common.working():
        original = common.open_model(against)[0] if against else None
        built = common.open_model(like)[0] if like else original
        small = pipeline.load(folder, like=built)
        pipeline.record_widths(Path(folder), original, small, common.open_task(data, small.model, metric))


def measured(folder: Path) -> list[dict[str, Any]]:
    """The rows of evidence.json that speak of one width, none where nothing was measured."""
    from netweight.core import io

    file = folder / "evidence.json"
    content = io.read_json(file, "the evidence of a network") if file.exists() else {}
    return [row for row in content.get("rows", []) if widths.of_one_width(str(row.get("quantity")))]


def exported(folder: Path) -> list[str]:
    """Exports that lie in the folder: they are of the widths that they were written at."""
    return sorted(path.name for pattern in EXPORTS for path in folder.glob(pattern))


def shown(content: dict[str, Any]) -> str:
    """For people: the widths in use, how often each, and what is known of every width."""
    used = list(content["after"].values())
    layers = ", ".join(f"{used.count(b)} at {b} bits" for b in content["widths"] if b in used)
    lines = [f"layers: {layers}", f"trained for: {', '.join(map(str, content['widths']))} bits"]
    for row in content["evidence"]:
        lines.append(f"{row['quantity']}: {row['compressed']:.4g} (original {row['original']})")
    if content["exports_of_other_widths"]:
        lines.append(f"of other widths, export again: {', '.join(content['exports_of_other_widths'])}")
    return "\n".join([*lines, f"seconds: {content['seconds']:.4f}"])
