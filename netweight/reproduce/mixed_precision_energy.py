"""Antonopoulos 2024: mixed precision takes 7 to 11 W less, of which no test finds statistical significance.

The paper: a fully connected classifier with other batches, neurons and epochs, on one GPU and a meter at the
wall. Here: 3072-w-w-10 on 2,048 images of CIFAR-10; float32 and bfloat16, batches of 64 and 256, w = 512 and
1024, 5 runs of 60 steps each in random order after 5 to warm up, on this machine's processor, one thread.
Joules are metered where a counter can be read, else modelled from CPU time: then power is nearly constant by
the model, and energy is what differs. Without bfloat16 in the hardware its bars are left out and the figures
say so. Quick: batches of 64, w = 512, 3 runs of 10 steps.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from netweight.core.result import Bar, Claim
from netweight.core.task import Data, outputs
from netweight.data.images import cifar10
from netweight.inspection.meters import INTENSITY, WORLD, Energy, resting
from netweight.inspection.statistics import anova
from netweight.models.trained import seeded
from netweight.training.loop import Training
from netweight.training.mixed_precision_energy import Trial, compared, finite, hardware, metered

FULL, LOW = "float32", "bfloat16"
IMAGES, TESTED, WARM = 2048, 1000, 5
LARGEST = (256, 1024)  # batch, width


@dataclass(frozen=True)
class Cell:
    """One combination: batch, width and precision."""

    batch: int
    width: int
    precision: str


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed; accuracies are shares of the test data, energies joules."""
    source = cifar10()
    data, test = source.train(IMAGES), source.test(TESTED)
    with seeded(seed):
        rest = resting(1.0 if quick else 5.0)
        able = hardware(torch.device("cpu"), 512 if quick else 1024)
        energies, apart = factorial(data, test, seed, quick)
        ratios = doubled(data, seed, rest, quick)
    repeats, steps = (3, 10) if quick else (5, 60)
    trials = {
        (cell.batch, cell.width): compared(runs, energies[replace(cell, precision=LOW)])
        for cell, runs in energies.items()
        if cell.precision == FULL
    }
    twice = abs(statistics.median(ratios) - 2)
    bars = [
        Bar("accuracy, float32 and bfloat16, apart", abs(apart), 0.02 if quick else 0.01, "at most"),
        Bar("net energy of twice the steps, from 2.0", twice, 0.4 if quick else 0.15, "at most"),
    ]
    if able["bfloat16"] and not quick:
        most = trials[LARGEST].joules
        bars += [
            Bar("joules a step, bfloat16 / float32, batch 256, width 1024", most.ratio, 0.8, "at most"),
            Bar("the same: Welch's p", most.p, 0.01, "at most"),
        ]
    figures = {"hardware": able, "rest, W": rest, "runs": repeats, "steps": steps, "twice the steps": ratios}
    figures |= {f"batch {b}, width {w}": told(found, steps, rest) for (b, w), found in trials.items()}
    return Claim(bars, figures | significance(energies))


def factorial(data: Data, test: Data, seed: int, quick: bool) -> tuple[dict[Cell, list[Energy]], float]:
    """The energies of all runs of each combination, and the mean accuracy of float32 over bfloat16."""
    batches, widths = ((64,), (512,)) if quick else ((64, 256), (512, 1024))
    repeats, steps = (3, 10) if quick else (5, 60)
    cells = [Cell(b, w, p) for b in batches for w in widths for p in (FULL, LOW)]
    planned = [(cell, repeat) for cell in cells for repeat in range(repeats)]
    generator = torch.Generator().manual_seed(seed)
    energies: dict[Cell, list[Energy]] = {cell: [] for cell in cells}
    right: dict[str, list[float]] = {FULL: [], LOW: []}
    for index in torch.randperm(len(planned), generator=generator).tolist():
        cell, repeat = planned[index]
        how = Training(1, cell.batch, precision=cell.precision, seed=100 * seed + repeat)
        energy, network = metered(mlp(cell.width, how.seed), data, how, steps=steps, warm=WARM)
        energies[cell].append(energy)
        right[cell.precision].append(float((outputs(network, test).argmax(1) == test.y).float().mean()))
    return energies, statistics.fmean(right[FULL]) - statistics.fmean(right[LOW])


def doubled(data: Data, seed: int, rest: float, quick: bool) -> list[float]:
    """Net energy of twice the steps over that of the steps: short runs in turns, so that pairs share load."""
    model, how = mlp(512, seed), Training(1, 64, seed=seed)
    ratios = []
    for pair in range(5 if quick else 25):
        joules = {}
        for factor in (1, 2) if pair % 2 else (2, 1):
            energy, _ = metered(model, data, how, steps=10 * factor, warm=2)
            joules[factor] = energy.net(rest).joules
        ratios.append(joules[2] / joules[1])
    return ratios


def mlp(width: int, seed: int) -> nn.Module:
    """3072-width-width-10 with random weights."""
    with seeded(seed):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
        )  # fmt: skip


def told(found: Trial, steps: int, rest: float) -> dict[str, object]:
    """Mean joules, watts, seconds and grams of both precisions, and how sure the difference is."""
    rows = {}
    for name, runs in ((FULL, found.full), (LOW, found.low)):
        rows[name] = {
            "joules a step": statistics.fmean(run.joules for run in runs) / steps,
            "net joules a step": statistics.fmean(run.net(rest).joules for run in runs) / steps,
            "watts": statistics.fmean(run.watts for run in runs),
            "CPU seconds a step": statistics.fmean(run.cpu for run in runs) / steps,
            "mg CO2 a step, world": 1000 * statistics.fmean(run.grams(WORLD) for run in runs) / steps,
            "mg CO2 a step, France": 1000 * statistics.fmean(r.grams(INTENSITY["FR"]) for r in runs) / steps,
        }
    tests = {"energy": finite(asdict(found.joules)), "power": finite(asdict(found.watts))}
    return {**rows, **tests, "known": found.full[0].known, "how": found.full[0].how}


def significance(energies: dict[Cell, list[Energy]]) -> dict[str, object]:
    """One-way analysis of variance over all combinations, as the paper does: of power and of energy."""
    groups = list(energies.values())
    found = {
        "watts": anova([[run.watts for run in runs] for runs in groups]),
        "joules": anova([[run.joules for run in runs] for runs in groups]),
    }
    return {f"ANOVA of {name}": finite({"F": f, "p": p}) for name, (f, p) in found.items()}
