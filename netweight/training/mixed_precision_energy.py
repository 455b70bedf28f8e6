"""Mixed precision, and whether it saves energy: few bits where a measured trial says that they take less.

Paper: Antonopoulos, "Improve Machine Learning carbon footprint using Nvidia GPU and Mixed Precision training
for classification models - Part I", 2024, arXiv:2409.07853. Mixed precision itself: Micikevicius et al.,
"Mixed Precision Training", ICLR 2018, arXiv:1710.03740.

Weights, the optimizer and the loss stay in float32; products of the passes are taken in bfloat16, or in
float16 with a loss that is scaled: by 2^16 at first, doubled after 2,000 good steps, halved where a gradient
is not finite, whose step is left out. First a trial, on copies: `repeats` runs of `steps` steps in each
precision, in random order, the first `warm` steps of each not metered. Joules per step are compared by
Welch's test; the lower precision is chosen if it takes less at p < `level`. Then the network is trained in
the chosen one, metered as well.

Differs from the paper: it logs watts of runs with other batches, neurons and epochs (its claim, 7 to 11 W
less and no statistical significance, is about power); here energy decides, which falls with the time though
power may not. Welch's test in place of Student's, as variances differ; runs in random order. The protocol
over several batches and widths is in the reproduction.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.progress import steps as progress
from netweight.core.task import Data, Task
from netweight.inspection.counters import PROCESSOR
from netweight.inspection.meters import WORLD, Energy, Meter, waited
from netweight.inspection.statistics import Difference, difference
from netweight.training import distributed
from netweight.training.checkpoint import Checkpoint, Running, fingerprint, read
from netweight.training.loop import Hooks, Moment, Training, train
from netweight.training.settings import PRECISIONS
from netweight.training.trained import Trained, about, labelled, loss

FULL = PRECISIONS[0]


@dataclass(frozen=True)
class MixedPrecisionEnergy:
    """Settings of `mixed_precision_energy`.

    low: the precision that is tried beside float32. repeats, steps, warm: of the trial. level: of Welch's
    test. intensity: g of CO2 for each kWh. pue: what the building uses for each joule of its computers.
    """

    low: str = "bfloat16"
    repeats: int = 5
    steps: int = 20
    warm: int = 3
    level: float = 0.01
    intensity: float = WORLD
    pue: float = 1.0

    def __post_init__(self) -> None:
        if self.low not in PRECISIONS[1:]:
            raise unknown("lower precision", self.low, PRECISIONS[1:])
        if self.repeats < 2 or self.steps < 1 or self.warm < 1:
            raise BadInput(
                f"repeats={self.repeats}, steps={self.steps}, warm={self.warm}: a comparison needs two runs "
                "or more of a step or more, after one to warm up; give more"
            )
        if not 0 < self.level < 1:
            raise BadInput(f"level={self.level}: a probability lies between 0 and 1; give for example 0.01")
        Energy((), 0.0, 0.0).grams(self.intensity, self.pue)


@dataclass(frozen=True)
class Trial:
    """Energies of the runs in float32 and in the lower precision, and the difference in joules per step."""

    full: tuple[Energy, ...]
    low: tuple[Energy, ...]
    joules: Difference
    watts: Difference

    def told(self, steps: int) -> dict[str, Any]:
        """As JSON values."""
        groups = {"float32": self.full, "low": self.low}
        per_step = {n: [run.joules / steps for run in runs] for n, runs in groups.items()}
        watts = {n: [run.watts for run in runs] for n, runs in groups.items()}
        told = {"joules_per_step": per_step, "watts": watts, "how": self.full[0].how}
        return told | {"energy": finite(asdict(self.joules)), "power": finite(asdict(self.watts))}


def mixed_precision_energy(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: MixedPrecisionEnergy = MixedPrecisionEnergy(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model trained in the precision that a trial finds to take less energy.

    Its notes: the precision, the trial (none where a stopped run goes on: it keeps its precision), the energy
    of the training, and what the processor can do. Raises `BadInput` where `how` has a precision of its own,
    `DoesNotFit` for data without class numbers and over several processes.
    """
    if how.precision != FULL:
        raise BadInput(
            f"precision {how.precision}: this method chooses one; give what it is to try as a setting, "
            f"low={how.precision}"
        )
    if distributed.count() > 1:
        raise DoesNotFit("energy is compared in one process; start without torchrun")
    data, keep = labelled(task), about(keep, "mixed-precision-energy", settings)
    chosen, notes = begun(model, data, how, settings, keep), {}
    if chosen is None:
        found = trial(model, data, how, settings)
        chosen = settings.low if saves(found, settings.level) else FULL
        notes = {"trial": found.told(settings.steps)}
    device = next(model.parameters()).device
    network = copy.deepcopy(model)
    with Meter(device) as meter:
        losses = train(network, data, loss, replace(how, precision=chosen), keep=keep)
    told = meter.energy.told(intensity=settings.intensity, pue=settings.pue)
    notes |= {"precision": chosen, "energy": told, "hardware": hardware(device)}
    return Trained(network, losses=losses, notes=notes)


def saves(found: Trial, level: float) -> bool:
    """Whether the lower precision takes less energy, at that level."""
    return found.joules.ratio < 1 and found.joules.p < level


def begun(
    model: nn.Module, data: Data, how: Training, settings: MixedPrecisionEnergy, keep: Checkpoint | None
) -> str | None:
    """The precision of the run that was stopped; None to begin anew."""
    if keep is None or not (keep.resume and keep.path.exists()):
        return None
    what = read(keep.path)["what"]
    for precision in (FULL, settings.low):
        if fingerprint(model, data, replace(how, precision=precision), keep.about) == what:
            return precision
    return FULL  # of another training, which the loop says


# The trial ------------------------------------------------------------------------------------------------


def trial(model: nn.Module, data: Data, how: Training, settings: MixedPrecisionEnergy) -> Trial:
    """Runs in both precisions in random order, on copies of the model."""
    order = [(precision, repeat) for precision in (FULL, settings.low) for repeat in range(settings.repeats)]
    mixed = torch.randperm(len(order), generator=torch.Generator().manual_seed(how.seed)).tolist()
    runs: dict[str, list[Energy]] = {FULL: [], settings.low: []}
    for index in progress(mixed, "Comparing energy"):
        precision, repeat = order[index]
        each = replace(how, precision=precision, seed=how.seed + repeat)
        energy, _ = metered(model, data, each, steps=settings.steps, warm=settings.warm)
        runs[precision].append(energy)
    return compared(runs[FULL], runs[settings.low])


def compared(full: Sequence[Energy], low: Sequence[Energy]) -> Trial:
    """Energy and power of runs of equally many steps."""
    joules = difference([run.joules for run in full], [run.joules for run in low])
    return Trial(
        tuple(full), tuple(low), joules, difference([run.watts for run in full], [run.watts for run in low])
    )


def metered(
    model: nn.Module, data: Data, how: Training, *, steps: int, warm: int
) -> tuple[Energy, nn.Module]:
    """The energy of `steps` steps after `warm` others, on a copy of the model, and that copy.

    Batches are drawn anew for each run from `how.seed`; its epochs do not count.
    """
    network, meter = copy.deepcopy(model), Meter(next(model.parameters()).device)

    def order(generator: torch.Generator) -> Sequence[Tensor]:
        batch = min(how.batch, len(data))
        return [torch.randperm(len(data), generator=generator)[:batch] for _ in range(warm + steps)]

    def after(run: Running, at: Moment) -> None:
        if at.step + 1 == warm:
            meter.begin()
        elif at.step + 1 == warm + steps:
            meter.end()

    train(network, data, loss, replace(how, epochs=1), hooks=Hooks(order=order, after=after))
    return meter.energy, network


# The hardware ---------------------------------------------------------------------------------------------


def hardware(device: torch.device, size: int = 256, about: Path = PROCESSOR) -> dict[str, Any]:
    """Whether this device multiplies in bfloat16: by its name for it, and by the time of one product.

    "ratio": seconds of a product of `size`^3 in bfloat16 over float32, the least of five each.
    """
    named: list[str] = []
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            named = ["cuda"]
    elif about.exists():
        flags = set(about.read_text().split())
        named = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if name in flags]
    taken = {dtype: product(device, size, dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = taken[torch.bfloat16] / taken[torch.float32]
    return {"bfloat16": bool(named), "named": named, "ratio": ratio, "size": size}


def product(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Seconds of a product of two matrices, the least of five after one to warm up."""
    matrix, least = torch.ones(size, size, device=device, dtype=dtype), math.inf
    for repeat in range(6):
        waited(device)
        start = time.perf_counter()
        matrix @ matrix
        waited(device)
        least = min(least, time.perf_counter() - start) if repeat else math.inf
    return least


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers as JSON has them: None where they are not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
