"""Doubly robust adversarial training: each example weighs as much as the worst case over weights says.

Paper: Sow, Lin, Wang and Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024,
arXiv:2308.00311.

    min over theta, max over w in the simplex:   sum_i w_i l_i - r sum_i w_i log(M w_i),

    l_i = l(f_theta(x_i + d_i), y_i),       d_i = what the attack finds around x_i (`training.adversary`).

The best w is known, and with it what is minimised (`weights`, `objective`):

    w_i = exp(l_i / r) / sum_j exp(l_j / r),       F = r log( mean_i exp(l_i / r) ).

r = inf is adversarial training, r = 0 the worst example alone. The logarithm of a mean cannot be had without
bias from a batch; the mean is followed from step to step instead (`Mean`), u_0 that of the first batch:

    u_t = (1 - eta) u_{t-1} + eta mean_batch exp(l_i / r),       dF = mean_batch (exp(l_i / r) / u_t) dl_i.

d_i moves with theta. As the minimum of -l_i(theta, d) - c sum_k [log(upper - s)_k + log(s - lower)_k] with
s = x + d inside its box, and with a network that is piecewise linear, so that only the barrier has a second
derivative by d, the implicit function theorem gives (`inverse_hessian`, `through_the_attack`)

    dl_i = grad_theta [ l_i + <v, grad_d l_i> ],     v = H^-1 grad_d l_i held fixed,
    H = c diag( 1 / (upper - s)^2 + 1 / (s - lower)^2 ).

DONE-GD takes steps of one size along the gradient's signs, DONE-ADAM those of Adam.

Differs from the paper: there is no code, c, eta and r are ours; r stays as it is, where the paper lets it
fall. Where the valid range of inputs cuts the ball, the barrier stands at the cut. Norms have the statistics
of the batch in the loss and those of evaluation in the attack; that they tie the examples of a batch together
is left out of the implicit term, as is the second derivative of the softmax. The weights of DONE-GAIRAT are
not there.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netweight.core.ascent import adam, projection, slope
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.perturbation import Linf, parse
from netweight.core.task import Task
from netweight.core.victim import class_scores, evaluated
from netweight.training import distributed
from netweight.training.adversary import Adversary, adversary, check, cross_entropy
from netweight.training.checkpoint import Checkpoint
from netweight.training.loop import Hooks, Moment, Training, train
from netweight.training.trained import Trained, about, labelled

SOLVERS = ("gd", "adam")


@dataclass(frozen=True)
class DoublyRobust:
    """Settings of `doubly_robust_training`.

    within: the set around each input, as "linf=0.03". steps: of the attack. size: of each, a share of the
    radius. random: the attack starts anywhere in the set, else at x. solver: gd or adam. r: how dear it is to
    weigh examples differently, in units of the loss (nats). eta: what the newest batch counts in u. barrier:
    c, none for no implicit term. The implicit term and adam are for linf.
    """

    within: str = "linf=0.03"
    steps: int = 4
    size: float = 0.5
    random: bool = True
    solver: str = "gd"
    r: float = 5.0
    eta: float = 0.5
    barrier: float | None = 0.03

    def __post_init__(self) -> None:
        check(self.within, self.steps, self.size)
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        if not (math.isfinite(self.r) and self.r > 0):
            raise BadInput(
                f"r={self.r}: the price of unequal weights is a number above 0; give for example 1"
            )
        if not 0 < self.eta <= 1:
            raise BadInput(f"eta={self.eta}: a share above 0 and up to 1 is expected; give for example 0.5")
        if self.barrier is not None and not (math.isfinite(self.barrier) and self.barrier > 0):
            raise BadInput(f"barrier={self.barrier}: give a number above 0, or none to leave its term out")
        around = isinstance(parse(self.within), Linf)
        if not around and (self.barrier is not None or self.solver == "adam"):
            raise DoesNotFit(
                f"{self.within}: the log barrier and adam treat each number of an input by itself, as linf "
                "does; give linf, or barrier=none with solver=gd"
            )


def doubly_robust_training(
    model: nn.Module,
    task: Task,
    how: Training,
    settings: DoublyRobust = DoublyRobust(),
    *,
    keep: Checkpoint | None = None,
) -> Trained:
    """A copy of the model, trained on F; the losses are the estimates r log u of F, in nats.

    Notes: `F`, the last of these. Raises `DoesNotFit` for data without class numbers or with inputs that are
    whole numbers.
    """
    data = labelled(task)
    attack = adversary(settings.within, settings.steps, settings.size, data, random=settings.random)
    network, mean = copy.deepcopy(model), Mean(settings.eta)

    def value(model: nn.Module, x: Tensor, y: Tensor, at: Moment) -> Tensor:
        s = found(attack, model, x, y, at.generator, settings.solver)
        losses, moving = through_the_attack(model, s, x, y, attack, settings.barrier)
        return mean.step(losses.detach(), moving, settings.r)

    keep = about(keep, "doubly-robust-training", settings)
    losses = train(network, data, value, how, hooks=Hooks(state=mean), keep=keep)
    return Trained(network, losses=losses, notes={"F": settings.r * float(mean.log_u)})


# Weights ----------------------------------------------------------------------------------------------------


def weights(losses: Float[Tensor, " m"], r: float) -> Float[Tensor, " m"]:
    """The worst weights for these losses: exp(l_i / r) / sum_j exp(l_j / r)."""
    return (losses / r).softmax(0)


def objective(losses: Float[Tensor, " m"], r: float) -> Float[Tensor, ""]:
    """F = r log( mean_i exp(l_i / r) ), in float64; between the mean and the largest of the losses."""
    return r * ((losses.double() / r).logsumexp(0) - math.log(len(losses)))


class Mean(nn.Module):
    """log u_t, kept in checkpoints: u itself would overflow where l / r is large. NaN before the first."""

    log_u: Tensor

    def __init__(self, eta: float) -> None:
        super().__init__()
        self.eta = eta
        self.register_buffer("log_u", torch.tensor(math.nan, dtype=torch.float64))

    def step(self, losses: Float[Tensor, " b"], moving: Float[Tensor, " b"], r: float) -> Float[Tensor, ""]:
        """Take the losses of a batch into u; r log u_t, with the gradient of mean (exp(l_i / r) / u_t) m_i.

        moving: m, whose gradients are those of the losses.
        """
        new = log_mean_exp(losses.double() / r).to(self.log_u.device)
        if self.log_u.isnan():
            self.log_u.copy_(new)
        else:
            kept = self.log_u + math.log1p(-self.eta) if self.eta < 1 else self.log_u - math.inf
            self.log_u.copy_(torch.logaddexp(kept, new + math.log(self.eta)))
        log_u = self.log_u.to(losses.device)
        factors = (losses.double() / r - log_u).exp().to(moving.dtype)
        value = (factors * moving).mean()
        return value - value.detach() + (r * log_u).to(value.dtype)


def log_mean_exp(values: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """log( mean exp(values) ) over the rows of all processes."""
    total, count = values.logsumexp(0), len(values)
    if distributed.count() > 1:
        each = distributed.gathered((float(total), count))
        total = torch.tensor([one for one, _ in each], dtype=values.dtype).logsumexp(0)
        count = sum(rows for _, rows in each)
    return total - math.log(count)


# The attack, and the way through it -------------------------------------------------------------------------


def found(
    attack: Adversary, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, solver: str
) -> Float[Tensor, "b *in"]:
    """What the inner solver finds around each x; "adam" has steps of size times the radius."""
    if solver == "gd":
        return attack.points(model, x, y, generator)
    project, rate = projection(attack.within, x), attack.size * attack.within.eps  # type: ignore[union-attr]
    s = attack.within.sample(x, generator) if attack.random else project(x)
    first = second = torch.zeros_like(s)
    with evaluated(model), torch.enable_grad():
        for step in range(1, attack.steps + 1):
            s = s.detach().requires_grad_()
            rise = slope(cross_entropy(class_scores(model(s)), y), s)
            way, first, second = adam(rise, first, second, step)
            s = project(s.detach() + rate * way)
    return s.detach()


def inverse_hessian(
    s: Float[Tensor, "b *in"], lower: Float[Tensor, "b *in"], upper: Float[Tensor, "b *in"], c: float
) -> Float[Tensor, "b *in"]:
    """The diagonal of H^-1: 0 at the sides of the box, and where it has no width."""
    above, below = (upper - s).square(), (s - lower).square()
    return above * below / (c * (above + below)).clamp(min=torch.finfo(s.dtype).tiny)


def through_the_attack(
    model: nn.Module,
    s: Float[Tensor, "b *in"],
    x: Float[Tensor, "b *in"],
    y: Int[Tensor, " b"],
    attack: Adversary,
    c: float | None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """(l_i, l_i + <v, grad_d l_i>) at the points s that were found around x; the same twice where c is None.

    The gradient of the second by the weights is that of l_i with d_i as a function of them.
    """
    if c is None:
        losses = cross_entropy(class_scores(model(s)), y)
        return losses, losses
    s = s.detach().requires_grad_()
    losses = cross_entropy(class_scores(model(s)), y)
    (rise,) = torch.autograd.grad(losses.sum(), s, create_graph=True)
    lower, upper = (attack.within.project(torch.full_like(x, far), x) for far in (-math.inf, math.inf))
    v = (inverse_hessian(s, lower, upper, c) * rise).detach()
    return losses, losses + (v * rise).flatten(1).sum(1)
