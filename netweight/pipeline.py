"""The main job: plan -> compress -> evidence -> write.

plan(model, task, budget)            per layer the option that the budget allows and that distorts least
compress(model, task, budget)        the plan carried out: a `Compressed`
compare(model, small, task)          the three answers for both networks: an `Evidence`
write(out, model, small, evidence)   weights, plan, evidence and report in one folder, whole or not at all
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netweight import auto
from netweight.core import io
from netweight.core.compressed import Compressed, assemble, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import Perturbation, Rounding, over_the_range
from netweight.core.plan import Budget
from netweight.core.result import Evidence
from netweight.core.task import Task
from netweight.core.widths import of_one_width
from netweight.evidence import average, cost, energy, found, possible, widths
from netweight.evidence.sensitivity import Distortion
from netweight.nn.kernels import applies
from netweight.nn.layers import PackedLayer
from netweight.planning import alone, is_whole, plan
from netweight.resume import Work, fingerprint, place

__all__ = ["compare", "compress", "load", "plan", "write"]


def compress(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    method: str = "auto",
    out: Path | None = None,
    resume: bool = False,
    distortion: Distortion = "kl",
    thorough: bool = False,
) -> Compressed:
    """Plan, then run the chosen methods layer by layer. The model is untouched.

    out: the folder that the result is going to; finished layers are kept beside it, so that `resume` goes
    on after a kill. method: a slug, or "auto" for the best of several plans (see `netweight.auto`), with
    `thorough` of more.
    """
    if out is not None:
        io.may_replace(out)
    if method != "auto" and is_whole(method):  # its layers are not finished one by one
        plan_, change = alone(model, task, budget, method)
        return assemble(model, change, plan_)
    work = Work.open(out, fingerprint(model, task, budget, method, distortion), resume=resume)
    if method == "auto":
        return auto.best(model, task, budget, distortion=distortion, thorough=thorough, work=work)
    plan_, change = alone(model, task, budget, method, distortion=distortion, work=work)
    return assemble(model, change, plan_)


def compare(
    original: nn.Module,
    small: Compressed | nn.Module,
    task: Task,
    *,
    within: Perturbation | None = None,
    thorough: bool = False,
    seed: int = 0,
) -> Evidence:
    """The three answers for two networks, on the task's test data.

    within: the set around each input that is attacked and proven on; None leaves these two questions open
    (a note says so). thorough: more examples, attack steps and restarts.
    """
    packed = small if isinstance(small, Compressed) else None
    twin = packed.plain() if packed else small
    assert isinstance(twin, nn.Module)
    measured = average.measure(original, twin, task)
    evidence = Evidence(rows=list(measured.rows), flipped=measured.flipped, context=context(task, within))
    if packed:
        evidence.rows += widths.rows(original, packed, task)
    if within is None:
        evidence.notes.append("No set was given (--within), so nothing was attacked and nothing proven.")
    elif isinstance(within, Rounding):
        evidence.notes.append(
            "Sets of weights are proven by `netweight verify`; this table holds sets of inputs."
        )
    elif not task.test.x.is_floating_point():
        raise DoesNotFit(
            f"{task.test.name}: tokens are whole numbers, which have no set {within}; leave --within out"
        )
    else:
        attacked = found.measure(original, twin, task, within, thorough=thorough, seed=seed)
        proven = possible.measure(original, twin, task, within, thorough=thorough)
        possible.check(attacked, proven)
        evidence.rows += [*attacked.rows, *proven.rows]
        evidence.notes.append(found.verdict(evidence["change under attack"]))
        if over := over_the_range(within, task.test.low, task.test.high):
            evidence.notes.append(over)
        evidence.context["disagreements"] = attacked.disagreements
    runs = small.model if packed else twin
    evidence.rows += cost.rows(original, runs, task, packed)
    evidence.rows.append(energy.row(original, runs, task.test.x[:1]))
    if packed:
        evidence.layers = layer_table(original, packed)
        evidence.notes.append(how_it_runs(packed.model))
        evidence.notes += [
            f"{layer} was left as it is: {reason}" for layer, reason in packed.change.left.items()
        ]
    return evidence


def how_it_runs(model: nn.Module) -> str:
    """What computes the packed layers while they are measured, and what could."""
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    fit = sum(applies(layer) for layer in layers)
    return (
        f"All {len(layers)} packed layers are decoded on each call while measured; {fit} of them fit "
        "torch's 4-bit product, which rounds inputs to bfloat16 (netweight.nn.kernels.fast)."
    )


def layer_table(original: nn.Module, small: Compressed) -> list[dict[str, Any]]:
    """Where the bits went: one row per planned layer."""
    rows = []
    for layer, option in small.plan.choices.items():
        form = small.packed.get(layer)
        weight = weight_of(original, layer)
        bits = form.bits() if form is not None else 8 * weight.numel() * weight.element_size()
        rows.append(
            {
                "layer": layer,
                "method": option.method if form is not None else "keep",
                "option": option.label,
                "weights": weight.numel(),
                "bits": bits,
                "bits_per_weight": bits / weight.numel(),
                "distortion": option.distortion,
            }
        )
    return rows


def context(task: Task, within: Perturbation | None) -> dict[str, Any]:
    """What has to be known beside the numbers: data, set, versions, machine."""
    return {
        "data": task.test.name,
        "test_examples": len(task.test),
        "calibration_examples": len(task.calibration),
        "metric": task.judge.name,
        "within": str(within) if within is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write(
    out: Path,
    original: nn.Module,
    small: Compressed,
    evidence: Evidence,
    task: Task,
) -> None:
    """small/ with weights.safetensors, plan.json, evidence.json and report.html, whole or not at all."""
    from netweight.report import html

    priced = Work(place(out)).options()
    page = html.render(evidence, small.plan, priced, html.examples(original, small, task, evidence))
    with io.whole_folder(out) as beside:
        small.write(beside)
        evidence.save(beside)
        io.write_bytes(beside / "report.html", page.encode())
    Work.done(out)


def record_widths(folder: Path, original: nn.Module | None, small: Compressed, task: Task) -> None:
    """Measure a network at every bit width it was trained for; evidence.json and report.html hold the rows.

    Rows of other quantities that the folder has stay. Raises `DoesNotFit` where there is nothing to measure.
    """
    from netweight.report import html

    rows = widths.rows(original, small, task)
    if not rows:
        raise DoesNotFit(f"{task.test.name}: widths are measured on labels; give data with labels")
    file, evidence = folder / "evidence.json", Evidence([], context=context(task, None))
    if file.exists():
        evidence = Evidence.from_json(io.read_json(file, "the evidence of a compressed network"))
    kept = [row for row in evidence.rows if not of_one_width(row.quantity)]
    evidence.rows = kept + rows
    page = html.render(evidence, small.plan, [], [])
    evidence.save(folder)
    io.write_bytes(folder / "report.html", page.encode())


def load(folder: str | Path, like: nn.Module | None = None) -> Compressed:
    """The compressed network of a folder (see `Compressed.load`)."""
    return Compressed.load(folder, like=like)
