"""Points beside a network's decision boundary: copies answer them as it does, others do not.

Papers: Cao et al., "IPGuard: Protecting Intellectual Property of Deep Neural Networks via Fingerprinting the
Classification Boundary", AsiaCCS 2021, arXiv:1910.12903; Lukas et al., "Deep Neural Network Fingerprinting by
Conferrable Adversarial Examples", ICLR 2021, arXiv:1912.00888.

Nothing is trained. From an example of class i, with j the class that its scores z hold least likely,

    minimise over x   max(z_i - z_j + k, 0) + max(max_{t != i, j} z_t - z_i, 0),

so that x lies between i and j, on the side of j by k, and far from the rest. The matching rate of a suspect
is the share of points to which it gives the class that the owner's network gives.

Conferrable points go over to copies and not to other networks: with `copies` that the owner makes (distilled,
fine-tuned) and `others` trained without it, and p_j their softmax outputs,

    ... - weight (mean over copies of p_j - mean over others of p_j)

is added. Judge on networks that had no part in that.

Differs from the papers: points that do not get to the other side stay among the fingerprints (the owner's own
class counts, whatever it is, so its matching rate is 1); the conferrable loss is added to IPGuard's and no
dropout is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.progress import steps as progress
from netweight.core.task import Data, outputs
from netweight.core.victim import class_scores, evaluated, victim


def boundary_fingerprint(
    model: nn.Module,
    data: Data,
    *,
    margin: float = 1.0,
    steps: int = 200,
    rate: float = 0.02,
    copies: Sequence[nn.Module] = (),
    others: Sequence[nn.Module] = (),
    weight: float = 1.0,
) -> Data:
    """One point for each example, `b *in` within the valid range, with the owner's class of each.

    margin: k, in units of scores. rate: of Adam, as a share of the valid range. Raises `DoesNotFit` for
    inputs that are whole numbers or outputs other than `b classes` of three classes or more.
    """
    if steps < 1 or not (margin >= 0 and rate > 0):
        raise BadInput(f"steps={steps}, margin={margin}, rate={rate}: give one step, 0 and above 0 at least")
    span = 1.0 if data.low is None or data.high is None else data.high - data.low
    with ExitStack() as modes, victim(model, data.x, None, "boundary-fingerprint") as v:
        if v.clean.shape[1] < 3:
            raise DoesNotFit(f"points between two classes of {v.clean.shape[1]}: give a network of three")
        for net in (*copies, *others):
            modes.enter_context(evaluated(net))
        i, j = v.of, v.clean.argmin(1)
        x = v.x.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], rate * span)
        for _ in progress(range(steps), "Fingerprints"):
            loss = between(v.scores(x), i, j, margin)
            if copies or others:
                loss = loss - weight * (share(copies, x, j) - share(others, x, j))
            (x.grad,) = torch.autograd.grad(loss.sum(), x)
            optimizer.step()
            with torch.no_grad():
                x.clamp_(data.low, data.high)
        points = Data(x.detach().cpu(), None, data.batch, "fingerprints", (), data.low, data.high)
        return Data(points.x, outputs(model, points).argmax(1), data.batch, "fingerprints", data.classes,
                    data.low, data.high)  # fmt: skip


def between(
    z: Float[Tensor, "b classes"], i: Int64[Tensor, " b"], j: Int64[Tensor, " b"], margin: float
) -> Float[Tensor, " b"]:
    """What is minimised, for each point."""
    own, target = (z.gather(1, which[:, None])[:, 0] for which in (i, j))
    others = z.scatter(1, torch.stack([i, j], 1), -torch.inf).amax(1)
    return F.relu(own - target + margin) + F.relu(others - own)


def share(nets: Sequence[nn.Module], x: Tensor, j: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The mean probability of class j; 0 without networks."""
    found = [class_scores(net(x)).softmax(1).gather(1, j[:, None])[:, 0] for net in nets]
    return torch.stack(found).mean(0) if found else torch.zeros(len(x), device=x.device)


def matching(model: nn.Module, fingerprints: Data) -> float:
    """The share of fingerprints that a suspect answers as the owner's network."""
    if fingerprints.y is None:
        raise BadInput(f"{fingerprints.name}: fingerprints come with the owner's classes; give those too")
    return float((outputs(model, fingerprints).argmax(1) == fingerprints.y).float().mean())


def area(copies: Sequence[float], others: Sequence[float]) -> float:
    """The chance that a copy matches better than another network, ties counting half: the area under ROC."""
    if not (copies and others):
        raise BadInput(f"{len(copies)} copies and {len(others)} others: at least one of each is needed")
    a, b = torch.tensor([*copies])[:, None], torch.tensor([*others])[None]
    return float(((a > b).double() + 0.5 * (a == b).double()).mean())
