"""AdaRound: whether each weight goes up or down is learnt on the output of its layer.

Paper: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv:2004.10568.

    W' = s (clip(floor(W / s) + h(V) + z, ..) - z),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1),
    loss = sum over outputs of (y' - y)^2, mean over positions + lambda sum (1 - |2 h(V) - 1|^beta),

V starts where h(V) = W / s - floor(W / s), so that W' = W; the second term is off for the first fifth of the
steps, then beta falls from 20 to 2 along half a cosine; in the end h >= 1/2 goes up. Layer by layer in the
order given: y is of the float network, the input of y' of the network rounded so far, so that later layers
make up for earlier ones.

Differs from the paper: 500 steps at rate 1e-2 in place of 10,000 at 1e-3; no activation function after the
output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, replace
from netweight.core.grid import Grid, extent, in_groups, scale_and_zero
from netweight.core.moments import watched
from netweight.core.progress import steps
from netweight.core.task import Data, Task
from netweight.nn.layers import run, weights_to_pack
from netweight.nn.packed import Affine

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
WARM_UP = 0.2  # share of the steps without the second term
BETA_START, BETA_END = 20.0, 2.0


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
    data, grid = (
        task.calibration.take(settings.examples),
        Grid(settings.bits, settings.symmetric, settings.group),
    )
    small, packed = copy.deepcopy(model).eval(), {}
    for layer, weight in steps([*weights.items()], "Learning to round"):
        module = model.get_submodule(layer)
        x, target = inputs(small, layer, data), inputs(model, layer, data)
        with torch.no_grad():
            y = torch.cat([run(module, part, weight) for part in target.split(data.batch)])
        del target
        groups = in_groups(weight, grid.group, layer)
        scale, zero = scale_and_zero(*extent(groups, grid.symmetric), grid)
        up = learnt(module, weight, (scale, zero), x, y, settings)
        packed[layer] = encode(weight, scale, zero, up, grid)
        replace(small, layer, packed[layer].layer(small.get_submodule(layer)).plain())
    return Change(packed, left=left)


def inputs(model: nn.Module, layer: str, data: Data) -> Tensor:
    """All inputs of one layer on the data."""
    found: list[Tensor] = []
    device = next(model.parameters()).device
    with watched(model, [layer], lambda _layer, x: found.append(x)):
        for x, _ in data:
            model(x.to(device))
    return torch.cat(found)


def learnt(
    module: nn.Module,
    weight: Float[Tensor, "out in *kernel"],
    scale_zero: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    settings: AdaRound,
) -> Bool[Tensor, "groups of"]:
    """Which weights go up."""
    grid = Grid(settings.bits, settings.symmetric, settings.group)
    scale, zero = (values.float()[:, None] for values in scale_zero)
    ratio = in_groups(weight.float(), grid.group) / scale
    low, high = (level - zero for level in grid.levels)
    V = start(ratio - ratio.floor()).requires_grad_()
    optimizer = torch.optim.Adam([V], lr=settings.rate)
    generator = torch.Generator().manual_seed(settings.seed)
    axis = -1 if isinstance(module, nn.Linear) else 1
    for step in range(settings.steps):
        rows = torch.randint(len(x), (min(settings.batch, len(x)),), generator=generator)
        h = share(V)
        soft = (torch.clamp(ratio.floor() + h, low, high) * scale).reshape(weight.shape).to(weight.dtype)
        error = (run(module, x[rows], soft) - y[rows]).pow(2).sum(axis).mean()
        loss = error + settings.weight * undecided(h, step / settings.steps)
        (V.grad,) = torch.autograd.grad(loss, [V])  # of V alone: the module's own parameters stay untouched
        optimizer.step()
    return share(V.detach()) >= 0.5


def share(V: Tensor) -> Tensor:
    """h(V), the stretched and clipped sigmoid."""
    return (torch.sigmoid(V) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def start(fraction: Tensor) -> Tensor:
    """V with h(V) = fraction, which lies in [0, 1]."""
    return torch.logit((fraction - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))


def undecided(h: Tensor, progress: float) -> Tensor:
    """sum (1 - |2 h - 1|^beta) at that share of the steps; 0 during the warm-up."""
    if progress < WARM_UP:
        return h.new_zeros(())
    along = (progress - WARM_UP) / (1 - WARM_UP)
    beta = BETA_END + (BETA_START - BETA_END) * (1 + math.cos(math.pi * along)) / 2
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def encode(
    weight: Float[Tensor, "out in *kernel"],
    scale: Tensor,
    zero: Tensor,
    up: Bool[Tensor, "groups of"],
    grid: Grid,
) -> Affine:
    """The codes floor(W / s) + up + z."""
    codes = (
        (in_groups(weight.float(), grid.group) / scale.float()[:, None]).floor() + up + zero.float()[:, None]
    )
    return Affine.of(codes.clamp(*map(float, grid.levels)).to(torch.uint8), scale, zero, weight, grid)
