"""AdaRound: whether each weight goes up or down is learnt on the output of its layer.

Paper: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv:2004.10568.

    W' = s (clip(floor(W / s) + h(V) + z, ..) - z),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1),
    loss = sum over outputs of (y' - y)^2, mean over positions + lambda sum (1 - |2 h(V) - 1|^beta),

V starts where h(V) = W / s - floor(W / s), so that W' = W (`nn/soft.py`); the second term is off for the
first fifth of the steps, then beta falls from 20 to 2 along half a cosine; in the end h >= 1/2 goes up. Layer
by layer in the order given: y is of the float network, the input of y' of the network rounded so far, so that
later layers make up for earlier ones.

Differs from the paper: 500 steps at rate 1e-2 in place of 10,000 at 1e-3; no activation function after the
output.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netweight.core.calls import recorded
from netweight.core.compressed import WEIGHTED, Change, replace
from netweight.core.grid import Grid, in_groups
from netweight.core.progress import steps
from netweight.core.task import Task
from netweight.nn.layers import weights_to_pack
from netweight.nn.soft import SoftLayer, undecided


@dataclass(frozen=True)
class AdaRound:
    """Settings of `adaround`.

    bits, symmetric, group: of the grid. steps, rate, batch: of Adam, in examples. weight: lambda. seed: of
    the batches. examples: of the calibration data, at most.
    """

    bits: int = 4
    symmetric: bool = True
    group: int = 0
    steps: int = 500
    rate: float = 1e-2
    batch: int = 32
    weight: float = 0.01
    examples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.examples < 1 or not self.rate > 0 or self.weight < 0:
            raise ValueError(f"need positive steps, rate, batch and examples and weight >= 0, got {self}")
        Grid(self.bits, self.symmetric, self.group)


def adaround(model: nn.Module, task: Task, layers: Sequence[str], settings: AdaRound) -> Change:
    """Learn the rounding of Linear and Conv layers one after the other, in the order of `layers`."""
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    data = task.calibration.take(settings.examples)
    grid = Grid(settings.bits, settings.symmetric, settings.group)
    for name, weight in weights.items():  # a group that does not fit is said before minutes of learning
        in_groups(weight, settings.group, name)
    small, packed = copy.deepcopy(model).eval(), {}
    for layer, weight in steps([*weights.items()], "Learning to round"):
        module, given = model.get_submodule(layer), recorded(small, layer, data)
        if not given:
            left[layer] = "the layer is never called on the calibration data"
            continue
        x = torch.cat([args[0] for args, _, _ in given])
        y = torch.cat([output for _, _, output in recorded(model, layer, data)])
        soft = SoftLayer(module, weight, grid, layer)
        learn(soft, x, y, settings)
        packed[layer] = soft.form()
        replace(small, layer, packed[layer].layer(small.get_submodule(layer)).plain())
    return Change(packed, left=left)


def learn(soft: SoftLayer, x: Tensor, y: Tensor, settings: AdaRound) -> None:
    """Find V, in place."""
    optimizer = torch.optim.Adam([soft.V], lr=settings.rate)
    generator = torch.Generator().manual_seed(settings.seed)
    axis = -1 if isinstance(soft.like, nn.Linear) else 1
    for step in range(settings.steps):
        rows = torch.randint(len(x), (min(settings.batch, len(x)),), generator=generator)
        error = (soft(x[rows]) - y[rows]).pow(2).sum(axis).mean()
        loss = error + settings.weight * undecided(soft.h, step / settings.steps)
        (soft.V.grad,) = torch.autograd.grad(loss, [soft.V])  # of V alone: the module stays untouched
        optimizer.step()
