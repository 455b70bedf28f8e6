"""FGSM: one step along the steepest direction of the loss.

Paper: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv:1412.6572.

    s = project_S(x)( x + argmax over |d| <= eps of <d, grad l(x)> ),        l = cross-entropy of the class.

After the first, restarts step from random points of the set (Wong et al. 2020, arXiv:2001.03994).
Differs from the paper: any of the sets Linf, L2, L1 and boxes, not Linf alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from netweight.core.ascent import around_inputs, slope
from netweight.core.perturbation import Found, Perturbation
from netweight.core.victim import victim


def fgsm(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """The point one step away from each x, and whether it is wrong; an x that is wrong already stays.

    y: class numbers; None stands for the network's own predictions. restarts: the first from x itself, the
    others from random points. Raises `DoesNotFit` as `attacks.pgd` does.
    """
    within = around_inputs(within)
    generator = torch.Generator().manual_seed(seed)
    with victim(model, x, y, "fgsm") as v:
        points = within.project(v.x, v.x)
        hit = v.wrong(points, torch.arange(len(points), device=v.x.device))
        for restart in range(restarts):
            rows = (~hit).nonzero()[:, 0]
            if len(rows) == 0:
                break
            s = v.x[rows] if restart == 0 else within.sample(v.x, generator)[rows]
            s = s.detach().requires_grad_()
            loss = F.cross_entropy(v.scores(s), v.of[rows], reduction="none")
            step = within.steepest(slope(loss, s), v.x[rows])
            points[rows] = within.project(s.detach() + step, v.x[rows])
            hit[rows] = v.wrong(points[rows], rows)
        return Found(points, hit)
