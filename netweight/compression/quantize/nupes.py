"""NUPES: codes on a power grid and the exponent of the grid, learnt layer by layer on the layer's output.

Paper: Yvinec et al., "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", IEEE TPAMI
2025, arXiv:2308.05600.

The grid is that of `nn/power.py`: w' = s q^(1-1/a) phi_1/a(n), codes n = -q .. q. Methods before it learn
whether a weight goes up or down; here a latent u per weight moves over the whole grid,

    u starts at q^(1-a) phi_a(w / s),      n = clip(round(u), -q, q),
    loss = sum over outputs of (y' - y)^2, mean over positions,

no term that rounds, as codes are whole throughout; with Adam on u, log a and log s. n passes gradients
straight through to u, and

    dw'/dn = w'(m) / (a m),  m = max(|n|, 1/2)      (at n = 0 the derivative is 0: such a weight would stay),
    dw'/da = -w' ln(|n| / q) / a^2,  0 at n = 0     (bounded: 1/q <= |n| / q),      dw'/d log s = w'.

Layer by layer in the order given: y is of the float network, the input of y' of the network rounded so far.
What is learnt is kept only where the loss over all examples is below that of the start. With
`activation_bits` the inputs of each layer are rounded to codes of the same exponent, so that products of
codes stay products and the layer runs on integers (`nn/power_integer.py`).

steps = 0 learns nothing and is `compression/quantize/powerquant.py`, the data-free method of the same
authors.

Differs from the paper: its soft rounding, schedule and range settings are not public and ours are given
above; ranges of inputs are the smallest and largest seen on calibration data, not set from batch norms.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.calls import recorded
from netweight.core.compressed import WEIGHTED, ActivationRounding, Change, Packed, RoundedInput, replace
from netweight.core.errors import DoesNotFit
from netweight.core.grid import Grid, in_groups, storable
from netweight.core.moments import moments
from netweight.core.progress import steps
from netweight.core.task import Data, Task
from netweight.nn.layers import KINDS, run, weights_to_pack
from netweight.nn.power import Power, PowerRounding, float32, spread

NARROWEST, WIDEST = 0.25, 1.5  # exponents stay between
FASTER = 2.0  # a code's rate falls from this many times `rate` to 0: its mean is `rate`


@dataclass(frozen=True)
class NUPES:
    """Settings of `nupes`.

    bits, group, exponent: as in `PowerQuant`; the exponent is where learning starts. activation_bits: 2 to 8
    for the inputs, None keeps them float. steps, batch: of Adam, in examples. rate: of the codes, in grid
    units. rate_exponent, rate_scale: of log a and log s; 0 keeps them. examples: of the calibration data, at
    most. seed: of the batches.
    """

    bits: int = 4
    group: int = 0
    exponent: float | None = None
    activation_bits: int | None = None
    steps: int = 200
    rate: float = 1e-2
    rate_exponent: float = 1e-2
    rate_scale: float = 1e-3
    batch: int = 32
    examples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        Grid(self.bits, True, self.group)
        if self.exponent is not None and not NARROWEST <= self.exponent <= WIDEST:
            raise ValueError(
                f"need {NARROWEST} <= exponent <= {WIDEST} or None, got exponent={self.exponent}"
            )
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ValueError(f"need 2 <= activation_bits <= 8 or None, got {self.activation_bits}")
        if self.steps < 0 or self.batch < 1 or self.examples < 1:
            raise ValueError(f"need steps >= 0 and positive batch and examples, got {self}")
        if not (self.rate > 0 and self.rate_exponent >= 0 and self.rate_scale >= 0):
            raise ValueError(f"need rate > 0 and other rates >= 0, got {self}")

    @property
    def symmetric(self) -> bool:
        """The grid has no zero point: what the planner asks of a grid's settings."""
        return True


def nupes(model: nn.Module, task: Task, layers: Sequence[str], settings: NUPES) -> Change:
    """Learn power codes of Linear and Conv layers one after the other, in the order of `layers`.

    With steps=0 and float inputs also transposed Conv and Embedding weights. Raises `DoesNotFit` for another
    kind of layer, a layer that is never called, and where `group` does not divide a row.
    """
    plain = settings.steps == 0 and settings.activation_bits is None
    weights, left = weights_to_pack(model, layers, KINDS if plain else WEIGHTED)
    ranges = {} if settings.activation_bits is None else moments(model, task.calibration, list(weights))
    data, small = task.calibration.take(settings.examples), copy.deepcopy(model).eval()
    packed: dict[str, Packed] = {}
    activations: dict[str, ActivationRounding] = {}
    for layer, weight in steps([*weights.items()], "Learning codes and exponents"):
        form = Power.nearest(weight, settings.bits, settings.group, settings.exponent, layer)
        rounding = None
        if settings.activation_bits is not None:
            low, high = ranges[layer].low, ranges[layer].high
            rounding = PowerRounding.of(low, high, float(form.exponent), settings.activation_bits)
        if settings.steps:
            x, y = seen(small, layer, data)[0], seen(model, layer, data)[1]
            if not (x.isfinite().all() and y.isfinite().all()):
                left[layer] = "its inputs or outputs on the calibration data hold NaN or Inf"
                continue
            form = learnt(model.get_submodule(layer), weight, form, rounding, (x, y), settings)
        packed[layer] = form
        module = form.layer(small.get_submodule(layer)).plain()
        if rounding is not None:
            rounding = activations[layer] = with_exponent(rounding, form)
            module = RoundedInput(rounding, module)
        replace(small, layer, module)
    return Change(packed, activations=activations, left=left)


def seen(model: nn.Module, layer: str, data: Data) -> tuple[Tensor, Tensor]:
    """All inputs and outputs of one layer on the data."""
    calls = recorded(model, layer, data)
    if not calls:
        raise DoesNotFit(f"{layer}: the layer is never called on the calibration data; leave it out")
    return torch.cat([args[0] for args, _, _ in calls]), torch.cat([output for _, _, output in calls])


def with_exponent(rounding: PowerRounding, form: Power) -> PowerRounding:
    """The same range with the exponent of that weight."""
    return PowerRounding(
        rounding.scale, form.exponent.to(rounding.scale.device), rounding.bits, rounding.signed
    )


def learnt(
    module: nn.Module,
    weight: Float[Tensor, "out in *kernel"],
    start: Power,
    rounding: PowerRounding | None,
    examples: tuple[Tensor, Tensor],
    settings: NUPES,
) -> Power:
    """The form after `steps` steps on (inputs, outputs), or the start where that is better."""
    (x, y), q, device = examples, start.q, weight.device
    scale, groups = start.scale.float().reshape(-1, 1), in_groups(weight.float(), start.group)
    u = spread(groups / scale, float(start.exponent), q).clamp(-q, q).requires_grad_()
    log_a = start.exponent.log().to(device).requires_grad_()
    log_s = scale.log().requires_grad_()
    rates = (settings.rate, settings.rate_exponent, settings.rate_scale)
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": FASTER * rate} for p, rate in zip((u, log_a, log_s), rates)]
    )
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / settings.steps, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        rows = torch.randint(len(x), (min(settings.batch, len(x)),), generator=generator).to(x.device)
        rounded = rounded_to(x[rows], rounding, float(log_a.detach().exp()))
        value = decoded(u, log_a, log_s, q).reshape(weight.shape).to(weight.dtype)
        loss = error(module, rounded, y[rows], value)
        u.grad, log_a.grad, log_s.grad = torch.autograd.grad(loss, [u, log_a, log_s])
        optimizer.step()
        slower.step()
        with torch.no_grad():
            u.clamp_(-q, q)
            log_a.clamp_(torch.tensor(NARROWEST).log(), torch.tensor(WIDEST).log())
    with torch.no_grad():
        a, s = float32(float(log_a.exp())), storable(log_s.exp().reshape(-1))
        end = Power.of(u.round().to(torch.int16), s, a, weight, settings.bits, start.group)
        losses = [whole(module, x, y, form, rounding, settings.batch) for form in (start, end)]
    return end if losses[1] < losses[0] else start


def decoded(
    u: Float[Tensor, "groups of"], log_a: Float[Tensor, ""], log_s: Float[Tensor, "groups 1"], q: int
) -> Float[Tensor, "groups of"]:
    """w' of the rounded u, with the gradients of the module's head."""
    n, a, s = u.detach().round().clamp(-q, q), log_a.exp(), log_s.exp()
    value = n.sign() * (n.abs() / q).pow(1 / a) * q * s
    m = n.abs().clamp(min=0.5)
    slope = ((m / q).pow(1 / a) * q * s / (a * m)).detach()
    return value + slope * (u - u.detach())


def rounded_to(x: Tensor, rounding: PowerRounding | None, exponent: float) -> Tensor:
    """The inputs on their grid with that exponent; unchanged where they stay float."""
    if rounding is None:
        return x
    now = PowerRounding(rounding.scale, torch.tensor(exponent), rounding.bits, rounding.signed)
    return now.module().to(x.device)(x)


def error(module: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """sum over outputs of (y' - y)^2, mean over positions."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    return (run(module, x, weight) - y).pow(2).sum(axis).mean()


def whole(
    module: nn.Module, x: Tensor, y: Tensor, form: Power, rounding: PowerRounding | None, batch: int
) -> float:
    """The error of a form over all examples."""
    weight, total = form.decode(), 0.0
    for some, wanted in zip(x.split(batch), y.split(batch)):
        some = rounded_to(some, rounding, float(form.exponent))
        total += float(error(module, some, wanted, weight)) * len(some)
    return total / len(x)
