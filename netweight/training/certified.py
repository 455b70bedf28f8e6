"""Certified training: on a proven bound of the loss over the whole set around each input.

Papers: Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", 2020,
arXiv:2002.12920 (loss fusion, weights that move); Zhang et al. 2020, arXiv:1906.06316 (CROWN-IBP); Gowal et
al. 2018, arXiv:1810.12715 (intervals, the schedule).

With scores f, class y and z_j = f_j - f_y, the cross-entropy is log S, S = sum_j e^{z_j}. Intervals give
l <= z <= u on the set (the last layer as rows W_j - W_y, so that the difference is not bounded twice), and

    intervals       S <= sum_j e^{u_j},
    CROWN-IBP       S <= max <k, z> + sum_j c_j,        e^z <= k z + c, the chord of e^z on [l, u]:

ONE row per example goes back to the input, however many classes there are. Everything is shifted by
m = max_j u_j before the exponential. The two are mixed while the set grows (e its present, E its final size):

    loss = log( t CROWN-IBP + (1 - t) intervals ) + m,        t = (E - e) / E   (or falling to `kept`).

Without fusion the margins f_y - f_j are bounded by a row each and the loss is log(1 + sum_j e^{-margin_j}).
The size of the set is 0 for `natural` epochs, then e(i) = a (i - i0)^beta up to a share `mid` of the ramp,
from where it goes on with the slope reached, linearly, to E (`share_at`). At 0 the loss is the cross-entropy.

Batch norm: bounds use mean and variance of the batch's clean pass, gradients included, as the official code
does; the running statistics are updated by that same pass and used once training is over.

Differs from the paper: m is treated as a constant in both bounds (the loss does not depend on it); the
official code lets gradients through it in one of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.graph import Graph, capture, live
from netweight.core.perturbation import L1, L2, Linf, WeightLinf, with_range
from netweight.core.task import Data, Task
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Loss, Moment, Training, train
from netweight.verification import crown
from netweight.verification.problem import Problem, Region, pose
from netweight.verification.relax import Interval
from netweight.verification.weights import MOVED, loosened

METHODS = ("ibp", "crown-ibp")
NOTHING = 1e-50  # a set of that share of its final size is no set
NARROW = 1e-8  # an interval on which the exponential is taken to be constant


@dataclass(frozen=True)
class Certified:
    """How the loss is bounded, and how the set grows.

    method: ibp or crown-ibp. fused: one row per example in place of one per class. natural: epochs without a
    set; ramp: epochs in which it grows; mid: the share of the ramp that is a power, beta: its exponent.
    kept: the share of CROWN-IBP that is left at full size.
    """

    method: str = "crown-ibp"
    fused: bool = True
    natural: int = 10
    ramp: int = 30
    mid: float = 0.4
    beta: float = 4.0
    kept: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method of certified training", self.method, METHODS)
        if self.natural < 0 or self.ramp < 0:
            raise BadInput(f"natural={self.natural}, ramp={self.ramp}: give at least 0 epochs of each")
        if not (0 <= self.mid <= 1 and self.beta >= 1):
            raise BadInput(f"mid={self.mid}, beta={self.beta}: mid is a share from 0 to 1, beta at least 1")
        if not 0 <= self.kept <= 1:
            raise BadInput(f"kept={self.kept}: the share of CROWN-IBP at full size lies between 0 and 1")


def certified(
    model: nn.Module,
    data: Task | Data,
    within: Linf | L2 | L1,
    how: Training,
    settings: Certified = Certified(),
    *,
    weights: L2 | WeightLinf | None = None,
    keep: Checkpoint | None = None,
) -> tuple[nn.Module, tuple[float, ...]]:
    """A copy of the model, trained so that its class can be proven on the set; the mean loss of each epoch.

    weights: a set around the weight of each layer that the network is to endure too (see
    `verification.weights`); it grows with `within`, whose radius may be 0. Raises `BadInput` where the ramp
    does not fit into the epochs, `DoesNotFit` for data without labels or an operator without bounds.
    """
    examples = data.train if isinstance(data, Task) else data
    if examples is None or examples.y is None or examples.y.is_floating_point():
        raise DoesNotFit("certified training needs examples with class numbers; give data with labels")
    if settings.natural + settings.ramp > how.epochs:
        raise BadInput(
            f"{settings.natural} natural epochs and a ramp of {settings.ramp} do not fit into {how.epochs} "
            "epochs; give more epochs or a shorter ramp"
        )
    if not isinstance(within, Linf | L2 | L1):
        raise DoesNotFit(f"{within} is no set of inputs to train for; give linf, l2 or l1")
    if not isinstance(weights, L2 | WeightLinf | None):
        raise DoesNotFit(f"weights cannot be trained to move in {weights}; give l2 or weightlinf")
    within = with_range(within, examples.low, examples.high)  # type: ignore[assignment]
    model = copy.deepcopy(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    loss = bounded_loss(capture(model, examples.x[:1].to(device)), within, settings, weights)
    if keep is not None:
        keep = replace(keep, about=f"{keep.about} certified {settings} {within} {weights}")
    return model, train(model, examples, loss, how, keep=keep)


def share_at(step: int, steps: int, settings: Certified) -> float:
    """The size of the set after `step` steps, as a share of its final one; `steps` are those of an epoch."""
    first, last = settings.natural * steps, (settings.natural + settings.ramp) * steps
    middle = first + int(settings.mid * (last - first))
    if step <= first:
        return 0.0 if step < first or settings.ramp else 1.0
    if step >= last:
        return 1.0
    power, rise = float(middle - first), settings.beta * (last - middle)
    if step < middle:  # a (step - first)^beta, with a = 1 / (rise power^(beta - 1) + power^beta)
        return ((step - first) / power) ** settings.beta * power / (rise + power)
    reached = power / (rise + power) if power else 0.0
    return reached + (1 - reached) * (step - middle) / (last - middle)


# The loss ------------------------------------------------------------------------------------------------


def bounded_loss(
    graph: Graph, within: Linf | L2 | L1, settings: Certified, weights: L2 | WeightLinf | None = None
) -> Loss:
    """What `train` minimises: the cross-entropy at first, then its bound on a set that grows.

    graph: of one example, captured from the model that is trained.
    """

    def loss(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        share = share_at(at.step, at.steps, settings)
        if share < NOTHING:
            return F.cross_entropy(model(x), y)
        now = live(graph, tensors(model, x))
        if weights is not None:
            now = loosened(now, replace(weights, eps=weights.eps * share))
        problem = pose(now, [Region.of(x, replace(within, eps=within.eps * share))], "real")
        rows = settings.method == "crown-ibp"
        mixed = settings.kept + (1 - settings.kept) * (1 - share) if rows else 0.0
        bound = fused if settings.fused else unfused
        return bound(problem, y, mixed).mean()

    return loss


def fused(problem: Problem, y: Int[Tensor, " b"], mixed: float) -> Float[Tensor, " b"]:
    """An upper bound of the cross-entropy on the set, by one row per example.

    mixed: t, the share of CROWN-IBP; with 0 no row is sent back.
    """
    state = crown.intermediate(problem, tighten=False)
    z = differences(problem, state, y)
    shift = z.upper.amax(1, keepdim=True).detach()
    total = (z.upper - shift).exp().sum(1)
    if mixed >= NOTHING:
        k, c = chord(z.lower - shift, z.upper - shift)
        c = c - k * shift  # of e^(z - shift) in z itself
        rows = k - F.one_hot(y, k.shape[1]) * k.sum(1, keepdim=True)  # <k, z> = <rows, f>
        start = crown.objective_rows(problem, -rows.unsqueeze(1))
        above = c.sum(1) - crown.lowest(problem, state, start).squeeze(1)
        total = mixed * above + (1 - mixed) * total
    return total.clamp(min=1e-30).log() + shift.squeeze(1)


def unfused(problem: Problem, y: Int[Tensor, " b"], mixed: float) -> Float[Tensor, " b"]:
    """The same by one row per other class, each with its own relaxation."""
    state = crown.intermediate(problem, tighten=False)
    z = differences(problem, state, y)
    others = F.one_hot(y, z.upper.shape[1]) == 0
    margin = -z.upper[others].reshape(len(y), -1)
    if mixed >= NOTHING:
        start = crown.objective_rows(problem, objective(y, z.upper.shape[1]).to(margin))
        margin = mixed * crown.lowest(problem, state, start) + (1 - mixed) * margin
    return F.softplus((-margin).logsumexp(1))  # log(1 + sum e^-margin)


def chord(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(k, c) with e^v <= k v + c for lower <= v <= upper, equal at both ends."""
    low, high, width = lower.exp(), upper.exp(), upper - lower
    wide = width > NARROW
    k = torch.where(wide, (high - low) / torch.where(wide, width, 1.0), 0.0)
    return k, torch.where(wide, low - k * lower, high)


def objective(y: Int[Tensor, " b"], classes: int) -> Float[Tensor, "b k out"]:
    """Rows f_y - f_j for every other class j, in the order of the classes."""
    eye = torch.eye(classes, device=y.device)
    rows = eye[y].unsqueeze(1) - eye
    return rows[F.one_hot(y, classes) == 0].reshape(len(y), classes - 1, classes)


def differences(problem: Problem, state: crown.State, y: Int[Tensor, " b"]) -> Interval:
    """Intervals of z_j = f_j - f_y, `b classes`, 0 for j = y; a last Linear layer as rows W_j - W_y."""
    own, nodes = y.unsqueeze(1), problem.nodes
    f = state.values[problem.output.name]
    other = F.one_hot(y, f.lower[0].numel()) == 0
    last, moved, both = problem.output, None, torch.add
    if last.op == "aten.add" and nodes.get(last.inputs[-1], last).op == MOVED:
        moved = state.values[last.inputs[-1]].upper.flatten(1)
        if nodes[last.inputs[-1]].params["eps"] is not None:  # rows of one ball move at right angles
            both = torch.hypot
        last = nodes[last.inputs[0]]
    if last.op == "aten.linear" and last.params["weight"].name in problem.constants:
        p = problem.params(last, state.values)
        centre, radius = p["input"].centre.flatten(1), p["input"].radius.flatten(1)
        middle = F.linear(centre, p["weight"], p["bias"])
        between = (p["weight"] - p["weight"][y].unsqueeze(1)).abs()  # b classes in
        spread = torch.matmul(between, radius.unsqueeze(2)).squeeze(2)
        if moved is not None:
            spread = spread + both(moved, moved.gather(1, own)) * other
        middle = middle - middle.gather(1, own)
        return Interval(middle - spread, middle + spread)
    lower, upper = f.lower.flatten(1), f.upper.flatten(1)
    return Interval((lower - upper.gather(1, own)) * other, (upper - lower.gather(1, own)) * other)


# The network as it is at this step -----------------------------------------------------------------------


def tensors(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Parameters and buffers by name; of a batch norm in training mode the statistics of this batch."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    }
    if not norms:
        return found

    def watch(name: str) -> nn.modules.batchnorm._BatchNorm:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            axes = [0, *range(2, inputs[0].ndim)]
            found[f"{name}.running_mean"] = inputs[0].mean(axes)
            found[f"{name}.running_var"] = inputs[0].var(axes, correction=0)

        return norms[name].register_forward_pre_hook(hook)

    hooks = [watch(name) for name in norms]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
