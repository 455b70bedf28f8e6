"""What the ways of training a small network on a larger one share: layers, teacher, loss, and the result.

The loss (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531), with t and s
the scores of teacher and student,

    L = soft T^2 KL(softmax(t / T) | softmax(s / T)) + (1 - soft) CE(s, y).

The teacher is asked once for each example, before training, so its scores of all examples lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data, outputs
from netweight.models.load import load
from netweight.nn.buckets import Buckets, InBuckets, OnPoints
from netweight.nn.distillation import softened
from netweight.nn.quantized import TREATED, Roundings, attach, finished
from netweight.training.loop import Loss, Moment
from netweight.training.trained import Trained


def teacher_of(name: str, model: nn.Module) -> nn.Module:
    """The network of that name (see `models.load`) on the device of the model, or the model for ""."""
    if not name:
        return model
    return load(name).to(next((p.device for p in model.parameters()), torch.device("cpu")))


def check_loss(soft: float, temperature: float) -> None:
    """Raises `BadInput` for a share or a temperature that there is none of."""
    if not (0 <= soft <= 1 and temperature > 0):
        raise BadInput(
            f"soft={soft}, temperature={temperature}: soft is a share from 0 to 1, the temperature above 0"
        )


def taught(data: Data, teacher: nn.Module, student: nn.Module) -> Data:
    """The same examples; y is `... 1 + classes` now: the class number, then the teacher's scores.

    Raises `DoesNotFit` where the two networks do not give scores of the same shape.
    """
    scores, own = outputs(teacher, data), outputs(student, data.take(1))
    if scores.shape[1:] != own.shape[1:] or scores.shape[:-1] != data.y.shape:
        raise DoesNotFit(
            f"the teacher gives {tuple(scores.shape[1:])} scores an example, the student "
            f"{tuple(own.shape[1:])}, for labels {tuple(data.y.shape[1:])}; give a teacher of the same task"
        )
    return replace(data, y=torch.cat([data.y.unsqueeze(-1).to(scores), scores], -1), memo={})


def distilled(soft: float, temperature: float) -> Loss:
    """L, for data of `taught`."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        scores = model(x)
        hard = F.cross_entropy(scores.flatten(0, -2), y[..., 0].long().flatten())
        return soft * softened(scores, y[..., 1:], temperature) + (1 - soft) * hard

    return loss


def layers_of(model: nn.Module, ends: bool) -> list[str]:
    """Names of the layers that are quantized; without `ends` all but the first and the last of them."""
    found = [name for name, layer in model.named_modules() if isinstance(layer, TREATED)]
    found = found if ends else found[1:-1]
    if not found:
        raise DoesNotFit(f"{type(model).__name__}: it has no Linear, Conv or Embedding layer to quantize")
    return found


def with_roundings(
    model: nn.Module, layers: Sequence[str], rounding: Callable[[str, nn.Module], InBuckets | OnPoints]
) -> nn.Module:
    """A copy of the model that rounds the weights of those layers."""
    wanted = set(layers)
    return attach(model, lambda name, layer: Roundings(rounding(name, layer)) if name in wanted else None)


def shipped(student: nn.Module, losses: tuple[float, ...], notes: dict[str, Any] | None = None) -> Trained:
    """The trained student with its weights packed; notes: bits as stored and if they were Huffman coded."""
    plain, change = finished(student)
    forms = [form for form in change.packed.values() if isinstance(form, Buckets)]
    bits = {
        "bits": sum(form.bits() for form in forms),
        "Huffman bits": sum(form.huffman_bits() for form in forms),
    }
    return Trained(plain, change, losses, {**bits, **(notes or {})})
