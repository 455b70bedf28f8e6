"""Gholami et al. 2021: a scale per channel beats one per tensor, learnt rounding beats nearest.

The survey (arXiv:2103.13630) claims no number of its own; these are its textbook orders. Here: ResNet-20
fine-tuned to the JPEG images of CIFAR-10, and the small OPT of characters. What needs hard cases gets planted
ones, which leave the function as it is: channels of ReLU pairs times exp(1.5 N(0, 1)) for equalization, 5 %
outlier channels times 16 for SmoothQuant. Quick: the digits network at 2 bits (3 lose it nothing), at 4 with
a spread of 2.5, and a language model of 60 steps with outliers times 64.

At 3 bits per channel the range of least weight error LOSES accuracy against the plain one on ResNet-20
(see the figures): weight error is not accuracy.

Beside the bars stand figures without one (128 examples to calibrate, 1,000 to test): BRECQ and AdaRound at 2
bits with the same few steps; ranges of activations at 4 bits; data-free methods (ZeroQ, bias correction from
batch norms) beside the same with data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from netweight.compression.quantize.adaround import AdaRound, adaround
from netweight.compression.quantize.bias_correction import corrected
from netweight.compression.quantize.brecq import BRECQ, brecq
from netweight.compression.quantize.clip import Clip, clip
from netweight.compression.quantize.equalize import Equalize, equalize
from netweight.compression.quantize.gptq import GPTQ, gptq
from netweight.compression.quantize.rtn import RTN, rtn
from netweight.compression.quantize.smoothquant import SmoothQuant, smoothquant
from netweight.compression.quantize.zeroq import ZeroQ, zeroq
from netweight.core.compressed import Change, assemble, weight_of, weighted
from netweight.core.grid import PER_ROW, PER_TENSOR
from netweight.core.moments import moments
from netweight.core.plan import Plan
from netweight.core.plant import imbalance, outliers
from netweight.core.result import Bar, Claim
from netweight.core.rewrite import FoldBatchNorm, rewritten
from netweight.core.sites import foldable, sites
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.data.text import Characters, wikitext2, windows
from netweight.models.digits_cnn import digits_cnn
from netweight.models.opt import small_opt
from netweight.models.resnet_tuned import tuned_resnet20
from netweight.nn.ranges import HOW


@dataclass(frozen=True)
class Subject:
    """An image network, its task, and its layers."""

    model: nn.Module
    task: Task

    @property
    def layers(self) -> list[str]:
        """All layers with a weight to round."""
        return weighted(self.model)

    def accuracy(self, change: Change | None = None) -> float:
        """Share of the test images that the network, or what the change makes of it, gets right."""
        net = self.model if change is None else assemble(self.model, change, Plan({})).model
        test = self.task.test
        return float(self.task.judge.of(outputs(net, test), test.y).mean())


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The four orderings of one seed, in points of accuracy (shares) and in gaps of log-likelihood."""
    subject = digits_subject(seed) if quick else cifar_subject(seed)
    parts = [
        granularity(subject, 2 if quick else 4),
        learning(subject, 2, 0.02, 0.02) if quick else learning(subject, 3, 0.05, 0.06),
        equalization(subject, seed, 4 if quick else 8),
        smoothing(seed, quick),
    ]
    task = subject.task
    some = Subject(subject.model, Task(task.calibration.take(128), task.test.take(1000)))
    parts += [blocks(some, 60 if quick else 100), inputs(some), without_data(some, seed, 3 if quick else 4)]
    if not quick:
        parts.insert(1, ranges(subject))
    figures = {"float accuracy": subject.accuracy()}
    for part in parts:
        figures |= part.figures
    return Claim([bar for part in parts for bar in part.bars], figures)


def digits_subject(seed: int) -> Subject:
    """The embedded network."""
    return Subject(digits_cnn(seed), Task(digits.calibration(), digits.test()))


def cifar_subject(seed: int) -> Subject:
    """ResNet-20 on JPEG images: 512 to calibrate, 2,500 to test."""
    images = cifar10()
    return Subject(tuned_resnet20(seed), Task(images.calibration(512), images.test().take(2500)))


def granularity(subject: Subject, bits: int) -> Claim:
    """Bar 1: a scale per channel against one for the tensor."""
    channel = subject.accuracy(_rtn(subject, bits, PER_ROW))
    tensor = subject.accuracy(_rtn(subject, bits, PER_TENSOR))
    bar = Bar(f"W{bits}: accuracy per channel - per tensor", channel - tensor, 0.03, "at least")
    return Claim([bar], {f"W{bits} per channel": channel, f"W{bits} per tensor": tensor})


def ranges(subject: Subject) -> Claim:
    """Bar 2: the range of least error against the smallest and largest weight."""
    found = {}
    for bits, group, where in ((4, PER_TENSOR, "per tensor"), (3, PER_ROW, "per channel")):
        change = clip(subject.model, subject.task, subject.layers, Clip(bits, symmetric=True, group=group))
        found[f"W{bits} {where}, least error"] = subject.accuracy(change)
        found[f"W{bits} {where}, min-max"] = subject.accuracy(_rtn(subject, bits, group))
    gained = found["W4 per tensor, least error"] - found["W4 per tensor, min-max"]
    return Claim([Bar("W4 per tensor: accuracy of least error - min-max", gained, 0.03, "at least")], found)


def learning(subject: Subject, bits: int, learnt_mark: float, passed_on_mark: float) -> Claim:
    """Bar 3: AdaRound and GPTQ against round to nearest, per channel."""
    model, task, layers = subject.model, subject.task, subject.layers
    nearest = _rtn(subject, bits, PER_ROW)
    passed_on = gptq(model, task, layers, GPTQ(bits, symmetric=True, group=PER_ROW))
    learnt = adaround(model, task, layers, AdaRound(bits, symmetric=True, group=PER_ROW, steps=150))
    seen = moments(model, task.calibration, layers)

    def error(change: Change, layer: str) -> float:
        return seen[layer].error(change.packed[layer].decode() - weight_of(model, layer))

    ratios = {layer: error(passed_on, layer) / error(nearest, layer) for layer in layers}
    base = subject.accuracy(nearest)
    found = {"RTN": base, "AdaRound": subject.accuracy(learnt), "GPTQ": subject.accuracy(passed_on)}
    name = f"W{bits} per channel"
    bars = [
        Bar(f"{name}: accuracy of AdaRound - RTN", found["AdaRound"] - base, learnt_mark, "at least"),
        Bar(f"{name}: accuracy of GPTQ - RTN", found["GPTQ"] - base, passed_on_mark, "at least"),
        Bar(f"{name}: output error of GPTQ / RTN, worst layer", max(ratios.values()), 0.7, "at most"),
    ]
    return Claim(bars, {name: found, "output error of GPTQ / RTN": ratios})


def blocks(subject: Subject, steps: int) -> Claim:
    """No bar: rounding learnt by blocks and by layers, at 2 bits; then inputs at 4 bits with learnt steps."""
    model, task, layers = subject.model, subject.task, subject.layers
    alone = AdaRound(2, symmetric=True, group=PER_ROW, steps=steps, batch=16)
    together = BRECQ(2, True, PER_ROW, steps=steps, batch=16, activation_bits=4, activation_steps=30)
    both = brecq(model, task, layers, together)
    found = {
        "RTN": subject.accuracy(_rtn(subject, 2, PER_ROW)),
        "AdaRound": subject.accuracy(adaround(model, task, layers, alone)),
        "BRECQ": subject.accuracy(replace(both, activations={})),
        "BRECQ, inputs at 4 bits": subject.accuracy(both),
    }
    return Claim([], {f"W2 per channel, {steps} steps of 16 examples": found})


def inputs(subject: Subject) -> Claim:
    """No bar: what the range of static rounding of inputs to 4 bits does."""
    found = {}
    for how in HOW:
        settings = SmoothQuant(8, 4, alpha=None, group=PER_ROW, range=how)
        found[how] = subject.accuracy(smoothquant(subject.model, subject.task, subject.layers, settings))
    return Claim([], {"W8 per channel, inputs at 4 bits, by range": found})


def without_data(subject: Subject, seed: int, bits: int) -> Claim:
    """No bar: what is lost where there is no data to calibrate on."""
    model, task, layers = subject.model, subject.task, subject.layers
    made = ZeroQ(bits, group=PER_ROW, activation_bits=6, examples=16, steps=60, seed=seed)
    found = {
        f"W{bits}A6, calibrated": smoothquant(model, task, layers, SmoothQuant(bits, 6, None, PER_ROW)),
        f"W{bits}A6, ZeroQ": zeroq(model, task, layers, made),
        f"W{bits}A6, ZeroQ with mixed bits": zeroq(model, task, layers, replace(made, mixed=True)),
        f"W{bits} per tensor": _rtn(subject, bits, PER_TENSOR),
        f"W{bits} per tensor, biases corrected": corrected(model, task, _rtn(subject, bits, PER_TENSOR)),
        f"W{bits} per tensor, biases corrected without data": corrected(
            model, task, _rtn(subject, bits, PER_TENSOR), data_free=True
        ),
    }
    return Claim([], {"without data": {name: subject.accuracy(change) for name, change in found.items()}})


def equalization(subject: Subject, seed: int, bits: int) -> Claim:
    """Bar 4, images: planted imbalance, one scale per tensor."""
    model, task = subject.model, subject.task
    folded = rewritten(model, [FoldBatchNorm(*pair) for pair in foldable(model, task.calibration)])
    pairs = [site for site in sites(folded, task.calibration) if not site.norm(folded)]
    hard = Subject(
        rewritten(folded, imbalance(folded, pairs, spread=1.5 if bits == 8 else 2.5, seed=seed)), task
    )
    change = equalize(hard.model, task, hard.layers, Equalize(bits, symmetric=True, group=PER_TENSOR))
    found = {
        "float": hard.accuracy(),
        "RTN": hard.accuracy(_rtn(hard, bits, PER_TENSOR)),
        "equalized": hard.accuracy(change),
        "equalized and bias corrected": hard.accuracy(corrected(hard.model, task, change)),
    }
    lost = found["float"] - found["equalized and bias corrected"]
    bars = [
        Bar(f"planted imbalance, W{bits} per tensor: accuracy of RTN", found["RTN"], 0.3, "at most"),
        Bar(
            f"planted imbalance, W{bits} per tensor: accuracy lost after equalization", lost, 0.01, "at most"
        ),
    ]
    return Claim(bars, {"planted imbalance": found})


def smoothing(seed: int, quick: bool) -> Claim:
    """Bar 4, language: planted outlier channels, weights and inputs at 8 bits with one scale per tensor."""
    model = small_opt(seed, quick=quick)
    test = windows(Characters()(wikitext2("test")), name="wikitext2").take(64 if quick else 400)
    calibration = windows(Characters()(wikitext2("train")[: 1 << 16]), name="calibration").take(32)
    task = Task(calibration, test, "loss")
    layers = [name for name in weighted(model) if ".layers." in name]
    norms = [site for site in sites(model, calibration) if site.norm(model)]
    hard = rewritten(model, outliers(model, norms, factor=64 if quick else 16, share=0.05, seed=seed))

    def gap(settings: SmoothQuant) -> float:
        small = assemble(hard, smoothquant(hard, task, layers, settings), Plan({})).model
        return loss(small, test) - base

    base = loss(hard, test)
    found = {"RTN": gap(SmoothQuant(alpha=None)), "SmoothQuant": gap(SmoothQuant())}
    recovered = 1 - found["SmoothQuant"] / found["RTN"]
    bar = Bar(
        "planted outliers, W8A8 static: share of the gap that SmoothQuant recovers",
        recovered,
        0.8,
        "at least",
    )
    return Claim([bar], {"planted outliers, gap in nats": found})


def loss(model: nn.Module, data: Data, part: int = 64) -> float:
    """Mean negative log-likelihood per token, with the logits of `part` windows at a time."""
    judge = Task(data, data, "loss").judge
    pieces: Sequence[Data] = [data.rows(slice(start, start + part)) for start in range(0, len(data), part)]
    total = sum(float(judge.of(outputs(model, piece), piece.y).double().sum()) for piece in pieces)
    return total / len(data)


def _rtn(subject: Subject, bits: int, group: int) -> Change:
    return rtn(subject.model, subject.task, subject.layers, RTN(bits, symmetric=True, group=group))
