"""Polino et al. 2018: trained on a teacher's outputs, weights of 2 to 4 bits keep what rounding alone loses.

The paper: CIFAR-10, teacher 5.3 million parameters at 89.7 %, student 1 million: distilled in floating point
88.8; at 2 bits 9 to 10 when rounded afterwards, 82.4 by quantized distillation, 80.4 by trained points; at 4
bits 68.0, 88.0 and 88.3 (from memory). Here: the digits, a teacher of four convolutions of width 64 and
`STUDENTS` students of two, widths 4 and 8, 678 parameters, figures their mean; and `PICTURES` images of
CIFAR-10, ResNet-20 with its published weights as the teacher, a student of three convolutions of width 24.
Students of a kind start alike and take the same steps. "Rounded" is the distilled student rounded once, its
whole tensors in one bucket unless it says so. The rate of trained points is that of {1e-5, 1e-4} with the
lower loss on the training images; "quantiles" are the same points untrained, norms estimated anew.

What a teacher adds to quantized training differs: that of CIFAR-10 has seen far more than the student, that
of the digits the same images (there 12 and 40 epochs were tried, and a teacher trained on shifted images).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.result import Bar, Claim
from netweight.core.task import Data, Task, outputs
from netweight.data import digits
from netweight.data.images import cifar10
from netweight.models.digits_cnn import MEAN, STD
from netweight.models.resnet_cifar import MEAN as COLOURS
from netweight.models.resnet_cifar import STD as SPREADS
from netweight.models.resnet_cifar import resnet20
from netweight.models.trained import seeded
from netweight.nn.normalize import Normalize
from netweight.training.differentiable_quantization import (
    DifferentiableQuantization,
    differentiable_quantization,
)
from netweight.training.loop import Moment, Training, train
from netweight.training.quantized_distillation import (
    QuantizedDistillation,
    quantized_once,
    quantized_student,
)
from netweight.training.student import distilled, taught

STUDENTS, BITS, RATES = 2, (2, 4), (1e-5, 1e-4)
STILL = 1e-30  # a rate at which no point moves
DEPTH = 3 / 5  # layers of the digits' student and teacher
PICTURES = 8000
LARGE, SMALL = (64, 64, 64, 64), (4, 8)
DIGITS = Training(40, rate=1e-2, cosine=True)
COLOURED = Training(10, rate=1e-2, cosine=True)
POINTS = Training(10, optimizer="sgd")


def reproduce(*, seed: int = 0, quick: bool = False) -> Claim:
    """The bars of one seed; quick: the digits at 2 bits, a teacher of width 16 and one student."""
    task = Task(digits.calibration(), digits.test(), train=digits.train())
    teacher = taught_by_labels((16, 32) if quick else LARGE, task.train, seed)
    if quick:
        student = stack(SMALL, seed)
        fp, found = student_of(student, task, teacher, replace(DIGITS, epochs=25)), {}
        found |= rounded(fp, task, 2)
        run = quantized_student(student, task, DIGITS, QuantizedDistillation(2), teacher=teacher)
        gain = accuracy(run.network().model, task.test) - found["rounded 2"]
        return Claim([Bar("digits, 2 bits: distilled - rounded", gain, 0.05, "at least")], found)

    students = [on_digits(teacher, task, STUDENTS * seed + place) for place in range(STUDENTS)]
    score = {name: mean(one[name] for one in students) for name in students[0]}
    pictures = on_pictures(seed)
    size, seconds = costs(teacher, task, seed)
    least = max(score["rounded 4"], score["rounded 4, buckets"])
    return Claim(
        [
            at_least("digits, 2 bits: distilled - rounded", score["distilled 2"] - score["rounded 2"], 0.10),
            at_least(
                "CIFAR-10, 2 bits: distilled - rounded", pictures["distilled 2"] - pictures["rounded 2"], 0.20
            ),
            at_least("digits, 4 bits: distilled - student", score["distilled 4"] - score["student"], -0.015),
            at_least("digits, 4 bits: points - rounded, the better", score["points 4"] - least, -0.003),
            at_least("digits, 2 bits: points - quantiles", score["points 2"] - score["quantiles 2"], 0.08),
            *(
                at_least(
                    f"{name}, {bits} bits: with a teacher - without",
                    found[f"distilled {bits}"] - found[f"labels {bits}"],
                    0.0,
                )
                for name, found in (("digits", score), ("CIFAR-10", pictures))
                for bits in BITS
            ),
            Bar("bytes of the 4-bit student / teacher", size, 1 / 50, "at most"),
            Bar("CPU time of the 4-bit student / teacher", seconds, 1.3 * DEPTH, "at most"),
        ],
        {"digits": score, "CIFAR-10": pictures},
    )


def at_least(name: str, measured: float, mark: float) -> Bar:
    """A bar that is to be reached from below."""
    return Bar(name, measured, mark, "at least")


# Digits --------------------------------------------------------------------------------------------------


def on_digits(teacher: nn.Module, task: Task, seed: int) -> dict[str, float]:
    """Test accuracies of every way to one student."""
    student, how = stack(SMALL, seed), replace(DIGITS, seed=seed)
    fp = student_of(student, task, teacher, how)
    found = {"teacher": accuracy(teacher, task.test), "student": accuracy(fp, task.test)}
    for bits in BITS:
        found |= rounded(fp, task, bits) | trained(student, task, teacher, how, bits)
        slow, settings = replace(POINTS, seed=seed), DifferentiableQuantization(2**bits)
        runs = [
            differentiable_quantization(fp, task, replace(slow, rate=rate), settings)
            for rate in (STILL, *RATES)
        ]
        best = min(runs[1:], key=lambda run: run.losses[-1])
        found[f"quantiles {bits}"] = accuracy(runs[0].network().model, task.test)
        found[f"points {bits}"] = accuracy(best.network().model, task.test)
    return found


def rounded(fp: nn.Module, task: Task, bits: int) -> dict[str, float]:
    """A trained student rounded once, without buckets and with them."""
    ways = {f"rounded {bits}": 0, f"rounded {bits}, buckets": 256}
    return {
        name: accuracy(quantized_once(fp, QuantizedDistillation(bits, bucket)).network().model, task.test)
        for name, bucket in ways.items()
    }


def trained(student: nn.Module, task: Task, teacher: nn.Module, how: Training, bits: int) -> dict[str, float]:
    """Quantized training with the teacher and on labels alone."""
    return {
        f"{name} {bits}": accuracy(
            quantized_student(
                student, task, how, QuantizedDistillation(bits, soft=soft), teacher=teacher
            ).network().model,
            task.test,
        )
        for name, soft in (("distilled", 0.7), ("labels", 0.0))
    }  # fmt: skip


def costs(teacher: nn.Module, task: Task, seed: int) -> tuple[float, float]:
    """Bytes and CPU seconds of the 4-bit student, as a share of the teacher's."""
    small = quantized_once(stack(SMALL, seed), QuantizedDistillation(4)).network()
    packed = {f"{name}.weight" for name in small.packed}
    rest = sum(t.numel() * t.element_size() for n, t in small.model.state_dict().items() if n not in packed)
    whole = sum(t.numel() * t.element_size() for t in teacher.state_dict().values())
    seconds = [cpu_seconds(model, task.test.x) for model in (small.model, teacher)]
    return (small.bits() / 8 + rest) / whole, seconds[0] / seconds[1]


@torch.no_grad()
def cpu_seconds(model: nn.Module, x: Tensor, runs: int = 5) -> float:
    """The least of some runs."""
    found = []
    for _ in range(runs):
        start = time.process_time()
        model(x)
        found.append(time.process_time() - start)
    return min(found)


# CIFAR-10 ------------------------------------------------------------------------------------------------


def on_pictures(seed: int) -> dict[str, float]:
    """Test accuracies of the student of CIFAR-10."""
    data, test = cifar10().train(PICTURES), cifar10().test()
    known, how = Known.of(resnet20(), data), replace(COLOURED, seed=seed)
    task, student = Task(data, test, train=data), coloured(seed)
    fp = student_of(student, task, known, how)
    found = {"student": accuracy(fp, test)}
    for bits in BITS:
        found |= rounded(fp, task, bits) | trained(student, task, known, how, bits)
    return found


class Known(nn.Module):
    """The scores of a network on some images, looked up in order: a large teacher is asked once."""

    scores: Tensor

    def __init__(self, scores: Tensor, batch: int) -> None:
        super().__init__()
        self.register_buffer("scores", scores)
        self.batch, self.place = batch, 0

    @classmethod
    def of(cls, model: nn.Module, data: Data) -> Known:
        """Those of that network on that data."""
        return cls(outputs(model, data), data.batch)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the next batch of the data, from the beginning again after the last."""
        start, self.place = self.place, self.place + len(x)
        if self.place >= len(self.scores):
            self.place = 0
        return self.scores[start : start + len(x)]


def coloured(seed: int) -> nn.Sequential:
    """Three convolutions of width 24 and stride 2, and a linear layer, for images of 32 pixels a side."""
    with seeded(seed):
        layers: list[nn.Module] = [Normalize(COLOURS, SPREADS)]
        for before in (3, 24, 24):
            layers += [nn.Conv2d(before, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 10)).eval()


# Both ----------------------------------------------------------------------------------------------------


def stack(widths: Sequence[int], seed: int) -> nn.Sequential:
    """3 x 3 convolutions for the digits, the second of stride 2, a mean over quarters and a linear layer."""
    with seeded(seed):
        layers: list[nn.Module] = [Normalize([MEAN], [STD])]
        for place, (before, width) in enumerate(zip((1, *widths), widths)):
            stride = 2 if place == 1 else 1
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        end = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 10)]
        return nn.Sequential(*layers, *end).eval()


def taught_by_labels(widths: Sequence[int], data: Data, seed: int) -> nn.Module:
    """The teacher of the digits."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        return F.cross_entropy(model(x), y)

    teacher = stack(widths, seed)
    train(teacher, data, loss, Training(8, rate=3e-3, cosine=True, seed=seed))
    return teacher


def student_of(student: nn.Module, task: Task, teacher: nn.Module, how: Training) -> nn.Module:
    """The student distilled in floating point."""
    fp = copy.deepcopy(student)
    train(fp, taught(task.train, teacher, fp), distilled(0.7, 2.0), how)
    return fp


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of right answers."""
    return float((outputs(model, data).argmax(-1) == data.y).double().mean())
