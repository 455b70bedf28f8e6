"""Bifurcation: small errors of sensors that make a controller do the opposite, for one that acts on numbers.

Paper: "A Novel Bifurcation Method for Observation Perturbation Attacks on Reinforcement Learning Agents: Load
Altering Attacks on a Cyber Physical Power System", 2024, arXiv:2407.05182.

A controller gives a number u for what it observes and acts by tanh(u). The bifurcation layer

    B(u) = (kappa u, -kappa u)

turns it into two logits, of the groups "increase" and "decrease", before the tanh can flatten the slope. With
bins of actions in place of a number, the groups are the bins above 0 and those below. The grouped difference
logits, g the group at x (or that of y),

    L(s) = max_{i not in g} z_i(s) - max_{j in g} z_j(s)       = -sign(u(x)) 2 kappa u(s) for a number,

are maximised by projected gradient ascent: the direction is aimed at, the strength is not. Beside it stand
the attacks it is held against, where a* is an action that is worst for the plant:

    untargeted    maximise   |tanh u(s) - tanh u(x)|^2         bins: the cross-entropy of the bin at x
    targeted      minimise   |tanh u(s) - a*|^2                bins: the cross-entropy of the bin nearest a*

`sensors` makes the set: only what is measured may be wrong. Clean gradients of the untargeted loss are 0, so
searches start at a random point of the set too.

Differs from the paper: no code of it was found, so layer and loss are as its abstract and the summaries of it
say; plain projected ascent, whose steps shrink (`core.ascent`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from netweight.core.ascent import ascend
from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.perturbation import Box, Found, Linf, Perturbation
from netweight.core.victim import check_inputs, class_scores, device_of, evaluated, margin, victim

NEAR = 0.05  # how close to a* an action has to come


class Bifurcation(nn.Module):
    """B: outputs `b 1` (u) or `b bins` (logits, bins from the lowest action up) to `b 2`.

    Column 0 is the group "increase", column 1 "decrease". Raises `DoesNotFit` for an odd number of bins.
    """

    def __init__(self, kappa: float = 1.0) -> None:
        super().__init__()
        if not kappa > 0:
            raise BadInput(f"kappa={kappa}: the slope of the bifurcation layer is above 0")
        self.kappa = kappa

    def forward(self, output: Float[Tensor, "b k"]) -> Float[Tensor, "b 2"]:
        """The two logits."""
        output = checked(class_scores(output))
        if output.shape[1] == 1:
            return torch.cat([self.kappa * output, -self.kappa * output], 1)
        lower, upper = output.chunk(2, 1)
        return torch.stack([upper.amax(1), lower.amax(1)], 1)


def bifurcation(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Num[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 10,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """The point of each set with the largest L; hit: where the controller does the opposite there.

    model: gives u `b 1`, or logits of an even number of bins `b bins`. y: the bin whose group is to be left
    (for one u: 0 increase, 1 decrease); None stands for what the controller does at x. The search does not
    stop at the border of the groups. Raises `DoesNotFit` for other outputs, whole numbers as inputs, and
    sets that do not lie around inputs.
    """
    with victim(nn.Sequential(model, Bifurcation()), x, None, "bifurcation") as v:
        of = v.of if y is None else group(y.to(v.x.device), outputs(model, v.x[:1]).shape[1])

        def score(s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            return margin(v.scores(s), of[rows]), nowhere(rows)

        points = ascend(score, v.x, within, steps=steps, restarts=restarts, seed=seed).points
        with torch.no_grad():
            return Found(points, margin(v.scores(points), of) > 0)


def group(y: Num[Tensor, " b"], count: int) -> Int[Tensor, " b"]:
    """0 where a bin of `count` increases, 1 where it decreases; of a single u, y itself."""
    if y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= max(count, 2):
        raise DoesNotFit(f"y holds {y.max().item()}; give whole numbers from 0 to {max(count, 2) - 1}")
    return y if count == 1 else (y < count // 2).long()


# What it is held against ----------------------------------------------------------------------------------


def untargeted(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    within: Perturbation,
    *,
    steps: int = 10,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """The point where the action is furthest from that at x; hit: where it is of the opposite group."""
    with torch.no_grad(), evaluated(model):
        clean = outputs(model, x)

    def value(output: Tensor, rows: Tensor) -> Tensor:
        if output.shape[1] == 1:
            return (output.tanh() - clean[rows].tanh()).square()[:, 0]
        return F.cross_entropy(output, clean[rows].argmax(1), reduction="none")

    def opposite(output: Tensor) -> Tensor:
        layer = Bifurcation()
        return layer(output).argmax(1) != layer(clean).argmax(1)

    return _search(model, x, within, value, opposite, steps=steps, restarts=restarts, seed=seed)


def targeted(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    goal: Float[Tensor, " b"],
    within: Perturbation,
    *,
    steps: int = 10,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """The point where the action is nearest to the goal in [-1, 1]; hit: where it is within `NEAR` of it."""
    goal = goal.to(device_of(model, x))
    if len(goal) != len(x) or not bool((goal.abs() <= 1).all()):
        raise BadInput(f"{len(goal)} goals for {len(x)} examples; give one action in [-1, 1] for each")

    def value(output: Tensor, rows: Tensor) -> Tensor:
        if output.shape[1] == 1:
            return -(output[:, 0].tanh() - goal[rows]).square()
        return -F.cross_entropy(output, nearest(goal[rows], output.shape[1]), reduction="none")

    def there(output: Tensor) -> Tensor:
        if output.shape[1] == 1:
            return (output[:, 0].tanh() - goal).abs() <= NEAR
        return output.argmax(1) == nearest(goal, output.shape[1])

    return _search(model, x, within, value, there, steps=steps, restarts=restarts, seed=seed)


def nearest(action: Float[Tensor, " b"], count: int) -> Int[Tensor, " b"]:
    """The bin of `count` from -1 to 1 whose middle is nearest."""
    return ((action + 1) / 2 * (count - 1)).round().long()


def _search(
    model: nn.Module,
    x: Tensor,
    within: Perturbation,
    value: Callable[[Tensor, Tensor], Tensor],
    reached: Callable[[Tensor], Tensor],
    *,
    steps: int,
    restarts: int,
    seed: int,
) -> Found:
    """Ascent on a value of (outputs, rows) that does not stop early."""
    check_inputs(x, "bifurcation")
    x = x.to(device_of(model, x))

    def score(s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return value(checked(outputs(model, s)), rows), nowhere(rows)

    with evaluated(model):
        points = ascend(score, x, within, steps=steps, restarts=restarts, seed=seed).points
        with torch.no_grad():
            return Found(points, reached(outputs(model, points)))


def nowhere(rows: Int[Tensor, " k"]) -> Bool[Tensor, " k"]:
    """No row has reached what it looks for: the search goes on to the last step."""
    return torch.zeros_like(rows, dtype=torch.bool)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What the controller gives, on its device."""
    return class_scores(model(x.to(device_of(model, x))))


def checked(output: Tensor) -> Float[Tensor, "b k"]:
    """Raises where it is neither one number nor an even number of bins."""
    if output.ndim != 2 or (output.shape[1] != 1 and output.shape[1] % 2):
        raise DoesNotFit(
            f"bifurcation needs one number or an even number of bins for each example, but the network gives "
            f"{tuple(output.shape)}"
        )
    return output


def sensors(
    x: Float[Tensor, "b f"],
    which: Bool[Tensor, " f"],
    eps: float,
    *,
    low: float | None = 0.0,
    high: float | None = 1.0,
) -> Box:
    """The set in which the features `which` move by at most eps within [low, high], and no other moves.

    x is in the same units as eps; its own values are in the range. Raises `BadInput` where `which` is not one
    flag for each feature.
    """
    if which.shape != x.shape[1:]:
        raise BadInput(f"{tuple(which.shape)} flags for {tuple(x.shape[1:])} features; give one for each")
    ball, which = Linf(eps, low, high), which.to(x.device)
    edges = [torch.where(which, ball.project(x + side, x), x) for side in (-2 * eps, 2 * eps)]
    return Box(edges[0], edges[1])
