"""A small network with weights of few bits, trained on the outputs of a larger one.

Paper: Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018,
arXiv:1802.05668, section 3. w stays in floating point, Q(w), in the buckets of `nn.buckets`, is what forward
and backward passes see:

    w <- w - rate * dL/dw at Q(w);        at the end w <- Q(w),

L the loss of `training.student`, T = 2 and soft = 0.7. Section 4 is `differentiable_quantization`.

Differs from the paper: KL is the mean over examples (the official code divides by the number of classes as
well); weights of Linear, Conv and Embedding layers are quantized, not norms or biases; momentum without
Nesterov's step, and milestones in place of halving the rate on a plateau; "truncated" clamps the weight that
is seen, where the official code clamps the one that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from netweight.core.task import Task
from netweight.nn.buckets import InBuckets
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Training, train
from netweight.training.student import (
    check_loss,
    distilled,
    layers_of,
    shipped,
    taught,
    teacher_of,
    with_roundings,
)
from netweight.training.trained import Trained, about, labelled


@dataclass(frozen=True)
class QuantizedDistillation:
    """Settings of `quantized_distillation`.

    bits: of a weight, 1 to 8. bucket: weights that share a scale, 0 for the whole tensor. backward: straight,
    truncated or exact (see `nn.buckets.InBuckets`). stochastic: rounding at random while training. ends:
    whether the first and the last layer are quantized too. soft: the teacher's part of the loss, 0 for labels
    alone. temperature: T. teacher: a network as the command line takes it, "" for the model as it is given.
    """

    bits: int = 4
    bucket: int = 256
    backward: str = "straight"
    stochastic: bool = False
    ends: bool = True
    soft: float = 0.7
    temperature: float = 2.0
    teacher: str = ""

    def __post_init__(self) -> None:
        InBuckets(self.bits, self.bucket, self.backward)  # says what is wrong with them
        check_loss(self.soft, self.temperature)


def quantized_distillation(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: QuantizedDistillation = QuantizedDistillation(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The student `model` with weights of few bits, trained on what the teacher says of `task.train`.

    Notes: bits of the weights as they are stored and if they were Huffman coded. Raises `DoesNotFit` for data
    without class numbers, a teacher with other outputs, or a model without a layer to quantize.
    """
    return quantized_student(
        model, task, how, settings, teacher=teacher_of(settings.teacher, model), keep=keep
    )


def quantized_student(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: QuantizedDistillation,
    *,
    teacher: nn.Module,
    keep: Checkpoint | None = None,
) -> Trained:
    """The same with that network as the teacher."""

    def rounding(_: str, layer: nn.Module) -> InBuckets:
        return InBuckets(settings.bits, settings.bucket, settings.backward, settings.stochastic)

    student = with_roundings(model, layers_of(model, settings.ends), rounding)
    data = taught(labelled(task), teacher, model)
    loss = distilled(settings.soft, settings.temperature)
    losses = train(student, data, loss, how, keep=about(keep, "quantized-distillation", settings))
    return shipped(student, losses)


def quantized_once(model: nn.Module, settings: QuantizedDistillation) -> Trained:
    """The network quantized without any training, "post-mortem": what both methods are held against."""
    make = partial(InBuckets, settings.bits, settings.bucket, settings.backward)
    return shipped(with_roundings(model, layers_of(model, settings.ends), lambda *_: make()), ())
