"""APGD: projected gradient ascent that chooses its own step sizes.

Papers: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020, arXiv:2003.01690 (Algorithm 1, losses of section 4); for L1 their "Mind
the Box", ICML 2021, arXiv:2103.01208.

    z       = project_S(x)( s_k + a_k d_k ),        d_k = argmax over |d| <= 1 of <d, grad l(s_k)>
    s_(k+1) = project_S(x)( s_k + 3/4 (z - s_k) + 1/4 (s_k - s_(k-1)) )

a_0 = 2 eps. At the checkpoints w_j = ceil(p_j steps), p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1)
- 0.03, 0.06), an example goes back to its best point with half the step where the loss rose in fewer than 3/4
of the steps since the last checkpoint, or where neither step nor best loss changed since then. Losses, of
sorted scores z_(1) >= z_(2) >= ..:

    ce        cross-entropy
    dlr       -(z_y - max_(j != y) z_j) / (z_(1) - z_(3))
    targeted  -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)      for the `TARGETS` best wrong classes t in turn

In an L1 ball a step moves only the largest slopes, two thirds as many as the best point has changed so far;
it restarts from the best point with a_0 = eps whenever that became sparser.

Differs from the paper: wrong points leave the batch; with fewer classes than a loss needs its denominator is
left out; L1 balls within a range are projected onto by clipping and then thresholding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from netweight.core.ascent import around_inputs, per_example, slope
from netweight.core.errors import unknown
from netweight.core.perturbation import L1, L2, Box, Found, Linf, Perturbation
from netweight.core.victim import Victim, margin, other_classes, victim

LOSSES = ("ce", "dlr", "targeted")
TARGETS = 9
RISING = 0.75
Loss = Callable[[Tensor, Tensor], Tensor]  # (scores `k classes`, rows `k`) -> `k`


def apgd(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    loss: str = "dlr",
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A wrong point in the set around each x where one is found, else the one with the largest margin seen.

    y: class numbers; None stands for the network's own predictions. loss: "ce", "dlr" or "targeted". An x
    that is wrong already is its own point. Raises `DoesNotFit` as `attacks.pgd` does, `BadInput` for other
    losses.
    """
    within = around_inputs(within)
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    generator = torch.Generator().manual_seed(seed)
    with victim(model, x, y, "apgd") as v:
        points = within.project(v.x, v.x)
        best, hit = margin(v.clean, v.of), v.clean.argmax(1) != v.of
        for climbed in _losses(loss, v) * restarts:
            rows = (~hit).nonzero()[:, 0]
            if len(rows) == 0:
                break
            s, reached = _climb(v, climbed, rows, within.sample(v.x, generator)[rows], within, steps)
            with torch.no_grad():
                value = margin(v.scores(s), v.of[rows])
            better = reached | (value > best[rows])
            points[rows[better]], best[rows[better]], hit[rows] = s[better], value[better], reached
        return Found(points, hit)


def _losses(loss: str, v: Victim) -> list[Loss]:
    if loss == "ce":
        return [lambda scores, rows: F.cross_entropy(scores, v.of[rows], reduction="none")]
    if loss == "dlr":
        return [lambda scores, rows: dlr(scores, v.of[rows])]
    targets = other_classes(v.clean, v.of, TARGETS)
    return [lambda scores, rows, t=t: targeted_dlr(scores, v.of[rows], t[rows]) for t in targets]


def dlr(scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Difference of logits ratio: above 0 where y's class is left; unchanged by scale and shift."""
    ranked = scores.sort(1, descending=True).values
    return margin(scores, y) / (_spread(ranked[:, 0] - ranked[:, 2]) if scores.shape[1] > 2 else 1)


def targeted_dlr(
    scores: Float[Tensor, "b classes"], y: Int[Tensor, " b"], target: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """The same towards one class."""
    ranked = scores.sort(1, descending=True).values
    lead = (scores.gather(1, target[:, None]) - scores.gather(1, y[:, None]))[:, 0]
    if scores.shape[1] < 4:
        return lead
    return lead / _spread(ranked[:, 0] - 0.5 * (ranked[:, 2] + ranked[:, 3]))


def _spread(gap: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    return gap + 1e-12


@dataclass
class Run:
    """Where each example that is not yet wrong stands; the first axis of every tensor counts them.

    at: its row in what was asked for. s, last: the point and the one before. slope: at s. size: the step in
    eps. top*: the best point so far with its loss and slope. rises: steps since the checkpoint in which the
    loss rose. before*: step and best loss at the checkpoint. share: of coordinates a step moves (L1).
    """

    at: Int[Tensor, " k"]
    s: Float[Tensor, "k *in"]
    last: Float[Tensor, "k *in"]
    value: Float[Tensor, " k"]
    slope: Float[Tensor, "k *in"]
    top: Float[Tensor, "k *in"]
    top_value: Float[Tensor, " k"]
    top_slope: Float[Tensor, "k *in"]
    size: Float[Tensor, " k"]
    rises: Float[Tensor, " k"]
    before_size: Float[Tensor, " k"]
    before_value: Float[Tensor, " k"]
    share: Float[Tensor, " k"]

    def keep(self, mask: Bool[Tensor, " k"]) -> None:
        """Drop the others."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[mask])

    def back(self, mask: Bool[Tensor, " k"]) -> None:
        """Return to the best point."""
        self.s[mask], self.last[mask] = self.top[mask], self.top[mask]
        self.value[mask], self.slope[mask] = self.top_value[mask], self.top_slope[mask]


def _climb(
    v: Victim,
    loss: Loss,
    rows: Int[Tensor, " k"],
    start: Float[Tensor, "k *in"],
    within: Linf | L2 | L1 | Box,
    steps: int,
) -> tuple[Float[Tensor, "k *in"], Bool[Tensor, " k"]]:
    """One run for these rows: the best point of each, and whether it is wrong."""
    points, reached = start.clone(), torch.zeros(len(rows), dtype=torch.bool, device=start.device)

    def look(s: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = s.detach().requires_grad_()
        scores = v.scores(s)
        value = loss(scores, rows[at])
        return value.detach(), slope(value, s), scores.detach().argmax(1) != v.of[rows[at]]

    def leave(run: Run, wrong: Tensor) -> None:
        points[run.at[wrong]], reached[run.at[wrong]] = run.s[wrong], True
        run.keep(~wrong)

    value, gradient, wrong = look(start, at := torch.arange(len(rows), device=start.device))
    size = torch.full_like(value, 1.0 if isinstance(within, L1) else 2.0)
    run = Run(
        at, start.clone(), start.clone(), value, gradient, start.clone(), value.clone(), gradient.clone(),
        size, torch.zeros_like(value), size.clone(), value.clone(), torch.full_like(value, 0.2),
    )  # fmt: skip
    leave(run, wrong)
    checks, since = checkpoints(steps, sparse=isinstance(within, L1)), 0
    for step in range(1, steps + 1):
        if len(run.at) == 0:
            break
        run.s, run.last = _moved(run, v.x[rows[run.at]], within, inertia=step > 1), run.s
        value, run.slope, wrong = look(run.s, run.at)
        run.rises += value > run.value
        run.value = value
        higher = value > run.top_value
        run.top[higher], run.top_slope[higher] = run.s[higher], run.slope[higher]
        run.top_value = value.maximum(run.top_value)
        leave(run, wrong)
        if step in checks and len(run.at):
            _checked(run, v.x[rows[run.at]], within, step - since)
            since = step
    points[run.at] = run.top
    return points, reached


def _moved(
    run: Run, x: Float[Tensor, "k *in"], within: Linf | L2 | L1 | Box, *, inertia: bool
) -> Float[Tensor, "k *in"]:
    size = per_example(run.size, x)
    d = sparse(run.slope, run.share, within.eps) if isinstance(within, L1) else within.steepest(run.slope, x)
    z = within.project(run.s + size * d, x)
    if not inertia or isinstance(within, L1):
        return z
    return within.project(run.s + 0.75 * (z - run.s) + 0.25 * (run.s - run.last), x)


def sparse(
    gradient: Float[Tensor, "k *in"], share: Float[Tensor, " k"], eps: float
) -> Float[Tensor, "k *in"]:
    """A step of L1 length eps, in equal parts on this share of the coordinates, of the largest slopes."""
    flat = gradient.reshape(len(gradient), -1)
    ranked = flat.abs().sort(1, descending=True).values
    count = (share * flat.shape[1]).long().clamp(1, flat.shape[1])
    signs = flat.sign() * (flat.abs() >= ranked.gather(1, count[:, None] - 1))
    return (eps * signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).reshape(gradient.shape)


def _checked(run: Run, x: Float[Tensor, "k *in"], within: Linf | L2 | L1 | Box, since: int) -> None:
    """Halve steps and go back where it no longer climbs."""
    if isinstance(within, L1):
        share = ((run.top != x).flatten(1).float().mean(1) / 1.5).clamp(min=1 / x[0].numel())
        sparser = share < 0.95 * run.share
        run.size = torch.where(sparser, 1.0, (run.size / 1.5).clamp(min=0.1))
        run.share = share
        run.back(sparser)
        return
    stuck = (run.size == run.before_size) & (run.top_value == run.before_value)
    halved = (run.rises < RISING * since) | stuck
    run.before_size, run.before_value = run.size.clone(), run.top_value.clone()
    run.size = torch.where(halved, 0.5 * run.size, run.size)
    run.rises = torch.zeros_like(run.rises)
    run.back(halved)


def checkpoints(steps: int, *, sparse: bool = False) -> set[int]:
    """The steps after which step sizes are reconsidered; sparse: those of L1, every 25th part."""
    if sparse:
        every = max(int(0.04 * steps), 1)
        return set(range(every, steps + 1, every))
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:]}
