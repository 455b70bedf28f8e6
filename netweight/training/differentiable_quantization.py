"""A network on points of quantization that are trained while its weights stay as they are.

Paper: Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018,
arXiv:1802.05668, section 4. Every tensor has k points p in [0, 1] that all of its buckets share (see
`nn.buckets`), at first the quantiles of its scaled weights; with a(i) the point of weight i in bucket b(i),

    dL/dp_j = sum over a(i) = j of alpha_b(i) dL/dQ(w)_i,        p put in order after each step,

L the loss of `training.student`, taught by the network as it was. Batch norms go on with their running
statistics, which belong to the result. `by_gradient` gives tensor i  k/2 + share_i N k/2  points for k on
average over N tensors, share_i its part of the sum of |dL/dw|_2 (the mean over five batches).

Differs from the paper: KL is the mean over examples (the official code divides by the number of classes as
well); weights of Linear, Conv and Embedding layers are quantized, not norms or biases; momentum without
Nesterov's step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from netweight.core.task import Data, Task
from netweight.nn.buckets import OnPoints
from netweight.nn.codebook import LARGEST
from netweight.nn.quantized import quantized
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Hooks, Moment, Running, Training, train
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

BATCHES = 5  # that the importance of a tensor is measured on


@dataclass(frozen=True)
class DifferentiableQuantization:
    """Settings of `differentiable_quantization`.

    points: levels of a tensor, 2 to 256; the mean over tensors with `by_gradient`. quantiles: where they
    start, else equally far apart. bucket: weights that share a scale, 0 for the whole tensor. ends: whether
    the first and the last layer are quantized too. soft: the teacher's part of the loss, 0 for labels alone.
    temperature: T. teacher: a network as the command line takes it, "" for the model as it is given.
    """

    points: int = 16
    bucket: int = 256
    quantiles: bool = True
    by_gradient: bool = False
    ends: bool = True
    soft: float = 0.7
    temperature: float = 2.0
    teacher: str = ""

    def __post_init__(self) -> None:
        OnPoints(torch.zeros(1), self.points, self.bucket)
        check_loss(self.soft, self.temperature)


def differentiable_quantization(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: DifferentiableQuantization = DifferentiableQuantization(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The model on points that are trained while its weights stay as they are.

    The rate is small: 1e-5 to 1e-3, with sgd. Notes: bits as they are stored and if they were Huffman coded,
    and the points of each layer. Raises `DoesNotFit` for data without class numbers, a teacher with other
    outputs, or a model without a layer to quantize.
    """
    return trained_points(model, task, how, settings, teacher=teacher_of(settings.teacher, model), keep=keep)


def trained_points(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: DifferentiableQuantization,
    *,
    teacher: nn.Module,
    keep: Checkpoint | None = None,
) -> Trained:
    """The same with that network as the teacher."""
    data, layers = labelled(task), layers_of(model, settings.ends)
    shares = dict.fromkeys(layers, settings.points)
    if settings.by_gradient:
        shares = spread(importance(model, data.batched(how.batch), layers), settings.points)

    def rounding(name: str, layer: nn.Module) -> OnPoints:
        return OnPoints(layer.weight.detach(), shares[name], settings.bucket, settings.quantiles)

    student = with_roundings(model, layers, rounding).requires_grad_(False)
    rounded = [layer.weight_rounding for layer in quantized(student).values()]
    for one in rounded:
        one.points.requires_grad_(True)

    def in_order(run: Running, at: Moment) -> None:
        for one in quantized(run.model).values():
            one.weight_rounding.sort()

    known = taught(data, teacher, model)
    loss, keep = distilled(settings.soft, settings.temperature), about(keep, "differentiable", settings)
    losses = train(student, known, loss, how, hooks=Hooks(after=in_order), keep=keep)
    return shipped(student, losses, {"points": shares})


def importance(model: nn.Module, data: Data, layers: Sequence[str]) -> dict[str, float]:
    """|dL/dw|_2 of each layer, L the mean cross-entropy of the first `BATCHES` batches."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    device = next(model.parameters()).device
    for (x, y), _ in zip(data, range(BATCHES)):
        F.cross_entropy(model(x.to(device)).flatten(0, -2), y.to(device).flatten()).backward()
    found = {name: model.get_submodule(name).weight.grad for name in layers}
    return {name: 0.0 if g is None else g.norm().item() / BATCHES for name, g in found.items()}


def spread(norms: dict[str, float], points: int) -> dict[str, int]:
    """Points of each layer, `points` on average: one half for all alike, the other as the norms are.

    What rounding leaves over goes to the layer with the fewest or comes from the one with the most; a layer
    has 2 to 256.
    """
    total, all_norms = points * len(norms), sum(norms.values())
    rest = total - points // 2 * len(norms)
    shares = {name: norm / all_norms if all_norms else 1 / len(norms) for name, norm in norms.items()}
    found = {name: min(max(points // 2 + round(share * rest), 2), LARGEST) for name, share in shares.items()}
    while (over := sum(found.values()) - total) != 0:
        name = max(found, key=found.__getitem__) if over > 0 else min(found, key=found.__getitem__)
        found[name] += 1 if over < 0 else -1
    return found
