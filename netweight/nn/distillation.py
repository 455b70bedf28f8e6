"""What a network learns from another one: distances between two sets of scores, and between inner values.

    softened    T^2 KL(softmax(t / T) | softmax(s / T)), the mean over examples (Hinton et al., "Distilling
                the Knowledge in a Neural Network", 2015, arXiv:1503.02531)
    soft        -sum softmax(t) log softmax(s), the same gradient without temperature
    matched     mean squared difference of the two softmax outputs
    inner       mean squared difference of inner values, one pair after the other

t are the teacher's scores, s the student's; classes are the last axis, all others are examples. Gradients
reach the student alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Teacher:
    """A copy of a network in evaluation mode, asked without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Its scores."""
        return self.model(x)


Distance = Callable[[Tensor, Tensor], Tensor]


def softened(
    student: Float[Tensor, "... classes"], teacher: Float[Tensor, "... classes"], temperature: float = 1.0
) -> Tensor:
    """T^2 KL(teacher | student) in nats, the mean over examples."""
    p = (teacher.detach().float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def soft(student: Float[Tensor, "... classes"], teacher: Float[Tensor, "... classes"]) -> Tensor:
    """Cross-entropy against the teacher's probabilities in nats, the mean over examples."""
    return -(teacher.detach().float().softmax(-1) * student.float().log_softmax(-1)).sum(-1).mean()


def matched(student: Float[Tensor, "... classes"], teacher: Float[Tensor, "... classes"]) -> Tensor:
    """Mean squared difference of the probabilities."""
    return (student.float().softmax(-1) - teacher.detach().float().softmax(-1)).square().mean()


def inner(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over pairs of the mean squared difference; shapes agree pair by pair."""
    return torch.stack(
        [(s.float() - t.detach().float()).square().mean() for s, t in zip(student, teacher, strict=True)]
    ).sum()
