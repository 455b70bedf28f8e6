"""Self-distillation guided by the labels: a network is trained anew on its labels mixed with its own outputs.

Paper: Borup and Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization
Imposed by Self-Distillation", NeurIPS 2021, arXiv:2102.13088.

Step t trains a network from new random weights, with p its softmax outputs and q^{t-1} those of the step
before on the same examples, y^0 the labels as one-hot vectors:

    L = alpha mse(p, y) + (1 - alpha) mse(p, q^{t-1}) + lambda sum_i |theta_i|
      = mse(p, alpha y + (1 - alpha) q^{t-1}) + lambda sum_i |theta_i| + alpha (1 - alpha) mse(y, q^{t-1}).

The last term does not depend on the network, so that a step is an ordinary training on mixed targets (the
losses that are reported leave it out). alpha = 0 distils without labels and in the end forgets; alpha = 1
repeats the first step. The norms of the penalty are not squared, as in the official code.

The weight of a step is estimated by two trainings in place of one for each value of a grid. In kernel
regression predictions are linear in alpha (see `kernel_self_distillation`): alpha u + (1 - alpha) v, with u
of the first step and v of a network trained at alpha = 0. The same is done with networks: u and v are softmax
outputs on examples held out, and alpha^ is the least-squares weight on their labels.

Differs from the paper: the outputs of the step before are computed once, on the examples as they are; the
official code asks it about augmented images in every step. The paper gives the estimate for kernels; for
networks it is written here as the theory suggests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.progress import steps as counted
from netweight.core.task import Data, Task, outputs
from netweight.training.chance import restarted
from netweight.training.checkpoint import Checkpoint
from netweight.training.kernel_self_distillation import best_weight, clipped
from netweight.training.loop import Moment, train
from netweight.training.settings import Training
from netweight.training.trained import Trained, about, labelled


@dataclass(frozen=True)
class GuidedSelfDistillation:
    """steps: trainings in a row, the first on the labels alone. weight: alpha, of the labels, from 0 to 1;
    None: estimated at each step. held: the share of the examples that is held out for the estimate (none is,
    where the weight is given). penalty: lambda."""

    steps: int = 3
    weight: float | None = None
    held: float = 0.25
    penalty: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"steps={self.steps}: give at least 1, the training on the labels alone")
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise BadInput(f"weight={self.weight}: the labels weigh between 0 and 1; None estimates it")
        if not 0 < self.held < 1:
            raise BadInput(
                f"held={self.held}: a share above 0 and below 1 is held out; give for example 0.25"
            )
        if not self.penalty >= 0:
            raise BadInput(f"penalty={self.penalty}: give a number of at least 0")


def guided_self_distillation(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: GuidedSelfDistillation = GuidedSelfDistillation(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """The network of the last step. `how` holds for each training; the weights of `model` are not used.

    Notes: `weights` used and `raw` ones estimated, one per step; `trainings` done; `held`, examples held out.
    Raises `DoesNotFit` for data without class numbers or too few to hold some out, or layers that cannot
    begin anew.
    """
    data, held = labelled(task), None
    if settings.weight is None:
        data, held = parted(data, settings.held, how.seed)
    keep = about(keep, "guided-self-distillation", settings)
    found = distilled(model, data, held, how, settings, keep=keep)
    last = found[-1]
    notes = {
        "weights": [step.weight for step in found],
        "raw": [step.raw for step in found],
        "trainings": sum(step.trainings for step in found),
        "held": 0 if held is None else len(held),
    }
    return Trained(last.model, losses=last.losses, notes=notes)


@dataclass(frozen=True)
class Step:
    """One step: its network, the mean loss of each epoch, the weight used and as estimated, and how many
    trainings it took."""

    model: nn.Module
    losses: tuple[float, ...]
    weight: float = 1.0
    raw: float = 1.0
    trainings: int = 1


def distilled(
    model: nn.Module,
    data: Data,
    held: Data | None,
    how: Training,
    settings: GuidedSelfDistillation,
    *,
    keep: Checkpoint | None = None,
) -> list[Step]:
    """All steps in order. held: examples with labels to estimate weights on; needed where none is given."""
    found: list[Step] = []
    for number in counted(range(settings.steps), "Self-distillation"):
        now = replace(how, seed=how.seed + number)
        if number == 0:
            truth = one_hot(data, classes_of(model, data))
            found.append(Step(*fitted(model, data, truth, now, settings.penalty, keep and keep.part("1"))))
            continue
        before, label = found[-1].model, str(number + 1)
        raw, trainings = settings.weight, 1
        if raw is None:
            if held is None:
                raise DoesNotFit(f"{data.name}: the weight is estimated on held-out examples; give some")
            alone = again(
                model, data, before, 0.0, now, settings.penalty, keep and keep.part(f"{label}-alone")
            )
            raw, trainings = estimated(found[0].model, alone[0], held), 2
        weight = clipped(raw)
        last = again(model, data, before, weight, now, settings.penalty, keep and keep.part(label))
        found.append(Step(*last, weight, raw, trainings))
    return found


def again(
    model: nn.Module,
    data: Data,
    before: nn.Module,
    weight: float,
    how: Training,
    penalty: float,
    keep: Checkpoint | None = None,
) -> tuple[nn.Module, tuple[float, ...]]:
    """A new network trained on labels and on what `before` gives; with the mean loss of each epoch."""
    taught = probabilities(before, data)
    return fitted(model, data, mix(one_hot(data, taught.shape[-1]), taught, weight), how, penalty, keep)


def fitted(
    model: nn.Module,
    data: Data,
    targets: Float[Tensor, "b ..."],
    how: Training,
    penalty: float,
    keep: Checkpoint | None = None,
) -> tuple[nn.Module, tuple[float, ...]]:
    """A network of that architecture with new weights of `how.seed`, trained on soft targets."""

    def loss(net: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        p = net(x).float().softmax(-1)
        return F.mse_loss(p, y) + penalty * norms(net)

    fresh = restarted(model, how.seed)
    return fresh, train(fresh, replace(data, y=targets, memo={}), loss, how, keep=keep)


def norms(model: nn.Module) -> Tensor:
    """sum_i |theta_i| over all parameters that are trained; its gradient at a parameter of zeros is 0."""
    return torch.stack([torch.linalg.vector_norm(p) for p in model.parameters() if p.requires_grad]).sum()


def mix(truth: Tensor, taught: Tensor, weight: float) -> Tensor:
    """alpha y + (1 - alpha) q."""
    return weight * truth + (1 - weight) * taught


def estimated(first: nn.Module, alone: nn.Module, held: Data) -> float:
    """alpha^, as it comes out of least squares, from the network of the first step and one of alpha = 0."""
    u, v = probabilities(first, held), probabilities(alone, held)
    return best_weight(one_hot(held, u.shape[-1]), u, v)


def probabilities(model: nn.Module, data: Data) -> Float[Tensor, "b ..."]:
    """Softmax outputs in evaluation mode, on the CPU."""
    return outputs(model, data).float().softmax(-1)


def classes_of(model: nn.Module, data: Data) -> int:
    """How many classes the network tells apart."""
    return outputs(model, data.take(1)).shape[-1]


def one_hot(data: Data, classes: int) -> Float[Tensor, "b ..."]:
    """The labels as vectors; raises `DoesNotFit` for a label that the network has no output for."""
    y = data.y
    if y is None or y.is_floating_point():
        raise DoesNotFit(f"{data.name}: self-distillation needs class numbers; give data with labels")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise DoesNotFit(f"{data.name}: labels {low} to {high}, but the network has {classes} outputs")
    return F.one_hot(y.long(), classes).float()


def parted(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """What is trained on and what is held out, at random by the seed; raises `DoesNotFit` if one is empty."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise DoesNotFit(
            f"{data.name}: of {len(data)} examples a share of {share} cannot be held out; give more, "
            "or the weight"
        )
    return data.rows(order[count:].sort().values), data.rows(order[:count].sort().values)
