"""SRAT: adversarial training where some classes are rare, reweighted late, on features that are kept apart.

Paper: Wang, Xu, Liu, Li, Thuraisingham and Tang, "Imbalanced Adversarial Training with Reweighting", ICDM
2022, arXiv:2107.13639.

With x'_i the worst that the attack finds around x_i (`training.adversary`), z_i the input of the last layer
at x'_i, normed to length 1, and n_c the examples of class c,

    L = mean_i w_{y_i} l(f(x'_i), y_i) + lambda L_sep,

    L_sep = mean_i -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a != i} exp(z_i.z_a / tau) ),

P(i) the other examples of class y_i in the batch; an i without any is left out of the mean. The weights are
class-balanced (Cui et al., CVPR 2019, arXiv:1901.05555), and 1 for all before the epoch T_d,

    w_c = (1 - beta) / (1 - beta^{n_c}), scaled so that their mean over classes is 1,

and l is cross-entropy; focal, (1 - p_y)^gamma * -log p_y (Lin et al., ICCV 2017, arXiv:1708.02002); or LDAM,
the cross-entropy with Delta_y taken off y's score, Delta_c = m (min_k n_k / n_c)^(1/4) (Cao et al., NeurIPS
2019, arXiv:1906.07413). Each is a rising function of -log p_y, and w_c a factor above 0: the attack climbs
the cross-entropy, whose slope has the same direction.

With `deferred` 0 and `separation` 0 it is adversarial training reweighted from its start; with `steps` 0 and
`random` False ordinary training.

Differs from the paper: there is no code; lambda, tau and T_d are ours, for few epochs. A class without any
example has weight 0 and margin 0 and counts in no mean: its weight would be infinite, and it is never a y.
LDAM's margins are in units of the scores as they are, where its code norms features and weights first and
multiplies by 30: the network that is shipped is the one that was given. Over several processes L_sep pairs
the examples of each with one another.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.task import Task
from netweight.core.victim import class_scores, device_of, evaluated
from netweight.data.imbalanced import counts_of
from netweight.training.adversary import Value, adversary, check, cross_entropy
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Moment, Training, train
from netweight.training.trained import Trained, about, labelled

LOSSES = ("ce", "focal", "ldam")
TINY = 1e-12  # keeps the slope of a power finite at 0


@dataclass(frozen=True)
class SRAT:
    """Settings of `srat`.

    within, steps, size, random: of the attack, as `training.adversarial` has them. loss: ce, focal or ldam.
    beta: of the class weights, from 0 (all 1) to below 1 (towards 1 / n_c). deferred: the share of the epochs
    before they count (T_d): 0 from the start, 1 not at all. separation: lambda; temperature: tau. focus:
    gamma of focal. margin: the largest one of ldam, m.
    """

    within: str = "linf=0.03"
    steps: int = 10
    size: float = 0.25
    random: bool = True
    loss: str = "ce"
    beta: float = 0.9999
    deferred: float = 0.6
    separation: float = 0.2
    temperature: float = 0.1
    focus: float = 2.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        check(self.within, self.steps, self.size)
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if not 0 <= self.beta < 1:
            raise BadInput(f"beta={self.beta}: it is from 0 to below 1; give for example 0.9999")
        if not 0 <= self.deferred <= 1:
            raise BadInput(f"deferred={self.deferred}: it is a share of the epochs; give one from 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise BadInput(f"temperature={self.temperature}: it is above 0; give for example 0.1")
        for name in ("separation", "focus", "margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name}={getattr(self, name)}: give 0 or a number above it")


def srat(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: SRAT = SRAT(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model, trained on what the attack finds, with weights for its classes and L_sep.

    Notes: `counts` and `weights` of the classes, the `epoch` (from 0) from which on these count, `empty`
    classes and those with a `single` example, which never has a partner in L_sep, and the layer whose inputs
    the `features` are. Raises `DoesNotFit` for data without class numbers, of one class alone, or with
    classes that the network does not have; for inputs that are whole numbers; and, where lambda is above 0,
    for a network whose scores do not come from a Linear layer.
    """
    data = labelled(task)
    attack = adversary(settings.within, settings.steps, settings.size, data, random=settings.random)
    layer = feature_layer(model, data.x[:1]) if settings.separation else None
    counts = counts_of(data, classes_of(model, data.x[:1])).tolist()
    if sum(count > 0 for count in counts) < 2:
        raise DoesNotFit(f"{data.name}: all examples are of one class; srat needs two or more")
    weights, value = class_weights(counts, settings.beta), loss_of(settings, counts)
    start = round(settings.deferred * how.epochs)
    network = copy.deepcopy(model)

    def found(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        points = attack.points(model, x, y, at.generator)
        scores, z = scores_and_features(model, points, layer)
        each = value(scores, y)
        if at.epoch >= start:
            each = weights.to(each)[y] * each
        if z is None:
            return each.mean()
        return each.mean() + settings.separation * separation(z, y, settings.temperature)

    losses = train(network, data, found, how, keep=about(keep, "srat", settings))
    return Trained(network, losses=losses, notes=told(counts, weights, start, layer))


def told(counts: Sequence[int], weights: Tensor, start: int, layer: str | None) -> dict[str, Any]:
    """The notes of a training."""
    return {
        "counts": list(counts),
        "weights": weights.tolist(),
        "epoch": start,
        "empty": [c for c, count in enumerate(counts) if count == 0],
        "single": [c for c, count in enumerate(counts) if count == 1],
        "features": layer,
    }


# Losses -----------------------------------------------------------------------------------------------------


def class_weights(counts: Sequence[int], beta: float) -> Float[Tensor, " classes"]:
    """w_c in float64: mean 1 over the classes that have examples, 0 for those that have none."""
    n = torch.tensor(counts, dtype=torch.float64)
    raw = torch.where(n > 0, (1 - beta) / (1 - beta ** n.clamp(min=1)), 0)
    return raw * (n > 0).sum() / raw.sum()


def margins(counts: Sequence[int], largest: float) -> Float[Tensor, " classes"]:
    """Delta_c of LDAM: `largest` for the rarest class, 0 for those without examples."""
    n = torch.tensor(counts, dtype=torch.float64)
    return torch.where(n > 0, largest * (n[n > 0].min() / n.clamp(min=1)) ** 0.25, 0)


def loss_of(settings: SRAT, counts: Sequence[int]) -> Value:
    """l: one number per example."""
    if settings.loss == "focal":
        return lambda scores, y: focal(scores, y, settings.focus)
    if settings.loss == "ldam":
        delta = margins(counts, settings.margin)
        return lambda scores, y: ldam(scores, y, delta)
    return cross_entropy


def focal(scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"], gamma: float) -> Float[Tensor, " b"]:
    """(1 - p_y)^gamma * -log p_y."""
    loss = cross_entropy(scores, y)
    return (-torch.expm1(-loss)).clamp(min=TINY) ** gamma * loss


def ldam(
    scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"], delta: Float[Tensor, " classes"]
) -> Float[Tensor, " b"]:
    """The cross-entropy with Delta_y taken off y's score."""
    scores = scores.float()
    return cross_entropy(scores - F.one_hot(y, scores.shape[1]) * delta.to(scores), y)


def separation(z: Float[Tensor, "b d"], y: Int[Tensor, " b"], temperature: float) -> Float[Tensor, ""]:
    """L_sep of features of any length; 0 where no example of the batch has a partner."""
    with torch.autocast(z.device.type, enabled=False):  # products over a small tau want all of float32
        z = F.normalize(z.float(), dim=1)
        near = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = near.masked_fill(itself, torch.finfo(near.dtype).min).log_softmax(1)
    same = (y[:, None] == y) & ~itself
    partners = same.sum(1)
    each = -log_p.where(same, 0).sum(1) / partners.clamp(min=1)
    return each.sum() / (partners > 0).sum().clamp(min=1)


# Features ---------------------------------------------------------------------------------------------------


def classes_of(model: nn.Module, x: Float[Tensor, "b *in"]) -> int:
    """How many class scores the network gives; raises `DoesNotFit` unless these are `b classes`."""
    with torch.no_grad(), evaluated(model):
        scores = class_scores(model(x.to(device_of(model, x))))
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise DoesNotFit(f"srat needs class scores `b classes`, but the network gives {tuple(scores.shape)}")
    return scores.shape[1]


def feature_layer(model: nn.Module, x: Float[Tensor, "b *in"]) -> str:
    """The name of the Linear layer that gives the scores; raises `DoesNotFit` where there is none."""
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda _, inputs, out: calls.append((name, out))

    linear = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_hook(note(name)) for name, part in linear]
    try:
        with torch.no_grad(), evaluated(model):
            scores = class_scores(model(x.to(device_of(model, x))))
    finally:
        for handle in handles:
            handle.remove()
    name, out = calls[-1] if calls else ("none", None)
    if out is None or out.ndim != 2 or not torch.equal(out, scores):
        raise DoesNotFit(
            f"{name}: the last Linear layer that ran does not give the class scores `b classes`; srat "
            "keeps the inputs of that layer apart; end the network with it or set separation to 0"
        )
    return name


def scores_and_features(
    model: nn.Module, x: Float[Tensor, "b *in"], layer: str | None
) -> tuple[Float[Tensor, "b classes"], Float[Tensor, "b d"] | None]:
    """(scores, inputs of that layer in the same pass, None without a layer)."""
    if layer is None:
        return class_scores(model(x)), None
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        return class_scores(model(x)), seen[-1]
    finally:
        handle.remove()
