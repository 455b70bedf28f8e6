"""Projected gradient ascent, and the slope it climbs: what attacks share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import L1, L2, Box, Found, Linf, Perturbation

BETAS, TINY = (0.9, 0.999), 1e-8  # of Adam


def ascend(
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Float[Tensor, "b *in"],
    within: Perturbation,
    *,
    steps: int,
    restarts: int,
    seed: int,
) -> Found:
    """Projected gradient ascent: points of the set around x with a high score.

    score: (points `b *in`, their rows in x) -> (value `b`, reached `b` bool), differentiable in the points.
    It starts at x, then `restarts` times at a random point of the set; steps shrink from eps to 0 as a half
    cosine. What has reached leaves the batch; elsewhere the best point seen is kept.
    """
    within = around_inputs(within)
    generator, project = torch.Generator().manual_seed(seed), projection(within, x)
    points = project(x)
    best, hit = (value.detach() for value in score(points, torch.arange(len(x), device=x.device)))
    for _ in range(restarts):
        rows = (~hit).nonzero()[:, 0]
        if len(rows) == 0:
            break
        s = within.sample(x, generator)[rows]
        for step in range(steps + 1):
            s = s.detach().requires_grad_()
            value, reached = score(s, rows)
            gradient = slope(value, s)
            s, value = s.detach(), value.detach()
            better = reached | (value > best[rows])
            points[rows[better]], best[rows[better]], hit[rows] = s[better], value[better], reached
            rows, s, gradient = rows[~reached], s[~reached], gradient[~reached]
            if len(rows) == 0:
                break
            size = 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
            s = project(s + size * within.steepest(gradient, x[rows]), rows)
    return Found(points, hit)


def projection(within: Perturbation, x: Float[Tensor, "b *in"]) -> Callable[..., Tensor]:
    """`within.project` for many points around the same x: (points, their rows in x, default all) -> points.

    The sides of a box are worked out once; the points are the same to the last bit.
    """
    if not isinstance(within, Linf | Box):
        return lambda s, rows=slice(None): within.project(s, x[rows])
    lower, upper = (within.project(torch.full_like(x, far), x) for far in (-torch.inf, torch.inf))
    return lambda s, rows=slice(None): torch.clamp(s, lower[rows], upper[rows])


def slope(
    value: Float[Tensor, " b"], s: Float[Tensor, "b *in"], *, keep: bool = False
) -> Float[Tensor, "b *in"]:
    """The gradient of each value by its own point; what is no number counts as 0.

    keep: another value of the same pass is asked for next.
    Raises `DoesNotFit` where the network passes no gradients on.
    """
    if not value.requires_grad:
        raise DoesNotFit(
            "this attack follows gradients, but the network passes none on to its inputs; "
            "use one that needs none: square (scores) or hop-skip-jump (classes)"
        )
    return torch.autograd.grad(value.sum(), s, retain_graph=keep)[0].nan_to_num(0.0)


def adam(
    gradient: Float[Tensor, "b *in"],
    first: Float[Tensor, "b *in"],
    second: Float[Tensor, "b *in"],
    step: int,
) -> tuple[Float[Tensor, "b *in"], Float[Tensor, "b *in"], Float[Tensor, "b *in"]]:
    """(Adam's step at a rate of 1, the two moments) of step 1, 2, ..; moments begin at 0.

    Kingma and Ba, ICLR 2015, arXiv:1412.6980, Algorithm 1. Written out because examples leave a search, and
    their moments with them.
    """
    first = BETAS[0] * first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
    scale = (second / (1 - BETAS[1] ** step)).sqrt() + TINY
    return first / (1 - BETAS[0] ** step) / scale, first, second


def around_inputs(within: Perturbation) -> Linf | L2 | L1 | Box:
    """The set itself, if it is one around inputs. Raises `DoesNotFit` for sets of weights, bits and edges."""
    if not isinstance(within, Linf | L2 | L1 | Box):
        raise DoesNotFit(f"{within} is no set of inputs; give one of linf, l2, l1 to search around an input")
    return within


def per_example(value: Shaped[Tensor, " b"], s: Float[Tensor, "b *in"]) -> Shaped[Tensor, "b ..."]:
    """One number for each example, in a shape that multiplies s."""
    return value.reshape(-1, *[1] * (s.ndim - 1))
