"""The main job: plan -> compress -> evidence -> write.

plan(model, task, budget)            per layer the option that the budget allows and that distorts least
compress(model, task, budget)        the plan carried out: a `Compressed`
compare(model, small, task)          the three answers for both networks: an `Evidence`
write(out, model, small, evidence)   weights, plan, evidence and report in one folder, whole or not at all
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netweight.core import io
from netweight.core.catalogue import find
from netweight.core.compressed import Change, Compressed, Packed, assemble, weight_of, weighted
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.origin import named
from netweight.core.perturbation import Perturbation, Rounding
from netweight.core.plan import Budget, Option, Plan, allocate
from netweight.core.progress import steps
from netweight.core.result import Evidence
from netweight.core.task import Task
from netweight.evidence import average, cost, found, possible
from netweight.evidence.sensitivity import Candidate, Distortion, options
from netweight.resume import Work, fingerprint, place

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (0, 32, 64, 128)
HEADER = 8 * 128  # bits of file header per stored tensor: name, dtype, shape, offsets
NOTHING = Work(None)  # keeps no unfinished work
AUTO = ("gptq", "rtn", "nm-magnitude")


def candidates(
    method: str,
    *,
    bits: Sequence[int] = BITS,
    groups: Sequence[int] = GROUPS,
    symmetric: Sequence[bool] = (False, True),
) -> list[Candidate]:
    """The settings that a method is tried with; "auto" tries those of `AUTO`.

    A method with `bits` is tried at all widths, with `group` at all group sizes, with `symmetric` both ways.
    """
    found_: list[Candidate] = []
    for slug in AUTO if method == "auto" else (method,):
        system = find(slug)
        function, settings = named(system.method), named(system.settings)
        names = {field.name for field in dataclasses.fields(settings)}
        if "bits" not in names:
            found_.append(Candidate(slug, function, settings()))
            continue
        schemes: Sequence[dict[str, Any]] = [{}]
        if "group" in names:
            schemes = [{"group": group} for group in groups]
        if "symmetric" in names:
            schemes = [{**scheme, "symmetric": way} for scheme in schemes for way in symmetric]
        found_ += [Candidate(slug, function, settings(bits=b, **scheme)) for b in bits for scheme in schemes]
    return found_


def plan(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    method: str = "auto",
    distortion: Distortion = "kl",
) -> tuple[Plan, list[Option]]:
    """The best plan within the budget, and all options that it was chosen from.

    Raises `BadInput` for a network without layers to compress or with NaN weights, `ImpossibleBudget` for a
    budget that cannot be met.
    """
    layers = planned_layers(model, budget)
    priced = options(model, task, layers, candidates(method), distortion=distortion)
    if all(option.method == "keep" for option in priced):
        raise DoesNotFit(
            f"{method}: none of the {len(layers)} layers can be treated; choose another --method"
        )
    return allocate(priced, budget.in_bytes(float_bytes(model)), fixed=fixed_bits(model, layers)), priced


def planned_layers(model: nn.Module, budget: Budget) -> list[str]:
    """The layers that a budget speaks of: Linear and Conv; a budget of bytes also takes embedding tables in.

    Raises `BadInput` where there are none, or where a weight is not finite.
    """
    layers = weighted(model, embeddings=budget.size is not None or budget.share is not None)
    if not layers:
        raise BadInput(
            "the network has no Linear or Conv layer with a weight of its own; there is nothing to compress"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadInput(f"the network's tensor {name} holds NaN or Inf; repair or retrain it first")
    return layers


def float_bytes(model: nn.Module) -> int:
    """Bytes of the network's tensors with every floating-point number in float32, shared ones counted
    once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum((4 if t.is_floating_point() else t.element_size()) * t.numel() for t in tensors.values())


def fixed_bits(model: nn.Module, layers: Sequence[str]) -> float:
    """Bits of the file that planning cannot change: other tensors, and the file's header."""
    planned = {weight_of(model, layer).data_ptr() for layer in layers}
    tensors = {t.data_ptr(): t for t in model.state_dict().values() if t.data_ptr() not in planned}
    stored = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    return float(stored + HEADER * (len(tensors) + 3 * len(layers)))


def compress(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    method: str = "auto",
    out: Path | None = None,
    resume: bool = False,
    distortion: Distortion = "kl",
) -> Compressed:
    """Plan, then run the chosen methods layer by layer. The model is untouched.

    out: the folder that the result is going to; finished layers are kept beside it, so that `resume` goes
    on after a kill. method: a slug, or "auto" for the best of several per layer.
    """
    if out is not None:
        io.may_replace(out)
    work = Work.open(out, fingerprint(model, task, budget, method, distortion), resume=resume)
    chosen = work.plan()
    if chosen is None:
        chosen, priced = plan(model, task, budget, method=method, distortion=distortion)
        work.keep_plan(chosen, priced)
    return assemble(model, Change(carry_out(model, task, chosen, work)), chosen)


def carry_out(model: nn.Module, task: Task, chosen: Plan, work: Work = NOTHING) -> dict[str, Packed]:
    """The packed weight of every layer of a plan; finished ones are taken from `work`, new ones kept
    there."""
    packed: dict[str, Packed] = {}
    for option in steps([*chosen.choices.values()], "Compressing"):
        if option.method == "keep":
            continue
        form = work.form(option.layer)
        if form is None:
            system = find(option.method)
            settings = named(system.settings)(**option.settings)
            form = named(system.method)(model, task.blind(), [option.layer], settings).packed[option.layer]
            work.keep_form(option.layer, form)
        packed[option.layer] = form
    return packed


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
        evidence.context["disagreements"] = attacked.disagreements
    evidence.rows += cost.rows(original, small.model if packed else twin, task, packed)
    if packed:
        evidence.layers = layer_table(original, packed)
        evidence.notes += [
            f"{layer} was left as it is: {reason}" for layer, reason in packed.change.left.items()
        ]
    return evidence


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


def load(folder: str | Path, like: nn.Module | None = None) -> Compressed:
    """The compressed network of a folder (see `Compressed.load`)."""
    return Compressed.load(folder, like=like)
