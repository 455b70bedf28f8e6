"""DeepFool: the shortest way to another class, if the network were linear, again and again.

Paper: Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural networks",
CVPR 2016, arXiv:1511.04599 (Algorithm 2; other norms: section 3.3).

With f_k = z_k - z_y and w_k = grad f_k at s, for every other class k, and 1/p + 1/q = 1:

    l = argmin_k |f_k| / |w_k|_q,       s <- s + 1.02 |f_l| / |w_l|_q  argmax over |d|_p <= 1 of <d, w_l>.

It stops where the class is left. A point outside the set counts as found only if its projection is wrong too.

Differs from the paper: only the `CLASSES` best other classes are looked at; coordinates at the end of their
range do not move; the overshoot is part of each step.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from netweight.core.ascent import around_inputs, per_example, slope
from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import Box, Found, Perturbation
from netweight.core.victim import Victim, other_classes, victim

CLASSES = 9
OVERSHOOT = 1.02


def deepfool(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A wrong point near each x where one lies in the set, else the point of the set where it ended.

    y: class numbers; None stands for the network's own predictions. restarts: the first begins at x, the
    others at random points of the set. Raises `DoesNotFit` as `attacks.pgd` does, and for boxes, which have
    no shortest way.
    """
    within = around_inputs(within)
    if isinstance(within, Box):
        raise DoesNotFit("deepfool looks for the shortest way, and a box has none; give linf, l2 or l1")
    generator = torch.Generator().manual_seed(seed)
    with victim(model, x, y, "deepfool") as v:
        points = within.project(v.x, v.x)
        hit = v.clean.argmax(1) != v.of
        for restart in range(restarts):
            rows = (~hit).nonzero()[:, 0]
            if len(rows) == 0:
                break
            s = v.x[rows] if restart == 0 else within.sample(v.x, generator)[rows]
            open_ = torch.arange(len(rows), device=s.device)
            for _ in range(steps):
                step, wrong = _step(v, s[open_], rows[open_], within.norm, (within.low, within.high))
                s[open_[~wrong]] += step[~wrong]
                open_ = open_[~wrong]
                if len(open_) == 0:
                    break
            points[rows] = within.project(s, v.x[rows])
            hit[rows] = v.wrong(points[rows], rows)
        return Found(points, hit)


def _step(
    v: Victim,
    s: Float[Tensor, "k *in"],
    rows: Int[Tensor, " k"],
    norm: float,
    valid: tuple[float | None, float | None],
) -> tuple[Float[Tensor, "k *in"], Tensor]:
    """The step to the nearest of the other classes, and which points need none because they are wrong."""
    s = s.detach().requires_grad_()
    scores = v.scores(s)
    wrong = scores.detach().argmax(1) != v.of[rows]
    own = scores.gather(1, v.of[rows, None])[:, 0]
    nearest = torch.full_like(own, math.inf)
    step = torch.zeros_like(s)
    for other in other_classes(scores.detach(), v.of[rows], CLASSES):
        gap = scores.gather(1, other[:, None])[:, 0] - own
        w = _movable(slope(gap, s, keep=True), s.detach(), valid)
        far, way = _shortest(gap.detach(), w, norm)
        closer = far < nearest
        nearest, step = torch.where(closer, far, nearest), torch.where(per_example(closer, s), way, step)
    return step.detach(), wrong


def _movable(
    w: Float[Tensor, "k *in"], s: Float[Tensor, "k *in"], valid: tuple[float | None, float | None]
) -> Float[Tensor, "k *in"]:
    low, high = valid
    if low is not None:
        w = w.where((s > low) | (w > 0), 0)
    return w if high is None else w.where((s < high) | (w < 0), 0)


def _shortest(
    gap: Float[Tensor, " k"], w: Float[Tensor, "k *in"], norm: float
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k *in"]]:
    """How far the linear boundary lies, and the step across it."""
    flat = w.flatten(1)
    if norm == math.inf:
        length, way = flat.abs().sum(1), flat.sign()
    elif norm == 2:
        length = flat.norm(dim=1)
        way = flat / length.clamp(min=1e-12)[:, None]
    else:
        length, place = flat.abs().max(1)
        way = torch.zeros_like(flat).scatter(1, place[:, None], flat.gather(1, place[:, None]).sign())
    far = gap.abs() / length.clamp(min=1e-12)
    return far, (OVERSHOOT * (far + 1e-6)[:, None] * way).reshape(w.shape)
