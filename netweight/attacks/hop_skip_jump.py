"""HopSkipJump: walks along the boundary to the input, seeing nothing but the class of each point.

Paper: Chen et al., "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", IEEE S&P 2020,
arXiv:1904.02144 (Algorithm 2). phi(s) = 1 where s is wrong, else -1; d numbers an input; t = 1, 2, ..:

    s_t    = the boundary between x and the last point, by bisection to theta of the way
    v_t    = mean over B of (phi(s_t + delta u_b) - mean phi) u_b,    u_b random of length 1, B = 100 sqrt(t)
    next   = s_t + xi v_t / |v_t|_2 (Linf: sign v_t),  xi = |s_t - x|_p / sqrt(t), halved
                                               until wrong

theta = d^(-3/2), delta = sqrt(d) theta |s_t - x|_2 (Linf: d^-2, d theta |s_t - x|_inf); delta is 0.1 in the
first round. It begins at the nearest other input of the batch that is wrong for x, else at random points.

Differs from the paper: it stops where a wrong point lies in the set; L1 balls walk as L2 does.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from netweight.core.ascent import around_inputs, per_example
from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import L1, L2, Box, Found, Linf, Perturbation
from netweight.core.victim import Victim, victim

SAMPLES = 100
TRIALS = 100
Ball = Linf | L2 | L1


def hop_skip_jump(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A wrong point in the set around each x where one is found, else the point of the set nearest the last.

    steps: rounds, each of 100 sqrt(round) queries and some 30 more. y: class numbers; None stands for the
    network's own predictions. Raises `DoesNotFit` as `attacks.pgd` does, and for boxes, which have no
    distance.
    """
    within = around_inputs(within)
    if isinstance(within, Box):
        raise DoesNotFit("hop-skip-jump shortens a distance, and a box has none; give linf, l2 or l1")
    generator = torch.Generator().manual_seed(seed)
    with victim(model, x, y, "hop-skip-jump") as v, torch.no_grad():
        points = within.project(v.x, v.x)
        hit = v.clean.argmax(1) != v.of
        for _ in range(restarts):
            s, started = _start(v, within, (~hit).nonzero()[:, 0], generator)
            rows = started
            for t in range(1, steps + 1):
                if len(rows) == 0:
                    break
                s = _bisect(v, s, rows, within)
                points[rows] = within.project(s, v.x[rows])
                hit[rows] = v.wrong(points[rows], rows)
                s, rows = s[~hit[rows]], rows[~hit[rows]]
                if len(rows):
                    s = _jump(v, s, rows, within, _direction(v, s, rows, within, t, generator), t)
        return Found(points, hit)


def _start(
    v: Victim, within: Ball, rows: Int[Tensor, " k"], generator: torch.Generator
) -> tuple[Float[Tensor, "j *in"], Int[Tensor, " j"]]:
    """A wrong point for each row, and the rows for which one was found."""
    classes = v.clean.argmax(1)
    s, found = v.x[rows].clone(), torch.zeros(len(rows), dtype=torch.bool, device=v.x.device)
    for at, row in enumerate(rows.tolist()):
        other = (classes != v.of[row]).nonzero()[:, 0]
        if len(other):
            far = torch.linalg.vector_norm((v.x[other] - v.x[row]).flatten(1), within.norm, dim=1)
            s[at], found[at] = v.x[other[far.argmin()]], True
    low = within.low if within.low is not None else float(v.x.min())
    high = within.high if within.high is not None else float(v.x.max())
    for _ in range(TRIALS):
        at = (~found).nonzero()[:, 0]
        if len(at) == 0:
            break
        noise = torch.rand((len(at), *v.x.shape[1:]), generator=generator).to(v.x)
        s[at] = low + (high - low) * noise
        found[at] = v.wrong(s[at], rows[at])
    return s[found], rows[found]


def _bisect(
    v: Victim, s: Float[Tensor, "k *in"], rows: Int[Tensor, " k"], within: Ball
) -> Float[Tensor, "k *in"]:
    """The last wrong point on the way from s to x: a blend (Linf: s clipped to a box around x)."""
    x, flat = v.x[rows], v.x[0].numel()
    theta = flat**-2.0 if isinstance(within, Linf) else flat**-1.5
    whole = (s - x).flatten(1).abs().amax(1)
    right, wrong_at = torch.zeros(len(s), device=s.device), torch.ones(len(s), device=s.device)

    def at(share: Tensor) -> Tensor:
        if isinstance(within, Linf):
            reach = per_example(share * whole, s)
            return torch.maximum(torch.minimum(s, x + reach), x - reach)
        return x + per_example(share, s) * (s - x)

    for _ in range(min(24, math.ceil(-math.log2(theta)))):
        middle = 0.5 * (right + wrong_at)
        wrong = v.wrong(at(middle), rows)
        right, wrong_at = torch.where(wrong, right, middle), torch.where(wrong, middle, wrong_at)
    return torch.where(per_example(wrong_at < 1, s), at(wrong_at), s)


def _direction(
    v: Victim,
    s: Float[Tensor, "k *in"],
    rows: Int[Tensor, " k"],
    within: Ball,
    t: int,
    generator: torch.Generator,
) -> Float[Tensor, "k *in"]:
    """v_t, of length 1 (Linf: its signs)."""
    change, flat = (s - v.x[rows]).flatten(1), s[0].numel()
    if t == 1:
        delta = torch.full((len(s),), 0.1, device=s.device)
    elif isinstance(within, Linf):
        delta = change.abs().amax(1) / flat
    else:
        delta = change.norm(dim=1) / flat
    total, weighted, signs = torch.zeros_like(s), torch.zeros_like(s), torch.zeros(len(s), device=s.device)
    count = int(SAMPLES * math.sqrt(t))
    for _ in range(count):
        u = torch.randn(s.shape, generator=generator).to(s)
        u = u / per_example(u.flatten(1).norm(dim=1), s)
        tried = _valid(s + per_example(delta, s) * u, within)
        u = (tried - s) / per_example(delta.clamp(min=1e-30), s)
        phi = 2.0 * v.wrong(tried, rows) - 1
        total, weighted, signs = total + u, weighted + per_example(phi, s) * u, signs + phi
    mean = signs / count
    way = torch.where(
        per_example(mean.abs() == 1, s), per_example(mean, s) * total, weighted - per_example(mean, s) * total
    )
    return (
        way.sign()
        if isinstance(within, Linf)
        else way / per_example(way.flatten(1).norm(dim=1).clamp(min=1e-30), s)
    )


def _jump(
    v: Victim,
    s: Float[Tensor, "k *in"],
    rows: Int[Tensor, " k"],
    within: Ball,
    way: Float[Tensor, "k *in"],
    t: int,
) -> Float[Tensor, "k *in"]:
    """The farthest wrong point along the way, by halving the step; s itself where none is wrong."""
    norm = math.inf if isinstance(within, Linf) else 2
    size = torch.linalg.vector_norm((s - v.x[rows]).flatten(1), norm, dim=1) / math.sqrt(t)
    moved, done = s.clone(), torch.zeros(len(s), dtype=torch.bool, device=s.device)
    for _ in range(20):
        at = (~done).nonzero()[:, 0]
        if len(at) == 0:
            break
        tried = _valid(s[at] + per_example(size[at], s) * way[at], within)
        wrong = v.wrong(tried, rows[at])
        moved[at[wrong]], done[at[wrong]] = tried[wrong], True
        size = 0.5 * size
    return moved


def _valid(s: Float[Tensor, "k *in"], within: Ball) -> Float[Tensor, "k *in"]:
    return s if within.low is None and within.high is None else s.clamp(within.low, within.high)
