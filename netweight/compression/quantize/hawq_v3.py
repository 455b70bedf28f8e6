"""HAWQ-V3: networks of integers alone, the bits of each layer chosen by an integer programme.

Paper: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, arXiv:2011.10680.

Batch norms are folded. Then, per output row, for the input of each layer, and for the bias,

    weights        S_w = max |w| / (2^(b-1) - 1),   q_w = round(w / S_w)
    input          after ReLU  S_x = max x / (2^b - 1),  codes 0 .. 2^b - 1;  else symmetric, signed
    bias           q_b = round(b / (S_w S_x)),  32 bits,

so that a layer is S_w S_x (sum q_w q_x + q_b): integers, and one rescaling that `deployment/integer.py` makes
a multiplication and a shift. Ranges are moving averages over the calibration batches, then fixed. Bits:

    min  sum_i Omega_i(b_i)    s.t.  size, bit operations or latency <= L_low + f (L_high - L_low),
    Omega_i(b) = tr(H_i) / n_i |W_i - Q_b(W_i)|^2,

H_i the layer's block of the Hessian of the loss, its trace by Hutchinson's estimator; L_low, L_high are the
cost with the fewest and the most bits everywhere. The first and the last layer have fixed bits, and layers
that read the same tensor (a downsampling convolution and the one beside it) share theirs, as they share the
quantizer of that tensor. With `epochs`, weights and biases are tuned by SGD through the roundings.

Differs from the paper: latency is measured on this machine with the packed layers of this library, not on a
T4; with a budget (`within`) the first and the last layer are free; activations have 8 bits unless
`activation_bits` is "weights", which is the paper's way (4 at least); their ranges stay as calibrated during
tuning. Each probe is drawn anew for every 16 examples. An estimate of a trace that is not positive counts as
the least positive one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.core.compressed import WEIGHTED, Change, Packed, replace
from netweight.core.curvature import settled
from netweight.core.errors import DoesNotFit
from netweight.core.grid import PER_ROW, Grid
from netweight.core.latency import seconds
from netweight.core.plan import Budget, Option
from netweight.core.progress import steps
from netweight.core.rewrite import FoldBatchNorm, rewritten
from netweight.core.sites import foldable
from netweight.core.task import Data, Task, outputs, token_loss
from netweight.core.ties import allocate_tied, in_order, readers
from netweight.nn.fake import StaticRounding
from netweight.nn.layers import weights_to_pack
from netweight.nn.ranges import check, input_ranges
from netweight.nn.simulated import Simulated, pack, rounded_bias

SLUG = "hawq-v3"
KINDS = (*WEIGHTED, nn.Embedding)
LIMITS = ("size", "bops", "latency")
BATCH = 16  # examples that a probe is drawn for
LEAST_ACTIVATION, FLOAT_BITS = 4, 32  # bits of an input that follows its weight; of one that is not rounded


@dataclass(frozen=True)
class HAWQV3:
    """Settings of `hawq_v3`.

    bits: the widths to choose from, 2 to 8. ends: that of the first and the last layer, None to choose it
    too. activation_bits: of every input, 2 to 16, "weights" for those of the layer's weight, None to round
    none. symmetric: weights without a zero point, as in the paper. range: of inputs, see `nn.ranges`.
    limit: what is limited, "size", "bops" or "latency", at the share `fraction` of the way from its least to
    its most. mean_bits, size, bops, latency: ceilings in place of that, as in `core.plan.Budget`; `beside`
    bits of the file are no packed weights. probes: of the traces, at most, for every 16 of `examples`
    calibration examples. epochs: of tuning on the training data (the calibration data where there is none),
    at `rate`, with weight decay `decay` and `batch` examples a step. distil: share of the loss that is the
    distance to the float network's outputs, 0 to 1. seed: of probes and batches.
    """

    bits: tuple[int, ...] = (4, 8)
    ends: int | None = 8
    activation_bits: int | str | None = 8
    symmetric: bool = True
    limit: str = "size"
    fraction: float = 0.5
    mean_bits: float | None = None
    size: int | None = None
    beside: float = 0.0
    bops: float | None = None
    latency: float | None = None
    probes: int = 16
    examples: int = 512
    range: str = "moving average"
    epochs: int = 0
    rate: float = 1e-4
    decay: float = 1e-4
    batch: int = 128
    distil: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ends = () if self.ends is None else (self.ends,)
        if not self.bits or any(not 2 <= b <= 8 for b in (*self.bits, *ends)):
            raise ValueError(f"need widths of 2 to 8 bits, got bits={self.bits}, ends={self.ends}")
        a = self.activation_bits
        if not (a is None or a == "weights" or isinstance(a, int) and 2 <= a <= 16):
            raise ValueError(f'activation_bits={a!r}: give 2 to 16, "weights", or None to round no input')
        if self.limit not in LIMITS or not 0 <= self.fraction <= 1:
            raise ValueError(
                f"need limit in {LIMITS} and 0 <= fraction <= 1, got {self.limit!r}, {self.fraction}"
            )
        if self.probes < 1 or self.examples < 1 or self.batch < 1 or self.epochs < 0 or not self.rate > 0:
            raise ValueError(f"need positive probes, examples, batch, rate and epochs >= 0, got {self}")
        if not (0 <= self.distil <= 1 and self.decay >= 0):
            raise ValueError(f"need 0 <= distil <= 1 and decay >= 0, got {self}")
        check(self.range)

    def grid(self, bits: int) -> Grid:
        """That of a weight of `bits` bits: one scale for each row."""
        return Grid(bits, self.symmetric, PER_ROW)

    def within(self, budget: Budget, beside: float) -> HAWQV3:
        """These settings with the ceilings of a budget; beside: bits of the file that are no packed weights.

        2 and 3 bits may be chosen as well, and no layer is fixed: the last layer of a language model holds
        so much of it that 8 bits there would leave most budgets unmet.
        """
        bits = tuple(sorted({2, 3, *self.bits}))
        ceilings = {"mean_bits": budget.bits, "size": budget.size, "bops": budget.bops}
        return dataclasses.replace(
            self, bits=bits, ends=None, beside=beside, latency=budget.latency, **ceilings
        )

    def of_input(self, bits: int) -> int | None:
        """Bits of the input of a layer with weights of `bits` bits, None where it is not rounded."""
        if self.activation_bits == "weights":
            return max(bits, LEAST_ACTIVATION)
        return self.activation_bits  # type: ignore[return-value]


def hawq_v3(model: nn.Module, task: Task, layers: Sequence[str], settings: HAWQV3) -> Change:
    """Fold, choose the bits of each layer, tune if asked to, round weights, inputs and biases.

    Raises `DoesNotFit` for a layer that is no Linear, Conv or Embedding and for a network with norms that
    cannot be captured, `ImpossibleBudget` for ceilings that no choice meets.
    """
    data, folds = task.calibration, folded(model, task.calibration, layers)
    net = rewritten(model, folds)
    weights, left = weights_to_pack(net, layers, KINDS)
    inputs = in_order(net, data.x[:1], [name for name, m in net.named_modules() if isinstance(m, KINDS)])
    left |= {name: "it is never called on the calibration data" for name in weights if name not in inputs}
    sound, reasons = finite_inputs(net, data, [name for name in weights if name not in left])
    left |= reasons
    if not sound:
        return Change({}, folds, left=left)
    sharp = per_weight(net, data.take(settings.examples), sound, settings)
    tied = [] if settings.activation_bits is None else readers(inputs)
    bits = chosen(options(net, sharp, inputs, settings), tied, settings)
    roundings = rounded_inputs(net, data, bits, settings)
    final = tuned(net, task, bits, roundings, settings) if settings.epochs else net
    forms: dict[str, Packed] = {}
    biases: dict[str, Tensor] = {}
    for layer, b in bits.items():
        module, step = final.get_submodule(layer), getattr(roundings.get(layer), "scale", None)
        bias = getattr(module, "bias", None)
        form = pack(module.weight, settings.grid(b), bias, step)
        forms[layer] = form
        if bias is not None and (settings.epochs or step is not None):
            biases[layer] = rounded_bias(bias, form.scale.reshape(-1), step)
    return Change(forms, folds, roundings, left, biases)


def folded(model: nn.Module, data: Data, layers: Sequence[str]) -> list[FoldBatchNorm]:
    """The folds of all batch norms behind `layers`."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return []
    return [FoldBatchNorm(*pair) for pair in foldable(model, data) if pair[0] in layers]


def finite_inputs(net: nn.Module, data: Data, layers: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The layers whose inputs have a range, and the others with the reason."""
    reasons: dict[str, str] = {}
    measured = [layer for layer in layers if isinstance(net.get_submodule(layer), WEIGHTED)]
    try:
        input_ranges(net, data, measured)
    except DoesNotFit:
        for layer in measured:
            try:
                input_ranges(net, data, [layer])
            except DoesNotFit:
                reasons[layer] = "its inputs on the calibration data hold NaN or Inf"
    return [layer for layer in layers if layer not in reasons], reasons


def rounded_inputs(
    net: nn.Module, data: Data, bits: Mapping[str, int], settings: HAWQV3
) -> dict[str, StaticRounding]:
    """How the input of each Linear and Conv layer is rounded."""
    by_width: dict[int, list[str]] = {}
    for layer, b in bits.items():
        width = settings.of_input(b)
        if width is not None and isinstance(net.get_submodule(layer), WEIGHTED):
            by_width.setdefault(width, []).append(layer)
    found: dict[str, StaticRounding] = {}
    for width, layers in by_width.items():
        for layer, (low, high) in input_ranges(net, data, layers, settings.range, bits=width).items():
            found[layer] = rounding(low, high, width, net.get_submodule(layer).weight.device)
    return {layer: found[layer] for layer in bits if layer in found}


def positions(module: nn.Module, x: Tensor) -> float:
    """How often the whole weight is multiplied in this call; 0 for a table."""
    if isinstance(module, nn.Embedding):
        return 0.0
    if isinstance(module, nn.Linear):
        return float(x[..., 0].numel())
    kernel, padding = module.kernel_size, module._reversed_padding_repeated_twice
    count = math.prod(x.shape[: -len(kernel) - 1])
    for axis, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation)):
        place = 2 * (len(kernel) - 1 - axis)  # the padding is told last axis first
        length = x.shape[axis - len(kernel)] + padding[place] + padding[place + 1]
        count *= (length - dilation * (size - 1) - 1) // stride + 1
    return float(count)


def rounding(low: float, high: float, bits: int, device: torch.device | None = None) -> StaticRounding:
    """Unsigned with zero 0 for an input that is never negative, else signed and symmetric.

    An input that is always 0 counts as one that reaches 1.
    """
    if low >= 0:
        scale, zero = (high or 1.0) / (2**bits - 1), 0
    else:
        scale, zero = max(-low, high) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
    scalars = (torch.tensor(float(value), device=device) for value in (scale, zero))
    return StaticRounding(*scalars, bits)


def options(
    net: nn.Module, sharp: Mapping[str, float], inputs: Mapping[str, Tensor], settings: HAWQV3
) -> list[Option]:
    """Every width of every layer of `sharp` with its Omega, bits, weights, bops, and latency if limited.

    sharp: tr(H_i) / n_i. inputs: of all layers for one example, in the order of their calls.
    """
    products = [layer for layer in inputs if isinstance(net.get_submodule(layer), WEIGHTED)]
    ends = {*products[:1], *products[-1:]} if settings.ends else set()
    timed = settings.latency is not None or settings.limit == "latency"
    found = []
    for layer in steps(sharp, "Pricing the widths of each layer"):
        module = net.get_submodule(layer)
        widths = sorted(settings.bits, reverse=True)  # of equal options the widest is taken
        for b in (settings.ends,) if layer in ends else widths:
            form = pack(module.weight, settings.grid(b))
            cost = {"bits": float(form.bits()), "weights": float(module.weight.numel())}
            macs = module.weight.numel() * positions(module, inputs[layer])
            cost["bops"] = macs * form.bits() / module.weight.numel() * (settings.of_input(b) or FLOAT_BITS)
            if timed:
                cost["latency"] = seconds(form.layer(module), inputs[layer])
            moved = float((form.decode() - module.weight).detach().double().square().sum())
            found.append(Option(layer, SLUG, {"bits": b}, cost, sharp[layer] * moved))
    return found


def per_weight(net: nn.Module, data: Data, layers: Sequence[str], settings: HAWQV3) -> dict[str, float]:
    """tr(H_i) / n_i; the least positive one where the estimate is not positive, 1 where none is."""
    if len(settings.bits) == 1:
        return dict.fromkeys(layers, 1.0)  # there is nothing to choose
    sharp = settled(net, data.batched(BATCH), layers, most=settings.probes, seed=settings.seed)
    mean = {layer: trace / net.get_submodule(layer).weight.numel() for layer, trace in sharp.items()}
    least = min((value for value in mean.values() if 0 < value < math.inf), default=1.0)
    return {layer: value if least <= value < math.inf else least for layer, value in mean.items()}


def chosen(priced: Sequence[Option], tied: Sequence[Sequence[str]], settings: HAWQV3) -> dict[str, int]:
    """The bits of each layer: least summed Omega within the ceilings."""
    plan = allocate_tied(priced, ceilings(priced, settings), tied, fixed=settings.beside)
    return {layer: option.settings["bits"] for layer, option in plan.choices.items()}


def ceilings(priced: Sequence[Option], settings: HAWQV3) -> Budget:
    """Those that are given, else L_low + f (L_high - L_low) of what is limited."""
    given = Budget(settings.mean_bits, settings.size, settings.bops, settings.latency)
    if given != Budget():
        return given
    costs: dict[str, list[float]] = {}
    for option in priced:
        cost = option.cost["bits" if settings.limit == "size" else settings.limit]
        costs.setdefault(option.layer, []).append(cost)
    low, high = (sum(of(values) for values in costs.values()) for of in (min, max))
    limit = low + settings.fraction * (high - low)
    if settings.limit == "size":
        return Budget(size=math.floor((limit + settings.beside) / 8))
    return Budget(**{settings.limit: limit})


def tuned(
    net: nn.Module,
    task: Task,
    bits: Mapping[str, int],
    roundings: Mapping[str, StaticRounding],
    settings: HAWQV3,
) -> nn.Module:
    """A copy of the folded network with weights and biases of the layers tuned by SGD through the roundings.

    Everything else stays as it is. Labels that are no classes are replaced by the float network's outputs.
    """
    data = task.calibration if task.train is None else task.train
    twin = copy.deepcopy(net).eval().requires_grad_(False)
    layers = {layer: twin.get_submodule(layer).requires_grad_(True) for layer in bits}
    for layer, module in layers.items():
        replace(twin, layer, Simulated(module, settings.grid(bits[layer]), roundings.get(layer)))
    parameters = [p for module in layers.values() for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, settings.rate, momentum=0.9, weight_decay=settings.decay)
    labels = data.y is not None and not data.y.is_floating_point()
    share = settings.distil if labels else 1.0
    target = outputs(net, data) if share else None
    generator, device = torch.Generator().manual_seed(settings.seed), parameters[0].device
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(settings.epochs)])
    for rows in steps(order.split(settings.batch), "Tuning through the roundings"):
        out = twin(data.x[rows].to(device))
        loss = torch.zeros((), device=device)
        if share < 1:
            loss = loss + (1 - share) * token_loss(out, data.y[rows].to(device)).mean()
        if target is not None:
            loss = loss + share * distance(out, target[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    for layer, module in layers.items():
        replace(twin, layer, module)
    return twin


def distance(out: Tensor, target: Tensor) -> Tensor:
    """Mean KL divergence from the softmax of `target`; mean squared error for a single output."""
    if out.shape[-1] == 1:
        return F.mse_loss(out, target)
    p, q = target.float().log_softmax(-1), out.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()
