"""GD-UAP: one perturbation for all inputs, made without any data, that changes most predictions.

Paper: Mopuri, Ganeshan and Babu, "Generalizable Data-free Objective for Crafting Universal Adversarial
Perturbations", TPAMI 2018, arXiv:1801.08092.

    maximise over |d|_inf <= xi    sum_i log( |l_i(background + d)|^2 / 2 )

l_i is the value behind the nonlinearity that follows the i-th convolution (`core.activations`), of the whole
batch. Priors, what the background is:

    none     the mean image alone
    range    pixels drawn around the mean, 95 % of them valid, flipped, turned, scaled and blurred
    data     images without labels

Adam, clipped after each step. Where more than half of d is at +-xi and that share stands still, d cannot move
although there is a gradient: d becomes d / 2. `CHECK` steps after the last check, if d is about to be halved,
else after twice as many, the share of predictions that d changes is measured on substitute images (drawn as
the range prior, or the data prior's own), and the best d is kept.

Differs from the paper: a step is `RATE` xi (there xi / 100 and 40,000 steps; it saturates within a few here);
at the end the last d before a halving is measured as well; range images are drawn anew in every step,
reflected at their edges, and blurred in proportion to their side (a blur for 224 pixels leaves no noise in
32); parallel convolutions count each by itself, not joined; a network without convolutions is judged by its
linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from netweight.core.activations import energy
from netweight.core.errors import BadInput, DoesNotFit, unknown
from netweight.core.perturbation import Found, Linf, Perturbation
from netweight.core.progress import steps as progress
from netweight.core.victim import class_scores, device_of, evaluated, victim
from netweight.nn.normalize import Normalize

PRIORS = ("none", "range", "data")
RATE = 2.5  # of xi
CHECK, CHECKS = 200, 10  # steps between checks; checks without gain after which it ends
SATURATED, STILL = 0.5, 1e-5
BATCH, SUBSTITUTES = 16, 200
FLIP = TURN = SCALE = BLUR = 0.5  # chances
TURNS, SCALES, KERNELS = (3, 5, 7, 10), (0.75, 1.5), (3, 5, 7, 9)  # degrees, factors, pixels
SIDE = 224  # of the paper's images, whose blur has a deviation of one pixel


def gd_uap(
    model: nn.Module,
    x: Num[Tensor, "b ..."],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    prior: str = "none",
    steps: int = 300,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """x with one and the same change, cut to the valid range; hit: where the class is not y's.

    y: class numbers; None stands for the network's own predictions, so that hits are the paper's fooling
    rate. x is looked at by the prior "data" alone. restarts: of the changes made, the one that changes most
    predictions on substitutes. Raises `DoesNotFit` for other sets than linf and as `attacks.pgd` does.
    """
    if not isinstance(within, Linf):
        raise DoesNotFit(f"gd-uap makes a change for all inputs within linf, not within {within}; give linf")
    with victim(model, x, y, "gd-uap") as v:
        images = v.x if prior == "data" else None
        tried = [
            universal(model, v.x[:1], within, prior=prior, images=images, steps=steps, seed=seed + number)
            for number in range(max(restarts, 1))
        ]
        d = max(tried, key=lambda one: -1.0 if math.isnan(one.changed) else one.changed).d
        points = within.project(v.x + d, v.x)
        with torch.no_grad():
            wrong = [
                v.scores(some).argmax(1) != of
                for some, of in zip(points.split(BATCH * 8), v.of.split(BATCH * 8))
            ]
        return Found(points, torch.cat(wrong))


@dataclass(frozen=True)
class Universal:
    """One change for all inputs.

    d: `1 *in`, no number of it above xi. changed: of substitute images, see `changed`; NaN without any.
    checks: (step, that) at each check. saturated: the share of d at +-xi.
    """

    d: Tensor
    changed: float
    checks: tuple[tuple[int, float], ...]
    saturated: float


def universal(
    model: nn.Module,
    like: Float[Tensor, "1 ..."],
    within: Linf,
    *,
    prior: str = "none",
    images: Float[Tensor, "k ..."] | None = None,
    steps: int = 300,
    seed: int = 0,
) -> Universal:
    """A change that drives the activations of a network up, whatever its outputs are.

    like: one input, for shape, dtype and place; its values are not looked at. images: for the prior "data".
    Raises `BadInput` for another prior, and for one whose images or valid range are not given.
    """
    if prior not in PRIORS:
        raise unknown("prior", prior, PRIORS)
    if prior == "data" and images is None:
        raise BadInput("the prior data needs images; give some, or another prior")
    generator = torch.Generator().manual_seed(seed)
    like = like.to(device_of(model, like))
    mean = center(model, like, within)
    drawn = _drawing(mean, within)
    if prior == "range" and drawn is None:
        raise BadInput(f"the prior range needs the valid range of the data, but {within} has none; give it")
    if images is not None:
        images = images.to(like)

    def background() -> Tensor:
        if prior == "none":
            return mean
        if prior == "range" and drawn is not None:
            return varied(drawn(BATCH, generator), generator)
        assert images is not None
        return images[torch.randint(len(images), (BATCH,), generator=generator).to(images.device)]

    held = images[:SUBSTITUTES] if images is not None else drawn and drawn(SUBSTITUTES, generator)
    with evaluated(model):
        return _climb(model, background, held, within, like, (steps, generator))


def _climb(
    model: nn.Module,
    background: Callable[[], Tensor],
    held: Tensor | None,
    within: Linf,
    like: Tensor,
    how: tuple[int, torch.Generator],
) -> Universal:
    """The ascent: how is (steps, source of chance)."""
    ball, zero = Linf(within.eps), torch.zeros_like(like)
    edge = ball.project(zero + 2 * within.eps, zero)  # the largest number inside
    d = ball.sample(zero, how[1]).requires_grad_()
    optimizer = torch.optim.Adam([d], lr=RATE * within.eps)
    full, share, last = d.detach().clone(), 0.0, 0
    best, checks = (full, math.nan), []
    poor = 0
    for step in progress(range(1, how[0] + 1), "Making one change for all inputs"):
        (d.grad,) = torch.autograd.grad(-objective(energy(model, background() + d)), d)
        optimizer.step()
        with torch.no_grad():
            d.copy_(ball.project(d, zero))
            before, share = share, float((d.abs() >= edge).float().mean())
            stuck = share > SATURATED and abs(share - before) < STILL
            if stuck or step == how[0]:
                full = d.detach().clone()
            if held is not None and step - last >= CHECK * (1 if stuck else 2):
                last, rate = step, changed(model, held, ball_moved(held, d, within))
                checks.append((step, rate))
                poor = 0 if not rate <= best[1] else poor + 1
                best = (d.detach().clone(), rate) if poor == 0 else best
                if poor == CHECKS:
                    break
            if stuck:
                d.mul_(0.5)
    if held is None:
        best = (full, math.nan)
    elif not (rate := changed(model, held, ball_moved(held, full, within))) <= best[1]:
        best = (full, rate)
    return Universal(*best, tuple(checks), float((best[0].abs() >= edge).float().mean()))


def objective(energies: Float[Tensor, " layers"]) -> Float[Tensor, ""]:
    """sum_i log( |l_i|^2 / 2 ): a product, so that no layer counts for more than another."""
    return energies.clamp(min=torch.finfo(energies.dtype).tiny).log().sum()


def ball_moved(x: Float[Tensor, "k ..."], d: Float[Tensor, "1 ..."], within: Linf) -> Tensor:
    """x + d, cut to the valid range."""
    return within.project(x + d, x)


@torch.no_grad()
def changed(model: nn.Module, x: Float[Tensor, "k ..."], s: Float[Tensor, "k ..."]) -> float:
    """How far s changes what the network gives for x.

    The share of predictions that change, where it gives `b classes`; else |f(s) - f(x)| / |f(x)|, Euclidean.
    """
    with evaluated(model):
        pairs = zip(x.split(8 * BATCH), s.split(8 * BATCH))
        two = [(class_scores(model(a)), class_scores(model(b))) for a, b in pairs]
    clean, moved = (torch.cat([one[i] for one in two]) for i in (0, 1))
    if clean.ndim == 2 and clean.shape[1] > 1:
        return float((clean.argmax(1) != moved.argmax(1)).float().mean())
    return float((moved - clean).norm() / clean.norm())


# Backgrounds ------------------------------------------------------------------------------------------------


def center(model: nn.Module, like: Float[Tensor, "1 ..."], within: Linf) -> Tensor:
    """The mean image: what layer 0 subtracts, else the middle of the valid range, else 0."""
    for module in model.modules():
        if isinstance(module, Normalize) and like.ndim >= 3:
            return module.mean.to(like).expand(like.shape[1:])[None].clone()
    if within.low is None or within.high is None:
        return torch.zeros_like(like)
    return torch.full_like(like, (within.low + within.high) / 2)


def _drawing(mean: Tensor, within: Linf) -> Callable[[int, torch.Generator], Tensor] | None:
    """Draws range images: Gaussian around the mean, two standard deviations to the nearer end; clipped."""
    low, high = within.low, within.high
    if low is None or high is None:
        return None
    std = torch.minimum(mean - low, high - mean).clamp(min=0) / 2

    def draw(count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, *mean.shape[1:], generator=generator).to(mean)
        return (mean + std * noise).clamp(low, high)

    return draw


def varied(x: Float[Tensor, "k ..."], generator: torch.Generator) -> Tensor:
    """Images `k c h w` flipped, turned, scaled, blurred, each with its chance; other inputs as they are."""
    if x.ndim != 4:
        return x

    def chance(share: float) -> Tensor:
        return torch.rand(len(x), generator=generator) < share

    def among(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (len(x),), generator=generator)]

    turn = among(TURNS) * (1 - 2 * chance(0.5).int()) * chance(TURN) * (math.pi / 180)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(len(x), generator=generator)
    scale, flip = torch.where(chance(SCALE), scale, 1.0), 1.0 - 2.0 * chance(FLIP)
    cos, sin, zero = turn.cos() / scale, turn.sin() / scale, torch.zeros(len(x))
    places = torch.stack([cos * flip, -sin, zero, sin * flip, cos, zero], 1).reshape(-1, 2, 3).to(x)
    grid = F.affine_grid(places, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    width = min(int(among(KERNELS)[0]), *(side - (side + 1) % 2 for side in x.shape[2:]))
    blurred = chance(BLUR).to(x.device)
    return torch.where(blurred[:, None, None, None], _blurred(x, width), x)


def _blurred(x: Float[Tensor, "k c h w"], width: int) -> Tensor:
    """A Gaussian whose standard deviation is the side / `SIDE` in pixels, cut to this many of them."""
    places = (torch.arange(width) - width // 2) * (SIDE / min(x.shape[2:]))
    kernel = (-0.5 * places**2).exp()
    kernel = (kernel / kernel.sum()).to(x)
    half, channels = width // 2, x.shape[1]
    x = F.pad(x, (half, half, half, half), mode="reflect")
    x = F.conv2d(x, kernel.expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, kernel[:, None].expand(channels, 1, -1, -1), groups=channels)
