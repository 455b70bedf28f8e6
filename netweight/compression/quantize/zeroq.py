"""ZeroQ: calibration without data, on inputs that are made to fit what the batch norms have kept.

Paper: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, arXiv:2001.00281.

    minimise over x   sum over batch norms of  |mean(x_l) - mu_l|^2 + |std(x_l) - sigma_l|^2
                      + |mean(x)|^2 + |std(x) - 1|^2

from x ~ N(0, 1) by Adam, each term a mean over channels; x_l is the input of the norm, means and deviations
are of each example over its positions (of the whole batch where there is one position alone). Weights are
then rounded to nearest, the inputs of layers to static ranges seen on x. With `mixed` the bits of each layer
are chosen: the sensitivity of a layer to b bits is

    Omega(b) = mean over x of KL(softmax f(x) | softmax f_b(x)),  f_b with that layer alone rounded to b bits,

and the plan of least summed Omega that stores no more than `bits` for all layers is found (`core/plan.py`).

Differs from the paper: x is in units of the network's own normalisation (the first `Normalize`; else of a
uniform number between the ends of valid inputs) and in the end clamped to valid inputs; the exact knapsack in
place of a search along the Pareto front.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, weight_of
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid
from netweight.core.plan import Budget, Option, allocate
from netweight.core.progress import steps
from netweight.core.task import Data, Task, outputs
from netweight.nn.fake import StaticRounding
from netweight.nn.layers import weights_to_pack
from netweight.nn.normalize import Normalize
from netweight.nn.packed import Affine
from netweight.nn.ranges import check, input_ranges

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WIDTHS = (2, 4, 8)  # bits that a layer may have in a mixed plan
PATIENCE, SLOWEST = 100, 1e-4  # of the rate: steps without progress before a tenth of it is taken, its least
BATCH = 32  # examples made at a time
EPS = 1e-6


@dataclass(frozen=True)
class ZeroQ:
    """Settings of `zeroq`.

    bits, symmetric, group: of the weights' grid. activation_bits: 2 to 16, None leaves the inputs of layers.
    range: of inputs, one of `nn.ranges.HOW`. mixed: bits per layer by sensitivity. examples, steps, rate: of
    the inputs that are made. seed: of their start.
    """

    bits: int = 8
    symmetric: bool = True
    group: int = 0
    activation_bits: int | None = 8
    range: str = "min-max"
    mixed: bool = False
    examples: int = 32
    steps: int = 500
    rate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.range)
        if self.examples < 1 or self.steps < 1 or not self.rate > 0:
            raise ValueError(f"need positive examples, steps and rate, got {self}")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 16:
            raise ValueError(f"need 2 <= activation_bits <= 16, got activation_bits={self.activation_bits}")
        self.grid(self.bits)

    def grid(self, bits: int) -> Grid:
        """The weights' grid at that many bits."""
        return Grid(bits, self.symmetric, self.group)


def zeroq(model: nn.Module, task: Task, layers: Sequence[str], settings: ZeroQ) -> Change:
    """Make inputs, round weights, and the inputs of layers by them. Of the data only shape and limits count.

    Raises `DoesNotFit` for a network without batch norms that keep statistics, or for token ids.
    """
    weights, left = weights_to_pack(model, layers, WEIGHTED)
    made = distilled(model, task.calibration, settings)
    widths = dict.fromkeys(weights, settings.bits)
    if settings.mixed and weights:
        widths = mixed(model, made, list(weights), settings)
    packed = {
        layer: Affine.nearest(weight, settings.grid(widths[layer]), layer)
        for layer, weight in weights.items()
    }
    bits = settings.activation_bits
    if bits is None:
        return Change(packed, left=left)
    ranges = input_ranges(model, made, list(weights), settings.range, bits=bits)
    return Change(packed, (), {n: StaticRounding.of(*ends, bits) for n, ends in ranges.items()}, left)


def distilled(model: nn.Module, like: Data, settings: ZeroQ) -> Data:
    """Inputs of the shape and limits of `like` that the batch norms take for data."""
    if not like.x.is_floating_point():
        raise DoesNotFit(
            "ZeroQ makes its inputs by gradients, which token ids have none of; calibrate on text"
        )
    net = copy.deepcopy(model).eval().requires_grad_(False)
    norms = [m for m in net.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        raise DoesNotFit(
            "ZeroQ makes its inputs from batch norms that keep statistics, and the network has none; "
            "use a method that calibrates on data"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    mean, std = units(net, like)
    device = norms[0].running_mean.device
    parts = []
    for start in range(0, settings.examples, BATCH):
        count = min(BATCH, settings.examples - start)
        z = torch.randn(count, *like.x.shape[1:], generator=generator).to(device, like.x.dtype)
        parts.append(fitted(net, norms, z, (mean.to(z), std.to(z)), settings))
    x = (
        torch.cat(parts).clamp(like.low, like.high)
        if like.low is not None or like.high is not None
        else torch.cat(parts)
    )
    return replace(like, x=x.cpu(), y=None, domain=None, batch=BATCH, name="made of batch norms", memo={})


def units(net: nn.Module, like: Data) -> tuple[Tensor, Tensor]:
    """Mean and deviation that inputs have in the network's eyes: they are subtracted and divided by."""
    for module in net.modules():
        if isinstance(module, Normalize):
            return module.mean, module.std
    if like.low is not None and like.high is not None:
        width = like.high - like.low
        return torch.tensor((like.low + like.high) / 2), torch.tensor(width / math.sqrt(12))
    return torch.tensor(0.0), torch.tensor(1.0)


def fitted(
    net: nn.Module, norms: Sequence[nn.Module], z: Tensor, unit: tuple[Tensor, Tensor], settings: ZeroQ
) -> Tensor:
    """One batch of inputs, from the start z on."""
    mean, std = unit
    terms: list[Tensor] = []

    def see(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        terms.append(distance(inputs[0], norm.running_mean, (norm.running_var + EPS).sqrt()))

    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    z.requires_grad_()
    optimizer = torch.optim.Adam([z], lr=settings.rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=PATIENCE, min_lr=SLOWEST)
    zero, one = z.new_zeros(z.shape[1]), z.new_ones(z.shape[1])
    try:
        for _ in steps(range(settings.steps), "Making inputs"):
            terms.clear()
            with torch.enable_grad():
                net(z * std + mean)
                loss = distance(z, zero, one) + sum(terms)
                (z.grad,) = torch.autograd.grad(loss, [z])
            optimizer.step()
            plateau.step(float(loss.detach()))
    finally:
        for handle in handles:
            handle.remove()
    return (z * std + mean).detach()


def distance(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean square of (mean of x - mean) and (deviation of x - std), per channel (axis 1) and example."""
    flat = x.reshape(*x.shape[:2], -1)
    if flat.shape[2] == 1:  # no positions: the batch has a mean and a deviation, an example has none
        flat = flat.permute(2, 1, 0)
    seen = (flat.var(2, correction=0) + EPS).sqrt()
    return (flat.mean(2) - mean).square().mean() + (seen - std).square().mean()


def sensitivity(
    model: nn.Module, data: Data, layers: Sequence[str], bits: int, settings: ZeroQ
) -> dict[str, float]:
    """Omega of each layer in nats: how far the predictions move when it alone is rounded to `bits`."""
    net, found = copy.deepcopy(model).eval(), {}
    before = outputs(net, data).double().log_softmax(-1)
    for layer in steps(layers, f"Rounding single layers to {bits} bits"):
        module, weight = net.get_submodule(layer), weight_of(model, layer)
        rounded = Affine.nearest(weight, settings.grid(bits), layer).decode()
        module.weight = nn.Parameter(rounded, requires_grad=False)
        after = outputs(net, data).double().log_softmax(-1)
        module.weight = nn.Parameter(weight, requires_grad=False)
        kl = F.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
        found[layer] = max(float(kl), 0.0)
    return found


def mixed(model: nn.Module, data: Data, layers: Sequence[str], settings: ZeroQ) -> dict[str, int]:
    """Bits of each layer: the least summed sensitivity at the stored bits of `bits` for all."""
    options, stored = [], 0
    for bits in sorted({*WIDTHS, settings.bits}):
        omega = sensitivity(model, data, layers, bits, settings)
        for layer in layers:
            weight = weight_of(model, layer)
            size = Affine.nearest(weight, settings.grid(bits), layer).bits()
            stored += size if bits == settings.bits else 0
            cost = {"bits": float(size), "weights": float(weight.numel())}
            options.append(Option(layer, "zeroq", {"bits": bits}, cost, omega[layer]))
    weights = sum(weight_of(model, layer).numel() for layer in layers)
    plan = allocate(options, Budget(bits=stored / weights))
    return {layer: int(option.settings["bits"]) for layer, option in plan.choices.items()}
