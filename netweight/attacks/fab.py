"""FAB: along the boundary of a class, back towards the input with every step.

Paper: Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML
2020, arXiv:1907.02044 (Algorithm 1, targeted as in AutoAttack, arXiv:2003.01690).

With f = z_t - z_y for another class t, linear around s_k: H_k = {z : f(s_k) + <grad f(s_k), z - s_k> = 0},

    d = nearest_H(s_k) - s_k,        e = nearest_H(x) - x,        both within the range (`nearest`),
    a = min( |d| / (|d| + |e|), 0.1 ),
    s_(k+1) = (1 - a) (s_k + 1.05 d) + a (x + 1.05 e),        cut to the range,

and where s_(k+1) has left the class, it is kept if it is the nearest so far, and s_(k+1) <- x + 0.9 (s_(k+1)
- x). At last the boundary is looked for between x and the nearest by halving. `TARGETS` best other classes t
are tried in turn.

Differs from the paper: an example leaves as soon as a wrong point lies in the set; without a final search
by interpolated scores.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from netweight.core.ascent import around_inputs, per_example, slope
from netweight.core.errors import DoesNotFit
from netweight.core.perturbation import L1, L2, Box, Found, Linf, Perturbation
from netweight.core.victim import Victim, other_classes, victim

TARGETS = 9
OVERSHOOT, TOWARDS, BACK = 1.05, 0.1, 0.9  # eta, alpha_max, beta
HALVINGS = 3
SMALLEST = 1e-20  # a slope below counts as none


def fab(
    model: nn.Module,
    x: Num[Tensor, "b *in"],
    y: Int[Tensor, " b"] | None,
    within: Perturbation,
    *,
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """A wrong point near each x where one lies in the set, else the nearest wrong one, brought into the set.

    y: class numbers; None stands for the network's own predictions. restarts: the first begins at x, the
    others at random points of the set. Raises `DoesNotFit` as `attacks.pgd` does, and for boxes, which have
    no shortest way.
    """
    within = around_inputs(within)
    if isinstance(within, Box):
        raise DoesNotFit("fab looks for the shortest way, and a box has none; give linf, l2 or l1")
    generator = torch.Generator().manual_seed(seed)
    with victim(model, x, y, "fab") as v:
        points, hit = within.project(v.x, v.x), v.clean.argmax(1) != v.of
        for restart in range(restarts):
            for target in other_classes(v.clean, v.of, TARGETS):
                rows = (~hit).nonzero()[:, 0]
                if len(rows) == 0:
                    return Found(points, hit)
                start = v.x[rows] if restart == 0 else within.sample(v.x, generator)[rows]
                near = _follow(v, rows, target[rows], start, within, steps)
                points[rows] = within.project(near, v.x[rows])
                hit[rows] = v.wrong(points[rows], rows)
        return Found(points, hit)


def _follow(
    v: Victim,
    rows: Int[Tensor, " k"],
    target: Int[Tensor, " k"],
    start: Float[Tensor, "k *in"],
    within: Linf | L2 | L1,
    steps: int,
) -> Float[Tensor, "k *in"]:
    """The nearest wrong point of each row, or the last point where none was found."""
    best, far = start.clone(), torch.full((len(rows),), math.inf, device=start.device)
    open_, s = torch.arange(len(rows), device=start.device), start
    for _ in range(steps):
        x, own, to = v.x[rows[open_]], v.of[rows[open_], None], target[open_, None]
        s = s.detach().requires_grad_()
        scores = v.scores(s)
        lead = (scores.gather(1, to) - scores.gather(1, own))[:, 0]
        s = _stepped(s, x, lead, within)
        wrong = v.wrong(s, rows[open_])
        length = _length(s - x, within.norm)
        nearer = wrong & (length < far[open_])
        best[open_[nearer]], far[open_[nearer]] = s[nearer], length[nearer]
        best[open_[far[open_].isinf()]] = s[far[open_].isinf()]
        s = torch.where(per_example(wrong, s), x + BACK * (s - x), s)
        stay = far[open_] > within.eps
        open_, s = open_[stay], s[stay]
        if len(open_) == 0:
            break
    return _halved(v, rows, best, far)


def _stepped(
    s: Float[Tensor, "k *in"], x: Float[Tensor, "k *in"], lead: Float[Tensor, " k"], within: Linf | L2 | L1
) -> Float[Tensor, "k *in"]:
    """s_(k+1) of s_k; lead: f at s, which carries the gradient."""
    w = slope(lead, s)
    s, lead = s.detach(), lead.detach()
    at_x = lead + (w * (x - s)).flatten(1).sum(1)
    d, e = nearest(s, w, -lead, within), nearest(x, w, -at_x, within)
    long, short = _length(d, within.norm), _length(e, within.norm)
    share = per_example((long / (long + short).clamp(min=1e-12)).clamp(max=TOWARDS), s)
    moved = (1 - share) * (s + OVERSHOOT * d) + share * (x + OVERSHOOT * e)
    return moved.clamp(within.low, within.high) if _bounded(within) else moved


def nearest(
    s: Float[Tensor, "k *in"], w: Float[Tensor, "k *in"], rise: Float[Tensor, " k"], within: Linf | L2 | L1
) -> Float[Tensor, "k *in"]:
    """The shortest change of s, in the norm and the range of the set, that raises <w, s> by that much.

    A coordinate moves by at most its room r_i in the direction that counts, with t the length asked of all:
    min(t, r_i) for Linf, min(t |w_i|, r_i) for L2; for L1 the steepest are filled first. Where all the room
    does not do, it is all used.
    """
    way = w.flatten(1) * rise.sign()[:, None]
    flat, rise, steep = s.flatten(1), rise.abs(), way.abs()
    room = (rise[:, None] / steep.clamp(min=SMALLEST)).where(steep > SMALLEST, 0.0)  # does it alone
    if within.high is not None:
        room = torch.where(way > 0, room.minimum((within.high - flat).clamp(min=0)), room)
    if within.low is not None:
        room = torch.where(way < 0, room.minimum((flat - within.low).clamp(min=0)), room)
    if within.norm == 1:
        moved = _greedy(steep, room, rise)
    else:
        speed = torch.ones_like(steep) if within.norm == math.inf else steep.clamp(min=SMALLEST)
        moved = torch.minimum(_level(steep * speed, room / speed, rise)[:, None] * speed, room)
    return (moved * way.sign()).reshape(s.shape)


def _level(
    gain: Float[Tensor, "k n"], ends: Float[Tensor, "k n"], rise: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The least t with sum_i gain_i min(t, ends_i) = rise; the last end where there is none."""
    ends, order = ends.sort(1)
    gain = gain.gather(1, order)
    held = (gain * ends).cumsum(1) - gain * ends  # by those whose end came before
    moving = gain.flip(1).cumsum(1).flip(1)
    place = (held + moving * ends < rise[:, None]).sum(1, keepdim=True).clamp(max=ends.shape[1] - 1)
    t = (rise - held.gather(1, place)[:, 0]) / moving.gather(1, place)[:, 0].clamp(min=SMALLEST)
    return torch.minimum(t.clamp(min=0), ends[:, -1])


def _greedy(
    steep: Float[Tensor, "k n"], room: Float[Tensor, "k n"], rise: Float[Tensor, " k"]
) -> Float[Tensor, "k n"]:
    """How far each coordinate moves when the steepest are filled first."""
    steep, order = steep.sort(1, descending=True)
    room = room.gather(1, order)
    before = (steep * room).cumsum(1) - steep * room
    needed = (rise[:, None] - before).clamp(min=0) / steep.clamp(min=SMALLEST)
    return torch.zeros_like(steep).scatter(1, order, torch.minimum(needed, room))


def _halved(
    v: Victim, rows: Int[Tensor, " k"], best: Float[Tensor, "k *in"], far: Float[Tensor, " k"]
) -> Float[Tensor, "k *in"]:
    """The wrong points, nearer to x by halving between them; the others as they are."""
    found = far.isfinite().nonzero()[:, 0]
    if len(found) == 0:
        return best
    right, wrong = v.x[rows[found]], best[found]
    for _ in range(HALVINGS):
        middle = 0.5 * (right + wrong)
        left = per_example(v.wrong(middle, rows[found]), middle)
        right, wrong = torch.where(left, right, middle), torch.where(left, middle, wrong)
    best[found] = wrong
    return best


def _length(d: Float[Tensor, "k *in"], norm: float) -> Float[Tensor, " k"]:
    return torch.linalg.vector_norm(d.flatten(1), norm, dim=1)


def _bounded(within: Linf | L2 | L1) -> bool:
    return within.low is not None or within.high is not None
