"""Huang et al. 2025: one set of 8-bit codes runs at 8, 6, 4 and 2 bits, hardly worse than in float.

The paper: ResNet-18 on ImageNet, {8, 6, 4, 2} bits: 70.74 / 70.71 / 70.43 / 66.35 % (float 69.76); ResNet-20
on CIFAR-10: 92.25 / 92.32 / 92.09 / 90.19 % with ALRS, 89.67 % at 2 bits without (float 92.30). Here: four
convolutions (16, 16, 32, 32) on scikit-learn's digits, 250 steps in float, then 100 joint steps at batch 128
with the rate 5e-3, ten times the paper's, where ALRS is needed; first and last layer stay in float, inputs
are rounded to the same width as weights. Accuracies are shares of the 540 test images.

Gradients of steps are those of 30 joint steps at the paper's rate; at 5e-3 they are larger still at 2 bits.
The second rounding is compared with its floor at 60 steps and half the paper's rate, 2.5e-4. How much it is
worth depends on how far training can move weights and steps to make up for the floor: at the paper's rate it
is about 1.5 points (figures), at 5e-3 hardly any. The search is judged by the cross-entropy of the
test images, finer than the share of right ones: at each of five mean widths, the widths that the integer
programme chose against the mean over all other choices of equal mean. The time of a switch is that of the
folder of a ResNet-20 with all its inner layers at four widths, the median of 20 switches. Quick: bar 1 with
60 steps at 2 bits within 8 points, and bar 3.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.compressed import Compressed, assemble
from netweight.core.plan import Plan
from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs, token_loss
from netweight.core.widths import switch
from netweight.data import digits
from netweight.evidence.average import accuracy
from netweight.models.resnet_cifar import architecture
from netweight.models.trained import seeded
from netweight.nn.normalize import Normalize
from netweight.nn.quantized import inner_layers
from netweight.nn.switchable import finished, switchable, switched, widths_of
from netweight.training.double_rounding import DoubleRounding, assigned, costs, double_rounding
from netweight.training.loop import Training, train
from netweight.training.trained import Trained

BITS = (8, 6, 4, 2)
BATCH, RATE = 128, 5e-3  # ten steps an epoch
SLOW = 5e-4  # the rate of the paper
MEANS = (3, 4, 5, 6, 7)  # mean bits of the search
LOST = {8: 0.01, 6: 0.01, 4: 0.01, 2: 0.03}


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed."""
    model = network(seed)
    before = accuracy(model, digits.test())
    if quick:
        found = per_width(trained(model, seed, 6).network())
        sizes = gradients(model, seed)
        bars = [Bar("points lost at 2 bits", before - found[2], 0.08, "at most"), *sizes.bars]
        return Claim(bars, {"accuracy": {"float": before, **named(found)}, **sizes.figures})
    usual, together = trained(model, seed, 10), trained(model, seed, 10, together=True)
    runs = {"ALRS": usual, "together": together, "no ALRS": trained(model, seed, 10, scaling="none")}
    found = {name: per_width(run.network()) for name, run in runs.items()}
    bars = [
        Bar(f"points lost at {b} bits", before - found["ALRS"][b], most, "at most")
        for b, most in LOST.items()
    ]
    bars += [
        Bar("2 bits: ALRS - no ALRS", found["ALRS"][2] - found["no ALRS"][2], 0.20, "at least"),
        Bar(
            "ALRS - all widths together, the worst width",
            min(found["ALRS"][b] - found["together"][b] for b in BITS),
            -0.005,
            "at least",
        ),
    ]
    parts = [gradients(model, seed), rounding(model, seed), search(model, seed), switching()]
    figures = {"accuracy": {"float": before, **{name: named(one) for name, one in found.items()}}}
    for part in parts:
        figures |= part.figures
    return Claim([*bars, *(bar for part in parts for bar in part.bars)], figures)


def network(seed: int) -> nn.Sequential:
    """Four convolutions with batch norm, trained here in float for 250 steps."""

    def block(before: int, width: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(width), nn.ReLU()]

    with seeded(seed):
        layers = [*block(1, 16), *block(16, 16), *block(16, 32, 2), *block(32, 32)]
        model = nn.Sequential(
            Normalize([0.305], [0.376]), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        )
        how = Training(25, BATCH, RATE, cosine=True, seed=seed)
        train(model, digits.train(), lambda net, x, y, at: token_loss(net(x), y).mean(), how)
    return model


def trained(
    model: nn.Module, seed: int, epochs: int, rate: float = RATE, **settings: bool | float | str
) -> Trained:
    """Ten joint steps an epoch, with the paper's decay and cosine."""
    task = Task(digits.calibration(), digits.test(), train=digits.train()).blind()
    how = Training(epochs, BATCH, rate, cosine=True, decay=5e-5, seed=seed)
    return double_rounding(model, task, how, DoubleRounding(BITS, **settings))  # type: ignore[arg-type]


def at(small: Compressed, widths: Mapping[str, int]) -> nn.Module:
    """The network that runs at these widths."""
    return switched(small, widths).model


def per_width(small: Compressed) -> dict[int, float]:
    """Accuracy at each width."""
    return {b: accuracy(at(small, dict.fromkeys(widths_of(small), b)), digits.test()) for b in BITS}


def named(found: Mapping[int, float]) -> dict[str, float]:
    """The same with names that JSON has."""
    return {f"{b} bits": value for b, value in found.items()}


def gradients(model: nn.Module, seed: int) -> Claim:
    """How much larger the gradients of steps are at 2 bits, all widths together."""
    sizes = trained(model, seed, 3, SLOW, together=True).notes["step gradients"]
    bar = Bar("mean |ds|, 2 bits / 8 bits", sizes["2"] / sizes["8"], 5.0, "at least")
    return Claim([bar], {"mean |ds|, together": dict(sizes)})


def rounding(model: nn.Module, seed: int) -> Claim:
    """The second rounding against its floor, 60 steps each."""
    found = {
        f"{name}, rate {rate:g}": per_width(trained(model, seed, 6, rate, floor=name == "floor").network())
        for rate in (SLOW / 2, SLOW)
        for name in ("round", "floor")
    }
    gained = found["round, rate 0.00025"][2] - found["floor, rate 0.00025"][2]
    bar = Bar("2 bits: second rounding - floor, 60 steps", gained, 0.02, "at least")
    return Claim([bar], {"60 steps": {name: named(one) for name, one in found.items()}})


def search(model: nn.Module, seed: int) -> Claim:
    """HASB, then the integer programme against all other widths of equal mean."""
    run, test = trained(model, seed, 10, mixed=0.5), digits.test()
    small = run.network()
    layers = list(widths_of(small))
    every = {
        widths: judged(at(small, dict(zip(layers, widths))), test)
        for widths in itertools.product(BITS, repeat=len(layers))
    }
    table, rows, better = costs(run.model, small, run.notes["traces"], BITS), [], 0
    for mean in MEANS:
        chosen = tuple(assigned(table, mean)[layer] for layer in layers)
        others = [
            loss for widths, (loss, _) in every.items() if sum(widths) == sum(chosen) and widths != chosen
        ]
        loss, share = every[chosen]
        better += loss <= fmean(others)
        rows.append(
            {"mean": mean, "widths": list(chosen), "loss": loss, "others": fmean(others), "accuracy": share}
        )
    bar = Bar("budgets of five where the search beats the mean of equal widths", better, 4, "at least")
    return Claim([bar], {"search": rows})


def judged(model: nn.Module, data: Data) -> tuple[float, float]:
    """Cross-entropy in nats, and the share that is right."""
    out = outputs(model, data)
    return float(F.cross_entropy(out, data.y)), float((out.argmax(1) == data.y).float().mean())


def switching() -> Claim:
    """Seconds that a folder of a ResNet-20 takes to change its width; its weights do not matter here."""
    with seeded(0), tempfile.TemporaryDirectory() as folder:
        model = architecture(20).eval()
        net, norms = switchable(model, inner_layers(model), BITS, torch.rand(2, 3, 32, 32))
        place = Path(folder) / "resnet20"
        assemble(*finished(net, norms), Plan()).save(place)
        seconds = [switch(place, str(bits)).seconds for bits in (6, 4, 2, 8) * 5]
    bar = Bar("ResNet-20: seconds of a switch", median(seconds), 0.05, "at most")
    return Claim([bar], {"seconds of a switch": {"median": median(seconds), "longest": max(seconds)}})
