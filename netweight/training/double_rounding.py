"""Double rounding: one set of integer codes trained for several bit widths, switched without data.

Paper: Huang, Liu, Xia, Zhao and Ren, "Nearly Lossless Adaptive Bit Switching", 2025, arXiv:2502.01199 (Double
Rounding, ALRS, HASB); mixed widths and norms for pairs of widths: Bulat and Tzimiropoulos, "Bit-Mixer", ICCV
2021, arXiv:2103.17267; the objective of the search: Dong et al., "HAWQ-V2", NeurIPS 2020, arXiv:1911.03852.

The rounding itself is in `nn.double_rounding`, with D = h - b bits between the highest width h and b:

    W_h = clip(round(W / s)),    W_b = clip((W_h + 2^(D-1)) >> D),    the weight at b bits is  W_b s 2^D.

For each batch and each width b in turn: forward, backward, and a step at once (`together`: the gradients of
all widths are added up and one step is made, the scheme it is compared with). Steps s of weights and inputs
have rates of their own, scaled by how large their gradients are (ALRS; no weight decay),

    rate_b = eta_b rate (1 - g_b),    g_b = mean over layers of min(|ds|, 1),
    eta_b = 10^(-D/2) for even D,  5 10^(-(D+1)/2) for odd D.

HASB, for widths that differ between layers: with probability `mixed` (epoch + 1) / epochs a layer leaves the
width of the turn; where the trace t_l of its Hessian is below the mean it draws any width evenly, else with
probabilities in proportion to b. The batch norms then have a set for each pair (width of the layer before,
own width). `assigned` finds the best widths of a given mean:

    minimise  sum_l (t_l / n_l) |W_l(b_l) - W_l|^2    subject to  sum_l b_l <= layers * mean.

Differs from the paper: printed as rate_b = eta_b (rate - g_b), which is below 0 as soon as g_b exceeds the
rate, as it does at 2 bits (`scaling="literal"` is that, held at 0). The search as printed, least
sum (t_l / n_l) b_l, gives few bits to sensitive layers; here it is HAWQ-V2's. One Adam with two groups stands
for two optimizers, which is the same. Initial steps are those of the lowest width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.compressed import Compressed, weight_of
from netweight.core.curvature import traces
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.plan import Budget, Option, allocate
from netweight.core.task import Data, Task, correct, outputs, token_loss
from netweight.nn.distillation import softened
from netweight.nn.double_rounding import WIDTHS
from netweight.nn.quantized import inner_layers
from netweight.nn.switch_norm import SwitchNorm, SwitchNorms
from netweight.nn.switchable import finished, layers_of, switchable, switched, use, widths_of
from netweight.training.checkpoint import Checkpoint, Running
from netweight.training.loop import Hooks, Loss, Moment, Training, shuffled, train
from netweight.training.trained import Trained, about, labelled

SCALINGS = ("adaptive", "literal", "none")
PROBED = 256  # examples of the Hessian's traces
JUDGED = 1000  # examples of the accuracy in the notes


@dataclass(frozen=True)
class DoubleRounding:
    """What is trained.

    bits: the widths, highest first; the highest is what is stored. layers: names, () for all Linear and Conv
    layers but the first and the last. inputs: round the layers' inputs to the same width too. scaling: of the
    rates of the steps: adaptive (ALRS), literal (as printed) or none. together: one step for all widths.
    distil: weight of what the highest width teaches the others. mixed: HASB's largest probability, 0 for one
    width in all layers. floor: AdaBits' second rounding, for comparison.
    """

    bits: tuple[int, ...] = (8, 6, 4, 2)
    layers: tuple[str, ...] = ()
    inputs: bool = True
    scaling: str = "adaptive"
    together: bool = False
    distil: float = 0.0
    mixed: float = 0.0
    floor: bool = False

    def __post_init__(self) -> None:
        if not self.bits or any(b not in WIDTHS for b in self.bits):
            raise BadInput(f"bits={self.bits}: widths go from 2 to 8; give for example (8, 6, 4, 2)")
        if list(self.bits) != sorted(set(self.bits), reverse=True):
            raise BadInput(f"bits={self.bits}: give each width once, the highest first")
        if self.scaling not in SCALINGS:
            raise unknown("scaling of the rates of steps", self.scaling, SCALINGS)
        if not 0 <= self.mixed <= 1:
            raise BadInput(f"mixed={self.mixed}: it is a probability; give a number from 0 to 1")
        if not self.distil >= 0:
            raise BadInput(f"distil={self.distil}: the weight of a loss is at least 0")


def double_rounding(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: DoubleRounding = DoubleRounding(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of a trained network, trained for all widths; it runs at the highest.

    notes: by width "step gradients", the mean |ds| over layers and steps, and "training accuracy", of the
    stored network on the first 1000 examples; with `mixed` the "traces" that it used.
    Raises `DoesNotFit` for data without classes or a layer that cannot be treated, `BadInput` for a batch of
    one example where there are batch norms.
    """
    data = labelled(task)
    layers = settings.layers or tuple(inner_layers(model))
    if not layers:
        raise DoesNotFit(
            f"{type(model).__name__}: there are no layers between the first and the last; name some (layers=)"
        )
    device = next(model.parameters()).device
    first = data.x[: how.batch].to(device)
    net, norms = switchable(
        model,
        layers,
        settings.bits,
        first,
        inputs=settings.inputs,
        pairs=settings.mixed > 0,
        floor=settings.floor,
    )
    sensitive = traces(model, data.take(PROBED), layers) if settings.mixed else {}
    turn = Turn(norms, settings, how.epochs, sensitive)
    hooks = Hooks(
        groups=groups,
        order=in_turn(data, how.batch, net, 1 if settings.together else len(settings.bits)),
        passes=turn.passes,
        before=turn.before,
        state=turn.seen,
    )
    losses = train(net, data, turn.loss(), how, hooks=hooks, keep=about(keep, "double-rounding", settings))
    use(net, norms, dict.fromkeys(layers, settings.bits[0]))
    plain, change = finished(net, norms)
    found = Trained(plain, change, losses)
    notes = {"step gradients": turn.seen.means(), "training accuracy": shares(found.network(), data)}
    return replace(found, notes=notes | ({"traces": sensitive} if sensitive else {}))


def shares(small: Compressed, data: Data) -> dict[str, float]:
    """The share of the first examples that is right at each width."""
    widths, first = widths_of(small), data.take(JUDGED)
    return {
        str(b): float(
            correct(outputs(switched(small, dict.fromkeys(widths, b)).model, first), first.y).mean()
        )
        for b in next(form.widths for form in small.packed.values())
    }


def groups(net: nn.Module) -> list[dict]:
    """Steps apart from everything else: without weight decay, with a rate of their own."""
    steps = [p for layer in layers_of(net).values() for p in (layer.step, *layer.steps)]
    apart = {id(p) for p in steps}
    rest = [p for p in net.parameters() if id(p) not in apart and p.requires_grad]
    return [{"params": rest}, {"params": steps, "weight_decay": 0.0, "steps": True}]


def in_turn(
    data: Data, batch: int, net: nn.Module, times: int
) -> Callable[[torch.Generator], Sequence[Tensor]]:
    """Random batches, each `times` times in a row; one example left over joins the batch before it."""
    norms = any(isinstance(module, SwitchNorm) for module in net.modules())
    if norms and min(batch, len(data)) < 2:
        raise BadInput(
            f"batch={batch}, {len(data)} examples: batch norms need at least two examples a step; give more"
        )

    def order(generator: torch.Generator) -> Sequence[Tensor]:
        rows = list(shuffled(len(data), batch)(generator))
        if norms and len(rows[-1]) == 1:
            rows[-2:] = [torch.cat(rows[-2:])]
        return [some for some in rows for _ in range(times)]

    return order


class Seen(nn.Module):
    """Mean |ds| of each width over the steps so far; kept in checkpoints."""

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("sums", torch.zeros(len(bits), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(len(bits), dtype=torch.float64))

    def add(self, bits: int, value: float) -> None:
        """One more step at that width."""
        self.sums[self.bits.index(bits)] += value
        self.counts[self.bits.index(bits)] += 1

    def means(self) -> dict[str, float]:
        """By width, as JSON has it."""
        return dict(zip(map(str, self.bits), (self.sums / self.counts).tolist()))


@dataclass
class Turn:
    """Whose turn it is: chooses the widths before a pass, scales the rates of the steps after it."""

    norms: SwitchNorms
    settings: DoubleRounding
    epochs: int
    traces: Mapping[str, float]

    def __post_init__(self) -> None:
        self.seen = Seen(self.settings.bits)
        self.bits = self.settings.bits[0]
        self.taught: Tensor | None = None

    def loss(self) -> Loss:
        """Cross-entropy, and with `distil` what the highest width said of the same batch."""

        def loss(net: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
            out = net(x)
            value = token_loss(out, y).mean()
            if not self.settings.distil:
                return value
            if self.bits == self.settings.bits[0]:
                self.taught = out.detach()
                return value
            assert self.taught is not None, "the highest width comes first"
            return value + self.settings.distil * softened(out, self.taught)

        return loss

    def passes(self, run: Running, once: Callable[[], Tensor], at: Moment) -> Tensor:
        """One width, or with `together` all of them one after the other; the mean loss."""
        every = self.settings.bits
        turns = every if self.settings.together else every[at.step % len(every) :][:1]
        total, before = torch.zeros(()), torch.zeros(())
        for self.bits in turns:
            use(run.model, self.norms, self.drawn(layers_of(run.model), at))
            total = total + once().cpu()
            now = gradients(run.model) / run.scaler.get_scale()
            self.seen.add(self.bits, float((now - before).abs().mean()))
            before = now
        return total / len(turns)

    def drawn(self, layers: Iterable[str], at: Moment) -> dict[str, int]:
        """The width of the turn in every layer, or what HASB draws instead."""
        widths = dict.fromkeys(layers, self.bits)
        if not self.settings.mixed:
            return widths
        sigma = self.settings.mixed * (at.epoch + 1) / self.epochs
        mean = sum(self.traces.values()) / len(self.traces)
        every = torch.tensor(self.settings.bits, dtype=torch.float64)
        for name in layers:
            if torch.rand((), generator=at.generator) < sigma:
                odds = torch.ones_like(every) if self.traces[name] < mean else every
                widths[name] = self.settings.bits[int(torch.multinomial(odds, 1, generator=at.generator))]
        return widths

    def before(self, run: Running, at: Moment) -> None:
        """ALRS: the rate of the steps for this width and the size of their gradients."""
        if self.settings.together or self.settings.scaling == "none":
            return
        size = float(gradients(run.model).abs().clamp(max=1.0).mean())
        by = eta(self.settings.bits[0] - self.bits)
        for group in run.optimizer.param_groups:
            if group.get("steps"):
                rate = group["lr"]
                literal = self.settings.scaling == "literal"
                group["lr"] = by * (max(rate - size, 0.0) if literal else rate * (1 - size))


def gradients(net: nn.Module) -> Float[Tensor, " layers"]:
    """The gradient of each layer's step of the weight, on the CPU."""
    return torch.stack([layer.step.grad.float() for layer in layers_of(net).values()]).cpu()


def eta(fewer: int) -> float:
    """How much slower steps learn at a width of `fewer` bits less than the highest: 1, 0.5, 0.1, 0.05, ..."""
    return 10.0 ** (-fewer // 2) if fewer % 2 == 0 else 5 * 10.0 ** (-(fewer + 1) // 2)


# Widths that differ between layers -----------------------------------------------------------------------


def costs(
    model: nn.Module, small: Compressed, traces: Mapping[str, float], bits: Sequence[int]
) -> dict[str, dict[int, float]]:
    """(t_l / n_l) |W_l(b) - W_l|^2 of every switchable layer at every width.

    model: the float weights. traces: of the Hessian, by layer (`core.curvature.traces`).
    """
    found: dict[str, dict[int, float]] = {name: {} for name in widths_of(small)}
    for b in bits:
        for name, form in switched(small, dict.fromkeys(found, b)).packed.items():
            if name in found:
                weight = weight_of(model, name)
                error = (form.decode() - weight).double().square().sum()
                found[name][b] = max(traces[name], 0.0) / weight.numel() * float(error)
    return found


def assigned(costs: Mapping[str, Mapping[int, float]], mean: float) -> dict[str, int]:
    """The width of each layer with the least summed cost and at most `mean` bits on average, exactly.

    Raises `ImpossibleBudget` where the mean is below the lowest width.
    """
    options = [
        Option(layer, "double-rounding", {"bits": b}, {"bits": float(b), "weights": 1.0}, cost)
        for layer, row in costs.items()
        for b, cost in row.items()
    ]
    plan = allocate(options, Budget(bits=mean))
    return {layer: int(option.settings["bits"]) for layer, option in plan.choices.items()}


def neighbours(widths: Mapping[str, int], bits: Sequence[int]) -> list[dict[str, int]]:
    """These widths with one layer at another one."""
    return [{**widths, layer: b} for layer in widths for b in bits if b != widths[layer]]
