"""Yvinec et al. 2025: power grids beat even ones at 3 and 4 bits, learnt or not, and run on integers.

The paper: ConvNets, transformers and language models at W4A4 and below, with and without data; no figure of
its tables is used here. Here: ResNet-20 fine-tuned to the JPEG images of CIFAR-10, 1,000 of which are tested;
first and last layer float, one scale per tensor; 192 training images for what learns and for the ranges of
inputs. AdaRound learns on the even grid with the same images, steps and batches.

The integer path: batch norms are folded, weights and inputs have 4 bits; inside each residual block integers
alone run from the codes of its input over the first convolution, thresholds and the second convolution to
its sum; the addition of the shortcut, its ReLU and the first and last layer are float. Quick: a perceptron
on the digits, trained here, at 3 bits, all layers.

Where learning starts: from exponents 1.0 and 0.6 each layer is learnt apart, on the inputs of the float
network, so that no layer depends on another. The codes of an even grid have to travel far to those of a power
grid; at the usual rates 150 steps leave exponents from 1.0 between 0.7 and 0.8, so rates are three times as
high here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.compression.quantize.adaround import AdaRound, adaround
from netweight.compression.quantize.nupes import NUPES, nupes
from netweight.compression.quantize.powerquant import PowerQuant, powerquant
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.compression.quantize.smoothquant import SmoothQuant, smoothquant
from netweight.core.compressed import Change, Compressed, assemble, weight_of, weighted
from netweight.core.grid import PER_ROW, PER_TENSOR
from netweight.core.moments import moments
from netweight.core.plan import Plan
from netweight.core.result import Bar, Claim
from netweight.core.rewrite import FoldBatchNorm, rewritten
from netweight.core.sites import foldable
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models.resnet_tuned import tuned_resnet20
from netweight.nn.power_integer import in_integers

STEPS, LEARNT_ON, TESTED, IN_INTEGERS = 150, 192, 1000, 400
STARTS = (1.0, 0.6)
FAR = 3e-2  # rates of codes and exponents where they start far away
NEAR, ALIKE = 0.1, 0.05  # exponents that count as the same, losses that do


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, its task, the layers that are rounded, and its outputs on the test data."""

    model: nn.Module
    task: Task
    layers: list[str]
    reference: Tensor

    @classmethod
    def of(cls, model: nn.Module, task: Task, layers: list[str]) -> Subject:
        """Those layers of a network."""
        return cls(model, task, layers, outputs(model, task.test))

    def answer(self, change: Change) -> Tensor:
        """The outputs on the test data of what the change makes of the network."""
        return outputs(self.small(change).model, self.task.test)

    def small(self, change: Change) -> Compressed:
        """What the change makes of the network."""
        return assemble(self.model, change, Plan({}))

    def accuracy(self, answer: Tensor) -> float:
        """Share of right classes."""
        return float(self.task.judge.of(answer, self.task.test.y).mean())  # type: ignore[arg-type]

    def logit_error(self, answer: Tensor) -> float:
        """Mean squared error of the logits over their variance."""
        return float((answer - self.reference).square().mean() / self.reference.var())


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """All bars of one seed; quick: those without learning, at 3 bits."""
    if quick:
        subject = digits_subject(seed)
        parts = [without_data(subject, {3: 0.03}), on_integers(subject, {}, bits=3)]
    else:
        subject = cifar_subject(seed)
        folds = [FoldBatchNorm(*pair) for pair in foldable(subject.model, subject.task.calibration)]
        folded = Subject.of(rewritten(subject.model, folds), subject.task, subject.layers)
        blocks = [name.removesuffix(".conv1") for name in subject.layers if name.endswith(".conv1")]
        joined = {f"{block}.conv1": f"{block}.conv2" for block in blocks}
        parts = [
            without_data(subject, {3: 0.10, 4: 0.03}),
            with_data(subject, seed),
            starts(subject, seed),
            both_sides(subject),
            on_integers(folded, joined, bits=4),
        ]
    figures: dict[str, Any] = {"accuracy, float": subject.accuracy(subject.reference)}
    for part in parts:
        figures |= part.figures
    return Claim([bar for part in parts for bar in part.bars], figures)


def cifar_subject(seed: int) -> Subject:
    """ResNet-20 without its first and last layer."""
    images = cifar10()
    model = tuned_resnet20(seed)
    task = Task(images.calibration(LEARNT_ON), images.test(TESTED))
    return Subject.of(model, task, weighted(model)[1:-1])


def digits_subject(seed: int) -> Subject:
    """A perceptron with two hidden layers of 64, trained in a few seconds, and all its layers."""
    data = digits.train()
    assert data.y is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(1000):
        loss = F.cross_entropy(model(data.x), data.y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
    return Subject.of(model, Task(digits.calibration(), digits.test()), weighted(model))


def without_data(subject: Subject, marks: dict[int, float]) -> Claim:
    """Bar 1: the exponent of least weight error against the even grid; per row as figures."""
    model, task, layers = subject.model, subject.task, subject.layers
    bars, figures = [], {}
    for bits, mark in marks.items():
        found: dict[str, Any] = {}
        for group, where in ((PER_TENSOR, "per tensor"), (PER_ROW, "per channel")):
            even = rtn(model, task, layers, RTN(bits, symmetric=True, group=group))
            power = powerquant(model, task, layers, PowerQuant(bits, group))
            found[f"RTN {where}"] = subject.accuracy(subject.answer(even))
            found[f"power {where}"] = subject.accuracy(subject.answer(power))
            found[f"exponents {where}"] = exponents(power)
        gained = found["power per tensor"] - found["RTN per tensor"]
        name = f"no data, W{bits} per tensor: accuracy of power - RTN"
        bars.append(Bar(name, gained, mark, "at least"))
        figures[f"no data, W{bits}"] = found
    return Claim(bars, figures)


def with_data(subject: Subject, seed: int) -> Claim:
    """Bar 2: codes and exponents learnt, against AdaRound on the even grid, at 3 bits per tensor."""
    model, task, layers = subject.model, subject.task, subject.layers
    rounded = adaround(
        model, task, layers, AdaRound(3, True, PER_TENSOR, STEPS, examples=LEARNT_ON, seed=seed)
    )
    learnt = nupes(model, task, layers, NUPES(3, PER_TENSOR, steps=STEPS, examples=LEARNT_ON, seed=seed))
    answers = {"AdaRound": subject.answer(rounded), "NUPES": subject.answer(learnt)}
    accuracy = {name: subject.accuracy(answer) for name, answer in answers.items()}
    error = {name: subject.logit_error(answer) for name, answer in answers.items()}
    name = "learnt, W3 per tensor"
    gained, ratio = accuracy["NUPES"] - accuracy["AdaRound"], error["NUPES"] / error["AdaRound"]
    bars = [
        Bar(f"{name}: accuracy of NUPES - AdaRound", gained, 0.02, "at least"),
        Bar(f"{name}: logit error of NUPES / AdaRound", ratio, 0.7, "at most"),
    ]
    figures = {"accuracy": accuracy, "logit error": error, "exponents": exponents(learnt)}
    return Claim(bars, {name: figures})


def starts(subject: Subject, seed: int) -> Claim:
    """Bar 3: whether an exponent learnt from 1.0 and from 0.6 ends at the same place or is as good."""
    model, task, layers = subject.model, subject.task, subject.layers
    seen = moments(model, task.calibration, layers)
    found: dict[str, Any] = {}
    for layer in layers:
        ends = []
        for start in STARTS:
            settings = NUPES(
                3, PER_TENSOR, start, steps=STEPS, rate=FAR, rate_exponent=FAR, examples=LEARNT_ON, seed=seed
            )
            form = nupes(model, task, [layer], settings).packed[layer]
            ends.append((exponents(Change({layer: form}))[layer],
                         seen[layer].error(form.decode() - weight_of(model, layer))))  # fmt: skip
        found[layer] = ends
    alike = [
        abs(a - b) <= NEAR or abs(one - other) <= ALIKE * max(one, other)
        for (a, one), (b, other) in found.values()
    ]
    name = "learnt, W3 per tensor: share of layers that end alike from exponents 1.0 and 0.6"
    bar = Bar(name, sum(alike) / len(alike), 0.8, "at least")
    return Claim([bar], {"exponent and loss learnt from 1.0 and from 0.6": found})


def both_sides(subject: Subject) -> Claim:
    """Bar 4, second half: weights and inputs at 4 bits, power against even grids, ranges from the data."""
    model, task, layers = subject.model, subject.task, subject.layers
    even = smoothquant(model, task, layers, SmoothQuant(4, 4, None, PER_TENSOR))
    power = nupes(model, task, layers, NUPES(4, PER_TENSOR, activation_bits=4, steps=0))
    found = {"even": subject.accuracy(subject.answer(even)), "power": subject.accuracy(subject.answer(power))}
    name = "no training, W4A4 per tensor"
    bar = Bar(f"{name}: accuracy of power - even", found["power"] - found["even"], 0.04, "at least")
    return Claim([bar], {name: found})


def on_integers(subject: Subject, joined: dict[str, str], bits: int) -> Claim:
    """Bar 4, first half: the classes of the integer path against those of the decoded float path."""
    model, task, layers = subject.model, subject.task, subject.layers
    if not joined:
        joined = dict(zip(layers, layers[1:]))
    change = nupes(model, task, layers, NUPES(bits, PER_TENSOR, activation_bits=bits, steps=0))
    small = subject.small(change)
    data: Data = task.test.take(IN_INTEGERS)
    whole, decoded = outputs(in_integers(small.model, joined), data), outputs(small.plain(), data)
    same = float((whole.argmax(1) == decoded.argmax(1)).float().mean())
    name = f"W{bits}A{bits} per tensor: same class on integers and decoded"
    figures = {
        "accuracy on integers": float((whole.argmax(1) == data.y).float().mean()),
        "largest difference of logits": float((whole - decoded).abs().max()),
    }
    return Claim([Bar(name, same, 0.995, "at least")], {f"W{bits}A{bits}, integer path": figures})


def exponents(change: Change) -> dict[str, float]:
    """The exponent of each layer."""
    return {layer: float(form.exponent) for layer, form in change.packed.items()}  # type: ignore[attr-defined]
