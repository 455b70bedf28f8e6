"""netweight compress: plan, compress, gather the evidence, write the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from netweight.cli import common
from netweight.core import catalogue
from netweight.core.errors import BadInput

if TYPE_CHECKING:
    from netweight.core.plan import Budget
    from netweight.core.result import Evidence


def compress(
    model: common.Model,
    data: common.DataName,
    budget: common.BudgetText,
    method: common.Method = "auto",
    distortion: common.DistortionName = "kl",
    within: common.Within = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    metric: common.MetricName = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="More examples and more search.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Block by block: for a checkpoint larger than memory.")
    ] = False,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> bool:
    """Make MODEL as small as a budget says; show what that broke."""
    from netweight import pipeline
    from netweight.core.plan import Budget
    from netweight.planning import float_bytes
    from netweight.report import table

    if method != "auto" and catalogue.find(method).room in ("training", "search"):
        raise BadInput(f"{method} trains the network; use netweight train --method {method}")
    if stream:
        return block_by_block(model, data, Budget.parse(budget), method, out, resume, json)
    ceilings, inside = Budget.parse(budget), common.perturbation(within)
    with common.working():
        original, _ = common.open_model(model)
        task = common.open_task(data, original, metric)
        how = {"method": method, "distortion": distortion, "thorough": thorough}
        small = pipeline.compress(original, task, ceilings, out=out, resume=resume, **how)
        found = pipeline.compare(original, small, task, within=inside, thorough=thorough, seed=seed)
        if out is not None:
            pipeline.write(out, original, small, found, task)
    missed = over_budget(ceilings.in_bytes(float_bytes(original)), found, out)
    content = {
        "missed": missed,
        "out": None if out is None else str(out),
        "plan": small.plan.to_json(),
        "evidence": found.to_json(),
    }
    common.answer(content, lambda: table.evidence(found), as_json=json)
    if out is not None and not json:
        typer.echo(f"written to {out}; open {out / 'report.html'}")
    for name in missed:
        typer.echo(f"the budget {name} is missed; report.html says by how much", err=True)
    return not missed


def block_by_block(
    folder: str, data: str, budget: Budget, method: str, out: Path | None, resume: bool, json: bool
) -> bool:
    """Compress a checkpoint that need not fit into memory; evidence is left to `netweight compare`."""
    from netweight import streaming
    from netweight.report import table

    if out is None:
        raise BadInput("--stream writes a folder and needs its name; give for example --out small")
    with common.working():
        tokens = streaming.calibration(folder, data)
        how = "gptq" if method == "auto" else method
        plan = streaming.compress_folder(folder, tokens, budget, out, method=how, resume=resume)
    common.answer({"out": str(out), "plan": plan.to_json()}, lambda: table.plan(plan), as_json=json)
    if not json:
        typer.echo(f"written to {out}; netweight compare {folder} {out} shows what that did")
    return True


def over_budget(budget: Budget, found: Evidence, out: Path | None) -> list[str]:
    """The ceilings, as "bits=4", that what was measured lies above; size is that of the written weights."""
    measured = {
        "bits": found["stored bits per weight"].compressed,
        "bops": found["bit operations"].compressed,
        "latency": found["latency, median"].compressed,
    }
    if out is not None:
        measured["size"] = (out / "weights.safetensors").stat().st_size
    ceilings = {name: getattr(budget, name) for name in measured}
    return [
        f"{name}={ceiling:g}"
        for name, ceiling in ceilings.items()
        if ceiling is not None and not measured[name] <= ceiling
    ]
